"""Groupings by examples: the exact posterior in closed form, and a small run from zoo to report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rpg.config import Config
from rpg.experiments import grouping_examples
from rpg.experiments.driver import experiment_of, run_experiment
from rpg.tasks import build_task
from tests.reports import checked_report
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
