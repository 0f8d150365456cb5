"""What a generator learns from, as far as its size depends on it: of a zoo, a task's network or a timm network."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from rpg.config import Config
from rpg.tasks import build_task
from rpg.tasks.base import PartTask, TaskFamily
from rpg.training.data import TrainingSet
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.layouts import Layout, layout_without_statistics
from tokenization.zoo.zoo import Zoo

DEFAULT_CHECKPOINTS = 50
"""Checkpoints of a zoo that is not there yet: the paper's number (arXiv 2501.11587)."""


@dataclass(frozen=True)
class ZooSummary:
    """A zoo's layout and counts.

    Attributes:
        layout: how the checkpoints are cut into tokens.
        num_checkpoints: how many there are, of all splits.
        condition_size: values of a condition, or classes; 0 without one.
    """

    layout: Layout
    num_checkpoints: int = 1
    num_states: int = 1
    condition_size: int = 0

    @classmethod
    def of(cls, zoo: Zoo, config: Config) -> ZooSummary:
        """The zoo as ``config`` cuts it; no values are read. Raises InputError as `layout_without_statistics` does."""
        layout = layout_without_statistics(zoo.checkpoint(0), config.tokens, len(zoo))
        data = TrainingSet(zoo, config)
        return cls(layout, len(zoo), data.num_states, data.condition_size)


def find_zoo_summary(
    config: Config, *, network: str | None = None, num_checkpoints: int | None = None, condition_size: int | None = None
) -> ZooSummary:
    """What ``config`` learns from: its zoo, else the network of its task, else a timm network.

    Args:
        network: name of a timm network, which goes before all else.
        num_checkpoints: of a zoo that is not there yet; `DEFAULT_CHECKPOINTS` when None.
        condition_size: values of a condition, or classes, where neither zoo nor task tells.

    Raises:
        InputError: nothing tells the structure of the target network, or the size of its condition.
    """
    if network is None and (Path(config.zoo) / "zoo.json").exists():
        return ZooSummary.of(Zoo.open(config.zoo), config)
    checkpoint, known_size = _timm_network(network) if network is not None else _network_of_task(config)
    count = num_checkpoints or DEFAULT_CHECKPOINTS
    kind = config.model.condition.kind
    size = 0 if kind == "none" else 1 if kind == "metric" else condition_size or known_size or 0
    if kind != "none" and not size:
        raise InputError(
            f"Without a zoo the size of the condition ({kind}, model.condition.kind) is unknown; give --condition-size."
        )
    states = count if config.model.state.of in ("checkpoint", "code", "task") else 1
    return ZooSummary(layout_without_statistics(checkpoint, config.tokens, count), count, states, size)


def _timm_network(name: str) -> tuple[Checkpoint, None]:
    """Its checkpoint without values; what it is conditioned on is not known."""
    import timm

    if not timm.is_model(name):
        raise InputError(f"--network {name!r} is not a timm model; timm.list_models() lists them.")
    with torch.device("meta"):
        return Checkpoint.without_values(timm.create_model(name).state_dict(), Path(name)), None


def _network_of_task(config: Config) -> tuple[Checkpoint, int | None]:
    """The checkpoint of the task's network without values, and the size of the task's condition, if that is known."""
    if config.task is None:
        raise InputError(
            f"There is no zoo at {config.zoo}, and no task that says what network it would hold; give --network NAME."
        )
    task = build_task(config.task)
    with torch.device("meta"):
        network = task.build()
        held = task.part(network) if isinstance(task, PartTask) else network.state_dict()
        checkpoint = Checkpoint.without_values(held, Path(config.zoo))
    with contextlib.suppress(InputError):
        return checkpoint, task.condition.size if isinstance(task, TaskFamily) else None
    return checkpoint, None
