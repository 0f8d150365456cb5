from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from xdist.scheduler import LoadScopeScheduling

from rpg.config import Config
from rpg.section import read_variants
from tests.hub_server import HubServer, use_hub
from tokenization.zoo.zoo import ConditionSpec, Zoo

torch.set_num_threads(1)

LONGEST = (
    "test_blocks", "test_unseen", "test_browser", "test_cli", "test_kills", "test_score_command", "test_situations",
    "test_plan", "test_mistakes", "test_launch", "test_metric_experiment",
)  # fmt: skip
"""The files that take longest, the longest first: with several workers the others fill what is left."""


TOGETHER = {
    "test_tasks_page": "test_unseen", "test_lora": "test_unseen", "test_sensors_page": "test_browser",
    "test_classifier": "test_browser", "test_examples_experiments": "test_browser", "test_known_range": "test_browser",
    "test_shipped": "test_browser", "test_words": "test_browser",
}  # fmt: skip
"""Files that share what is made once a process, by the file that they follow on the same worker."""


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """One worker for a file, and for those that it shares with."""

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = Path(nodeid.split("::", 1)[0]).stem  # no two files have one name
            return TOGETHER.get(name, name)

    return Scheduling(config, log)


def pytest_configure() -> None:
    """Keep the tests' files in memory where there is room: what is written is flushed, and a disk takes its time."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 8 * 2**30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(TOGETHER.get(item.path.stem, item.path.stem), len(ranks)))


def small_network() -> nn.Module:
    """Convolution, batch norm, linear: every kind of tensor in few values."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))


def make_zoo(path: Path, num: int = 6, num_runs: int = 2, condition_size: int = 0) -> Zoo:
    """Checkpoints around one random network a run."""
    spec = (
        ConditionSpec("binary", condition_size, tuple(f"c{i}" for i in range(condition_size)))
        if condition_size
        else None
    )
    zoo = Zoo.create(path, condition=spec)
    for index in range(num):
        run = index % num_runs
        torch.manual_seed(run)
        state = small_network().state_dict()
        torch.manual_seed(100 + index)
        for value in state.values():
            if value.is_floating_point():
                value += 0.05 * torch.randn_like(value).abs()
        condition = tuple(float(index >> bit & 1) for bit in range(condition_size)) if condition_size else None
        zoo.append(state, run=run, step=index, condition=condition)
    return Zoo.open(path)


def small_config(folder: Path, **sections: object) -> Config:
    """A configuration that trains in a second."""
    tree: dict = {
        "run": str(folder / "run"),
        "zoo": str(folder / "zoo"),
        "tokens": {"size": 16},
        "model": {
            "backbone": {"kind": "lstm", "d_model": 32, "num_layers": 1},
            "denoiser": {"kind": "mlp", "width": 32, "hidden": 32, "depth": 1},
        },
        "train": {
            "steps": 12,
            "batch_size": 4,
            "warmup_steps": 2,
            "save_every": 5,
            "log_every": 1,
            "precision": "fp32",
        },
        "generate": {"steps": 3, "tile_tokens": 32},
        "evaluate": {"num_baseline": 2, "baselines": ["noise", "interpolation"]},
    }
    for name, section in sections.items():
        same_kind = not isinstance(section, dict) or section.get("kind") is None
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) and same_kind else section
    return Config.parse(tree, "test")


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return make_zoo(tmp_path / "zoo")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hugging Face hub on this machine, for this process and those it starts; its caches are empty."""
    server = use_hub(tmp_path, monkeypatch)
    yield server
    server.stop()


def configurations(folder: Path) -> list[Path]:
    """All configurations under a folder, and the variants that they hold by the names that they are read under."""
    files = sorted(folder.rglob("*.yaml"))
    return files + [file.with_name(f"{name}.yaml") for file in files for name in read_variants(file)]
