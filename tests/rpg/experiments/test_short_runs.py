"""Short runs of both experiments on unseen tasks, long enough that the generator must have learned the tasks' bits."""

from __future__ import annotations

import pytest

from rpg.config import Config
from rpg.experiments.driver import experiment_of, run_experiment
from rpg.tasks import collecting

pytestmark = pytest.mark.slow

MARGIN = 0.05
"""How much better generated networks must be than the nearest seen task's, in shares of right answers."""


def run(tree, folder, monkeypatch, width):
    monkeypatch.setattr(collecting, "num_cores", lambda: 1)
    common = {
        "run": str(folder / "run"), "zoo": str(folder / "zoo"), "generate": {"steps": 1},
        "evaluate": {"linear_head": False},
        "model": {
            "state": {"of": "none"}, "condition": {"kind": "binary"},
            "backbone": {"kind": "lstm", "d_model": width},
            "denoiser": {"kind": "mlp", "width": width, "hidden": 2 * width},
        },
    }  # fmt: skip
    training = {"splits": ["train", "validation"], "batch_size": 16, "warmup_steps": 10, "ema_decay": 0.95}
    config = Config.parse({**common, **tree, "train": training | tree["train"]}, "test")
    return run_experiment(config, experiment_of(config))


def test_networks_for_unseen_tasks_beat_the_nearest_seen_network(tmp_path, monkeypatch):
    task = {
        "name": "digits_subsets", "tasks": 60, "unseen": {"kind": "random", "num": 12}, "validation": 6, "group": 60,
        "base": {"steps": 300, "batch_size": 128}, "finetune": {"stages": [{"steps": 20}], "batch_size": 64},
    }  # fmt: skip
    behaviour = {"weight": 1000.0, "images": 64, "target": "base", "share": 1.0}
    train = {"steps": 300, "learning_rate": 8e-3, "behaviour": behaviour}
    report = run({"task": task, "tokens": {"size": 512}, "train": train}, tmp_path, monkeypatch, 64)
    means = {name: report.mean(name) for name in report.kinds}
    assert means["generated"] > means["nearest_seen"] + MARGIN
    assert means["generated"] > means["no_condition"] + MARGIN  # it is the bits that tell the tasks apart


def test_adapters_for_unseen_tasks_beat_the_nearest_seen_adapter(tmp_path, monkeypatch):
    symbols = {
        "symbols": 6, "length": 4, "rows": 96, "hidden": 32, "intermediate": 64, "layers": 1, "heads": 2, "steps": 150,
        "learning_rate": 1e-2,
    }  # fmt: skip
    task = {
        "name": "language", "base": str(tmp_path / "base"), "data": str(tmp_path / "tasks"), "symbols": symbols,
        "unseen": 8, "validation": 5, "rows": {"validation": 16, "test": 24}, "adapter": {"r": 2}, "group": 32,
        "training": {"steps": 40, "batch_size": 8, "learning_rate": 0.03},
    }  # fmt: skip
    train = {"steps": 150, "precision": "fp32", "behaviour": {"weight": 1.0, "images": 8, "share": 0.5}}
    report = run({"task": task, "tokens": {"size": 64}, "train": train}, tmp_path, monkeypatch, 48)
    means = {name: report.mean(name) for name in report.kinds}
    assert means["generated"] > means["nearest_seen"] + MARGIN
    assert means["generated"] > means["no_condition"] + MARGIN
