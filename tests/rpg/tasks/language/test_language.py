"""The task language: files in, a zoo of PEFT folders out, scores and behaviour."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rpg.config import Config
from rpg.tasks import build_task
from rpg.tasks.language.config import LanguageConfig, RowsConfig, SymbolsConfig
from rpg.tasks.language.rows import IGNORED, find_tasks, make_tokenizer, read_rows, write_tasks
from rpg.tasks.language.task import LanguageTask
from tests.conftest import small_config
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout
from tokenization.zoo.zoo import Zoo

SYMBOLS = {
    "symbols": 3, "length": 3, "rows": 40, "hidden": 16, "intermediate": 24, "layers": 1, "heads": 2, "steps": 80,
    "learning_rate": 1e-2,
}  # fmt: skip


def config_in(folder, **changes):
    tree = {
        "base": str(folder / "base"), "data": str(folder / "tasks"), "symbols": SYMBOLS, "unseen": 2, "validation": 1,
        "rows": {"validation": 8, "test": 12}, "adapter": {"r": 2}, "group": 4,
        "training": {"steps": 6, "batch_size": 4}, **changes,
    }  # fmt: skip
    return LanguageConfig.model_validate(tree)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("language")


@pytest.fixture(scope="module")
def task(folder):
    return LanguageTask(config_in(folder))


@pytest.fixture(scope="module")
def zoo(task, folder):
    return task.collect(folder / "zoo", processes=1)


def test_real_conditions_are_found_in_the_precision_that_generators_are_asked_in(task, folder):
    """0.1 in float32 is another number than 0.1."""
    names = [each.path.name for each in task.tasks]
    lines = ["file,condition.x,condition.y", *(f"{name},0.{place},-1.7" for place, name in enumerate(names, 1))]
    (folder / "vectors.csv").write_text("\n".join(lines) + "\n")
    other = LanguageTask(config_in(folder, symbols=None, conditions=str(folder / "vectors.csv")))
    conditions = other.conditions()
    assert conditions[0].tolist() == pytest.approx([0.1, -1.7])
    for asked in (conditions.float(), conditions.double(), torch.tensor([[0.1, -1.7]]).double()):
        assert other.places(asked)[0] == 0


def test_the_zoo_is_of_peft_folders_that_score_as_recorded(task, zoo):
    assert len(zoo) == 6 and zoo.condition.kind == "binary" and zoo.condition.names == ("a", "b", "c")
    assert sorted({entry.split for entry in zoo.entries}) == ["train", "unseen", "validation"]
    entry = zoo.entries[3]
    assert entry.file == "checkpoints/001" and entry.condition == (0.0, 0.0, 1.0)
    base = AutoModelForCausalLM.from_pretrained(task.config.base)
    model = PeftModel.from_pretrained(base, zoo.path / entry.file).eval()
    rows = task.rows(3)["validation"]
    logits = model(rows.ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.targets.flatten()).item()
    right = (logits.argmax(-1) == rows.targets) | (rows.targets == IGNORED)
    assert entry.metrics["validation_perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
    assert entry.metrics["validation_exact_match"] == pytest.approx(right.all(1).double().mean().item())
    with model.disable_adapter():
        assert not torch.allclose(model(rows.ids).logits, logits)


def test_all_start_alike_unless_they_shall_not(task, zoo, folder):
    first = next(iter(zoo.structure.tensors))
    assert "lora_A" in first
    own = LanguageTask(config_in(folder, start="own"))
    assert torch.equal(task._start(0)[first], task._start(1)[first])
    assert not torch.equal(own._start(0)[first], own._start(1)[first])


def test_one_at_a_time_trains_the_same_adapters(task, zoo, folder):
    alone = LanguageTask(config_in(folder, group=1)).collect(folder / "alone", processes=1, limit=2)
    assert len(alone) == 2
    for index in range(2):
        ours, theirs = alone.state_dict(index), zoo.state_dict(index)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], value, atol=1e-4) for key, value in theirs.items())


def test_several_checkpoints_of_dora_adapters(folder):
    config = config_in(folder, adapter={"kind": "dora", "r": 2}, training={"steps": 4, "checkpoints": 2})
    zoo = LanguageTask(config).collect(folder / "dora", processes=1, limit=1)
    assert [(entry.run, entry.step) for entry in zoo.entries[:3]] == [(0, 1), (0, 2), (1, 1)]
    assert zoo.entries[1].file == "checkpoints/100-0001"
    assert any(name.endswith("lora_magnitude_vector") for name in zoo.structure.tensors)
    base = AutoModelForCausalLM.from_pretrained(config.base)
    PeftModel.from_pretrained(base, zoo.path / zoo.entries[1].file)
    zoo.verify()


def test_a_killed_collection_goes_on_where_it_stood(task, zoo, folder, monkeypatch):
    trained = []
    real = LanguageTask.train_part

    def dying(self, tasks, path):
        if trained:
            raise KeyboardInterrupt
        trained.append(tasks)
        return real(self, tasks, path)

    monkeypatch.setattr(LanguageTask, "train_part", dying)
    with pytest.raises(KeyboardInterrupt):
        task.collect(folder / "killed", processes=1)
    monkeypatch.setattr(
        LanguageTask, "train_part", lambda self, tasks, path: trained.append(tasks) or real(self, tasks, path)
    )
    resumed = task.collect(folder / "killed", processes=1)
    assert trained == [[0, 1, 2, 3], [4, 5]]
    assert resumed.digest() == zoo.digest()
    other = LanguageTask(config_in(folder, start="own"))
    with pytest.raises(InputError, match=r"task\.start"):
        other.collect(folder / "killed")


@pytest.mark.usefixtures("zoo")  # its collection writes the base and the rows
@pytest.mark.parametrize("rank", [4, 16, 64])
def test_the_papers_dora_configurations_on_a_small_base(task, folder, tmp_path, rank):
    data = tmp_path / "rows"
    data.mkdir()
    (data / "commonsense.jsonl").write_bytes(next((folder / "tasks").glob("*.jsonl")).read_bytes())
    config = Config.load(
        f"configs/lora/dora_r{rank}.yaml",
        [f"task.base={task.config.base}", f"task.data={data}", f"zoo={tmp_path / 'zoo'}", "task.training.steps=4",
         "task.training.checkpoints=2", "task.training.tail=0.5", "task.rows.validation=4", "task.rows.test=4"],
    )  # fmt: skip
    zoo = build_task(config.task).collect(config.zoo)
    assert [entry.step for entry in zoo.entries] == [1, 2] and zoo.entries[0].metrics["validation_perplexity"] > 1
    shapes = {name: shape for name, (_, shape) in zoo.structure.tensors.items()}
    assert sum("magnitude" in name for name in shapes) == 5
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {rank}
    tokens = TokenLayout.fit(zoo, config.tokens).encode(zoo.checkpoint(1))
    assert tokens.isfinite().all() and tokens.abs().sum() > 0


@pytest.mark.slow
def test_launched_processes_share_the_parts(task, zoo, folder, tmp_path):
    config = small_config(tmp_path, task=task.config.model_dump(), zoo=str(tmp_path / "zoo"))
    config.save(tmp_path / "config.yaml")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "rpg", "collect", str(tmp_path / "config.yaml"),
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment, timeout=300, stdout=subprocess.DEVNULL)
    assert Zoo.open(tmp_path / "zoo").digest() == zoo.digest()


def test_behaviour_is_the_loss_on_training_rows(task, zoo):
    conditions = torch.tensor([zoo.entries[index].condition for index in (0, 4)])
    weights = {
        name: torch.stack([zoo.state_dict(index)[name] for index in (0, 4)]).requires_grad_()
        for name in zoo.structure.tensors
    }
    losses = task.behaviour_losses(weights, conditions, 5, torch.Generator().manual_seed(3))
    numbers = torch.randint(2**40, (5,), generator=torch.Generator().manual_seed(3))
    for place, loss in zip((0, 4), losses, strict=True):
        rows = task.rows(place)["train"]
        rows = rows[numbers % len(rows)]
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(task.config.base), zoo.path / zoo.entries[place].file
        )
        expected = torch.nn.functional.cross_entropy(model(rows.ids).logits.flatten(0, 1), rows.targets.flatten())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    losses.sum().backward()
    assert all(value.grad.abs().sum() > 0 for name, value in weights.items() if "lora_A" in name)
    with pytest.raises(InputError, match="that of a task"):
        task.behaviour_losses(weights, torch.zeros(2, 3), 5, torch.Generator())


def test_rows_are_split_and_only_completions_are_scored(tmp_path):
    symbols = SymbolsConfig(symbols=2, length=2, rows=10)
    write_tasks(symbols, tmp_path, 0)
    tokenizer = make_tokenizer(symbols)
    found = read_rows(tmp_path / "10.jsonl", tokenizer, RowsConfig(validation=2, test=3))
    assert [len(found[split]) for split in ("train", "validation", "test")] == [5, 2, 3]
    last = json.loads((tmp_path / "10.jsonl").read_text().splitlines()[-1])
    assert "a" not in last["completion"] and last["completion"].replace("*", "a") + "=" == last["prompt"]
    rows = found["test"]
    assert tokenizer.decode(rows.ids[-1]) == last["prompt"] + last["completion"]
    scored = rows.targets[-1][rows.targets[-1] != IGNORED]
    assert tokenizer.decode(scored) == last["completion"] + "<end>"
    assert rows.scored.tolist() == [2, 3, 4]


def test_conditions_come_from_a_table_or_from_names(tmp_path):
    for name in ("10", "01", "11"):
        (tmp_path / f"{name}.jsonl").write_text("")
    tasks, spec = find_tasks(tmp_path, None, 1, 1, 0)
    assert spec.kind == "binary" and {task.condition for task in tasks} == {(1, 0), (0, 1), (1, 1)}
    assert sorted(task.split for task in tasks) == ["train", "unseen", "validation"]
    (tmp_path / "boolq.jsonl").write_text("")
    tasks, spec = find_tasks(tmp_path, None, 0, 0, 0)
    assert spec.kind == "class" and spec.names == ("01", "10", "11", "boolq")
    table = tmp_path / "table.csv"
    table.write_text("file,condition.x,condition.y,split\n10.jsonl,0.5,1,train\n01.jsonl,2,0,unseen\n")
    tasks, spec = find_tasks(tmp_path, table, 5, 5, 0)
    assert spec.kind == "vector" and [task.split for task in tasks] == ["train", "unseen"]


def bad_rows(text):
    return lambda folder: (
        (folder / "a.jsonl").write_text(text)
        and read_rows(
            folder / "a.jsonl", make_tokenizer(SymbolsConfig(symbols=2)), RowsConfig(validation=1, test=1, max_tokens=8)
        )
    )


ROW = '{"prompt": "ab=", "completion": "ab"}\n'


@pytest.mark.parametrize(
    "use, words",
    [
        (bad_rows(ROW + "{"), "line 2"),
        (bad_rows('{"prompt": "ab="}\n'), "completion"),
        (bad_rows('{"prompt": "ab=", "completion": ""}\n'), "empty completion"),
        (bad_rows(ROW * 2), "2 rows"),
        (bad_rows('{"prompt": "abababa=", "completion": "a"}\n'), "task.rows.max_tokens"),
        (lambda folder: find_tasks(folder / "none", None, 0, 0, 0), "jsonl"),
        (lambda folder: LanguageTask(config_in(folder, adapter={"dropout": 0.1})), "task.group: 1"),
        (lambda folder: LanguageTask(config_in(folder, base=str(folder / "tasks"), symbols=None)).base, r"task\.base"),
        (lambda folder: LanguageTask(config_in(folder, unseen=6)).tasks, "task.unseen"),
        (lambda folder: LanguageTask(config_in(folder, symbols={**SYMBOLS, "length": 4})).tasks, "symbols.json"),
        (lambda folder: build_task({"name": "language", "base": "x"}), "task.data"),
    ],
)
def test_mistakes_are_one_line(zoo, folder, use, words):
    with pytest.raises(InputError, match=words) as caught:
        use(folder)
    assert "\n" not in str(caught.value)
