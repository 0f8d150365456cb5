"""Several draws for one request: what they answer together, and which of them examples favour.

M networks, n examples, P values of each, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rpg.tasks import build_task
from rpg.tasks.base import ExampleTask
from rpg.tasks.config import TaskConfig
from rpg.tasks.side_by_side import SideBySide, Stacked, stack
from tokenization.checkpoint.checkpoint import save_checkpoint
from tokenization.errors import InputError

ENSEMBLE = "ensemble.safetensors"
"""Holds the tensors of all draws, ``[M, *shape]`` each, as `torch.func.stack_module_state` makes them of modules."""


def example_task(config: TaskConfig | None) -> ExampleTask:
    """The task that runs networks on examples. Raises InputError if it takes none."""
    task = build_task(config) if config is not None else None
    if not isinstance(task, ExampleTask):
        raise InputError("the generator's task has no examples; take one with model.condition.kind: examples")
    return task


def class_probabilities(task: ExampleTask, networks: Stacked, values: Tensor) -> Tensor:
    """What M stacked networks say of examples ``[n, P]``: ``[M, n, K]``."""
    return SideBySide(task.build()).predict(networks, task.inputs(values))


def favoured(task: ExampleTask, networks: Stacked, rows: Tensor) -> tuple[list[int], Tensor]:
    """M stacked networks by what they make of labelled examples, the best first; and each one's log-likelihood.

    Args:
        task: runs them.
        networks: stacked.
        rows: examples ``[n, P + K + 1]``, as `rpg.generation.examples` makes them.

    Returns:
        Places of the networks; the mean log-probability ``[M]`` that they give the examples' classes.

    Raises:
        InputError: an example has no class.
    """
    num_classes = len(task.example_classes)
    values, known = rows[:, : -num_classes - 1], rows[:, -num_classes - 1 : -1]
    if not known.any(-1).all():
        raise InputError("--choose-by has examples without a class; put them into folders named after classes")
    likely = class_probabilities(task, networks, values).clamp(min=1e-12).log()
    scores = (likely * known).sum((1, 2)) / len(rows)
    return scores.argsort(descending=True, stable=True).tolist(), scores


def load_draws(paths: Sequence[Path]) -> Stacked:
    """Generated files, stacked."""
    return stack([load_file(path) for path in paths])


def save_ensemble(draws: Stacked, folder: Path) -> Path:
    """Write stacked networks into one file."""
    save_checkpoint(folder / ENSEMBLE, draws, {"format": "pt"})
    return folder / ENSEMBLE
