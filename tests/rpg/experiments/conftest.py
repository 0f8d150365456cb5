"""Whole experiments on a few tasks, each run once for the files that look at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpg.config import Config
from rpg.evaluation.report import Report
from rpg.experiments.driver import experiment_of, run_experiment
from rpg.tasks import collecting
from rpg.tasks.class_splits import all_tasks
from rpg.tasks.images.digits import DigitsSubsetsTask

Experiment = tuple[Config, Report]


def restored(experiment: Experiment) -> Experiment:
    """The experiment with its run as it was left; what a file's tests did to it is forgotten."""
    run = Path(experiment[0].run)
    kept = run.with_name("kept")
    if kept.exists():
        shutil.rmtree(run)
    shutil.copytree(*((kept, run) if kept.exists() else (run, kept)))
    return experiment


@pytest.fixture(scope="session")
def whole_unseen(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Groups of digits, twenty tasks."""
    folder = tmp_path_factory.mktemp("unseen")
    tree = {
        "run": str(folder / "run"),
        "zoo": str(folder / "zoo"),
        "task": {
            "name": "digits_subsets", "unseen": {"kind": "random", "num": 5}, "validation": 4, "group": 10,
            "base": {"steps": 60}, "finetune": {"stages": [{"steps": 10}], "batch_size": 32},
        },
        "model": {
            "state": {"of": "none"}, "condition": {"kind": "binary"},
            "backbone": {"kind": "lstm", "d_model": 16}, "denoiser": {"kind": "mlp", "width": 16, "hidden": 16},
        },
        "train": {
            "splits": ["train", "validation"], "steps": 4, "batch_size": 4, "warmup_steps": 0,
            "behaviour": {"images": 8},
        },
        "generate": {"steps": 1},
        "evaluate": {"linear_head": False},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsSubsetsTask, "bits", lambda self: all_tasks(10)[:20])
        patch.setattr(collecting, "num_cores", lambda: 1)
        config = Config.parse(tree, "test")
        return restored((config, run_experiment(config, experiment_of(config, command="rpg unseen"), seeds=2)))


@pytest.fixture(scope="module")
def unseen(whole_unseen: Experiment) -> Iterator[Experiment]:
    """Configuration and report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsSubsetsTask, "bits", lambda self: all_tasks(10)[:20])
        patch.setattr(collecting, "num_cores", lambda: 1)
        yield restored(whole_unseen)


@pytest.fixture(scope="session")
def whole_lora(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Adapters of a tiny language model, fourteen tasks."""
    folder = tmp_path_factory.mktemp("lora")
    symbols = {
        "symbols": 4, "length": 3, "rows": 32, "hidden": 16, "intermediate": 24, "layers": 1, "heads": 2, "steps": 60,
        "learning_rate": 1e-2,
    }  # fmt: skip
    tree = {
        "run": str(folder / "run"),
        "zoo": str(folder / "zoo"),
        "task": {
            "name": "language", "base": str(folder / "base"), "data": str(folder / "tasks"), "symbols": symbols,
            "unseen": 4, "validation": 3, "rows": {"validation": 8, "test": 12}, "adapter": {"r": 2}, "group": 14,
            "training": {"steps": 20, "batch_size": 8, "learning_rate": 0.05},
        },
        "tokens": {"size": 32},
        "model": {
            "state": {"of": "none"}, "condition": {"kind": "binary"},
            "backbone": {"kind": "lstm", "d_model": 16}, "denoiser": {"kind": "mlp", "width": 16, "hidden": 16},
        },
        "train": {
            "splits": ["train", "validation"], "steps": 4, "batch_size": 4, "warmup_steps": 0, "precision": "fp32",
            "behaviour": {"images": 4},
        },
        "generate": {"steps": 1},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "num_cores", lambda: 1)
        config = Config.parse(tree, "test")
        return restored((config, run_experiment(config, experiment_of(config, command="rpg lora"))))


@pytest.fixture(scope="module")
def lora(whole_lora: Experiment) -> Iterator[Experiment]:
    """Configuration and report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "num_cores", lambda: 1)
        yield restored(whole_lora)
