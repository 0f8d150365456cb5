"""Adapters for unseen tasks, the whole experiment on fourteen tasks in seconds."""

import io
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from rpg.config import Config
from rpg.evaluation.page.page import print_checkpoints
from rpg.experiments.score_files import score_checkpoints
from rpg.experiments.single import for_choices, generate_for, train_or_continue
from rpg.experiments.unseen_tasks import evaluate_unseen, networks_of, task_family
from rpg.generation.generator import Generator
from rpg.merging.adapters import PEFT_METHODS as MERGED
from rpg.tasks.language.config import AdapterConfig
from rpg.tasks.language.task import LanguageTask
from tests.reports import checked_report
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

METHODS = {
    "original", "generated", "no_condition", "no_adapter", "nearest_seen", "average", "ridge", "kernel_ridge",
    *MERGED,
}  # fmt: skip


def test_the_report_has_what_was_promised(lora):
    config, report = lora
    assert checked_report(config.run, "tasks", "lora") == report and list(report.better) == [
        "symbol_accuracy",
        "exact_match",
        "perplexity",
    ]
    assert report.better["perplexity"] == "less"
    for kinds, num in ((report.kinds, 4), (report.parts["seen"], 4)):
        assert set(kinds) == METHODS
        for kind in kinds.values():
            for name in report.better:
                each, summary = kind.metrics[name], kind.summaries[name]
                assert len(each) == num and summary.mean == pytest.approx(sum(each) / num)
                assert summary.min == min(each)
                assert summary.ci95[0] <= summary.mean <= summary.ci95[1]
    assert report.facts["share_of_originals"] == pytest.approx(report.mean("generated") / report.mean("original"))
    assert report.mean("original") > report.mean("no_adapter")
    assert set(report.parts["seen"]["generated"].distances["hamming"]) == {0}
    assert min(report.kinds["generated"].distances["hamming"]) > 0


def test_figures_are_those_of_adapters_that_peft_loads(lora, tmp_path):
    config, report = lora
    zoo, task = Zoo.open(config.zoo), task_family(config)
    index = zoo.subset("unseen")[2]
    rows = task.rows(index)["test"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.task.base), zoo.file(index)).eval()
    symbols = (rows.targets >= 0) & (rows.targets != rows.end)
    right = (model(rows.ids).logits.argmax(-1) == rows.targets) & symbols
    expected = (right.sum() / symbols.sum()).item()
    assert report.kinds["original"].metrics["symbol_accuracy"][2] == pytest.approx(expected, abs=0.01)


def test_canonical_adapters_are_the_same_adapters(lora):
    config, _ = lora
    zoo, task = Zoo.open(config.zoo), task_family(config)
    layout = Generator.from_pretrained(config.run).layout
    assert layout.canonical is not None
    canonical = networks_of(zoo, "unseen", layout)
    plain = networks_of(zoo, "unseen")
    name = next(name for name in plain.weights() if "lora_A" in name)
    assert not torch.allclose(canonical.weights()[name], plain.weights()[name])
    ours, theirs = (task.scores(each.weights(), each.bits)["perplexity"] for each in (canonical, plain))
    assert torch.allclose(ours, theirs, rtol=1e-3)


def test_choices_never_touch_unseen_tasks_or_test_rows(lora, monkeypatch):
    config, _ = lora
    asked = []
    real = LanguageTask._scores
    monkeypatch.setattr(
        LanguageTask,
        "_scores",
        lambda self, weights, tasks, split: asked.append((split, set(tasks))) or real(self, weights, tasks, split),
    )
    before = (Path(config.run) / "evaluation.json").read_text()
    with pytest.raises(InputError, match="no choice can be made"):
        evaluate_unseen(config.run, split="validation")
    chosen = for_choices(config)
    train_or_continue(chosen)
    asked.clear()
    report = evaluate_unseen(chosen.run, split="validation")
    zoo = Zoo.open(config.zoo)
    unseen = {zoo.entries[index].run for index in zoo.subset("unseen")}
    assert {split for split, _ in asked} == {"validation"}
    assert not any(tasks & unseen for _, tasks in asked)
    assert [list(map(int, bits)) for bits in report.kinds["generated"].conditions] == networks_of(
        zoo, "validation"
    ).bits.tolist()
    assert (Path(config.run) / "evaluation.json").read_text() == before


def test_no_adapter_is_the_base(lora):
    config, report = lora
    task = task_family(config)
    base = AutoModelForCausalLM.from_pretrained(config.task.base)
    ids = task.rows(0)["test"].ids
    (bare,) = task.untrained(Zoo.open(config.zoo), task.conditions()[:1]).values()
    logits = task.bank.logits(bare, ids[None])[0]
    assert torch.allclose(logits, base(ids).logits, atol=1e-5)
    assert report.mean("no_adapter", "exact_match") < report.mean("original", "exact_match")


def test_generated_ones_are_of_the_zoos_structure(lora):
    config, _ = lora
    generator = Generator.from_pretrained(config.run)
    made = generate_for(generator, torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]]), 0)
    structure = Zoo.open(config.zoo).structure
    assert {name: tuple(value.shape[1:]) for name, value in made.items()} == {
        name: shape for name, (_, shape) in structure.tensors.items()
    }


def test_a_generated_folder_scores_as_its_weights_do(lora, tmp_path):
    config, _ = lora
    generator, task = Generator.from_pretrained(config.run), task_family(config)
    bits = torch.tensor([[0, 1, 1, 0]])
    (folder,) = generator.generate(1, condition=bits[0].float(), seed=3, output=tmp_path / "new")
    expected = task.scores(generate_for(generator, bits, 3), bits)
    found = score_checkpoints([folder], None, config, "test")[str(folder)]
    assert len(found) == 14 and found["0110"] == pytest.approx({name: each.item() for name, each in expected.items()})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.task.base), folder)
    ids = task.rows(0)["test"].ids
    ours = task.bank.logits(generate_for(generator, bits, 3), ids[None])[0]
    assert torch.allclose(model(ids).logits, ours, atol=1e-4)
    print_checkpoints({str(folder): found}, Console(file=(text := io.StringIO()), width=120))
    assert "0110" in text.getvalue()


def test_an_adapter_of_another_form_is_one_line(lora, tmp_path):
    config, _ = lora
    zoo = Zoo.open(config.zoo)
    other = config.model_copy(
        update={"task": config.task.model_copy(update={"adapter": AdapterConfig(r=2, target_modules=("k_proj",))})}
    )
    with pytest.raises(InputError, match="k_proj") as caught:
        score_checkpoints([zoo.file(0)], None, other, "test")
    assert "\n" not in str(caught.value)


def test_other_tasks_are_refused(tmp_path):
    with pytest.raises(InputError, match="task.name"):
        task_family(Config.load("configs/digits.yaml"))
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.jsonl").write_text("")
    task = {"name": "language", "base": "none", "data": str(tmp_path), "unseen": 1, "validation": 1}
    with pytest.raises(InputError, match="kind class"):
        task_family(Config.parse({"task": task}, "test"))
