"""Groupings by examples: the exact posterior in closed form, and a small run from zoo to report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rpg.config import Config
from rpg.experiments import grouping_examples
from rpg.experiments.driver import experiment_of, run_experiment
from rpg.generation.classifier import GeneratedClassifier
from rpg.tasks import build_task, collecting
from rpg.tasks.language.adapter_training import ShownRows
from rpg.tasks.language.rows import IGNORED, Rows
from tests.reports import checked_report
from tests.rpg.conftest import Run, refused
from tokenization.errors import InputError

SMALL = {
    "name": "digits_subsets", "network": "mlp-mini", "tasks": 12, "validation": 2,
    "unseen": {"kind": "random", "num": 3}, "base": {"steps": 20},
    "finetune": {"stages": [{"steps": 2, "learning_rate": 1e-3}], "batch_size": 16},
}  # fmt: skip


def test_the_posterior_is_that_of_bayes() -> None:
    groupings = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    seen = torch.tensor([[[0.7, 0.2, 0.1]]])  # p(positive) is 0.7 under the first grouping, 0.9 under the second
    expected = grouping_examples.bit_posterior(seen, torch.tensor([[1]]), groupings)
    assert torch.allclose(expected, torch.tensor([[1.0, 0.9 / 1.6, 0.0]]))
    expected = grouping_examples.bit_posterior(seen, torch.tensor([[0]]), groupings)
    assert torch.allclose(expected, torch.tensor([[1.0, 0.1 / 0.4, 0.0]]))


def test_examples_show_the_side_that_is_asked_for() -> None:
    task = build_task(Config.parse({"task": SMALL}, "test").task)
    bits = task.bits()[:4]
    sides = torch.tensor([[0, 1, 1, 0, 1, 0]]).expand(4, -1)
    shown = task.examples(bits, sides, torch.Generator().manual_seed(0), "validation")
    images = task.images("validation")
    for row, grouping in enumerate(bits):
        for place, values in enumerate(task.inputs(shown[row])):
            distances = (images - values).flatten(1).norm(dim=1)
            assert distances.min() < 1e-3
            assert grouping[task.classes("validation")[distances.argmin()]] == sides[row, place]


def test_networks_for_groupings_beside_the_bases_posterior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping_examples, "SHOWN", (4, 6))
    tree = {
        "run": str(tmp_path / "run"), "zoo": str(tmp_path / "zoo"), "task": SMALL,
        "tokens": {"size": 4096, "flatten": "flat", "normalization": "residual"},
        "model": {
            "state": {"of": "none"}, "backbone": {"kind": "none", "d_model": 16},
            "condition": {"kind": "examples", "counts": [4, 6], "classes": 2, "labelled": 1.0, "features": 10},
            "denoiser": {"kind": "decoder", "width": 16}, "diffusion": {"kind": "flow", "prediction": "sample"},
        },
        "train": {"steps": 2, "imitation": 0, "behaviour": {"networks": 3, "images": 8, "target": "base"}},
    }  # fmt: skip
    config = Config.parse(tree, "test")
    run_experiment(config, experiment_of(config))
    report = checked_report(tmp_path / "run", "groupings")
    assert set(report.kinds) == {"generated", "base_posterior", "original"} and list(report.parts) == ["6 examples"]
    assert report.kinds["generated"].count == 3
    with pytest.raises(InputError, match="model.condition.classes is 10, but the task has 2; set it to that"):
        tree["model"]["condition"]["classes"] = 10
        run_experiment(Config.parse(tree, "test"), experiment_of(config))


class NextToken(nn.Module):
    """A base that expects token t + 1 after token t of five."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=100.0 * nn.functional.one_hot((ids + 1) % 5, 5))


def test_a_row_as_values_says_what_was_expected_and_what_came() -> None:
    shown = ShownRows(NextToken())
    rows = Rows(torch.tensor([[0, 1, 2], [4, 4, 4]]), torch.tensor([[IGNORED, 2, 4], [IGNORED, 0, IGNORED]]), end=4)
    values = shown(rows).unflatten(1, (5, 5))
    pairs = shown.codes @ values @ shown.codes.T / 25  # codes of a small vocabulary are a rotation
    expected = torch.zeros(2, 5, 5)
    expected[0, 2, 2] = expected[0, 3, 4] = 0.5
    expected[1, 0, 0] = 1
    assert torch.allclose(pairs, expected, atol=1e-4)


def test_adapters_for_tasks_of_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rpg: Run) -> None:
    monkeypatch.setattr(collecting, "num_cores", lambda: 1)
    monkeypatch.setattr(grouping_examples, "ROWS_SHOWN", (1, 8))
    changes = (
        "task.symbols={symbols: 4, length: 3, rows: 60, hidden: 32, intermediate: 32, layers: 1, heads: 2, steps: 400, "
        "learning_rate: 0.01}", "task.rows={validation: 20, test: 20}", "task.unseen=4", "task.validation=2",
        "task.training.steps=5", "tokens.size=512", "model.condition.features=4", "train.steps=4",
        "train.behaviour.networks=3", "train.behaviour.images=4", f"task.base={tmp_path / 'base'}",
        f"task.data={tmp_path / 'tasks'}", f"zoo={tmp_path / 'zoo'}", f"run={tmp_path / 'run'}",
    )  # fmt: skip
    config = Config.load("configs/lora/few_examples.yaml", changes)
    run_experiment(config, experiment_of(config))
    report = checked_report(tmp_path / "run", "groupings")
    assert set(report.kinds) == {"generated", "base_posterior", "original"} and list(report.better)[1] == "exact_match"
    few, many = (
        each["base_posterior"].summaries["symbol_accuracy"] for each in (report.kinds, report.parts["8 examples"])
    )
    assert few is not None and many is not None and few.mean < many.mean > 0.95  # eight rows show every symbol
    task = next((tmp_path / "tasks").glob("*.jsonl"))
    (tmp_path / "mine.jsonl").write_text("".join(task.open().readlines()[:3]))
    code, out, _ = rpg(
        "generate", tmp_path / "run", "--examples", tmp_path / "mine.jsonl", "--output", tmp_path / "new"
    )
    assert code == 0 and (tmp_path / "new/network-00000/adapter_config.json").is_file() and "what was learned" in out
    (tmp_path / "empty.jsonl").write_text("")
    refused(rpg("generate", tmp_path / "run", "--examples", tmp_path / "empty.jsonl"), "has no rows; write one with")
    with pytest.raises(InputError, match="takes examples without classes; use `rpg generate"):
        GeneratedClassifier(str(tmp_path / "run")).fit([[0.0] * 3] * 2, [0, 1])
