"""Scores of adapter folders on the tasks of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rpg.config import Config
from rpg.tasks import build_task
from rpg.tasks.base import AdapterScorer
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError

Scores = dict[str, dict[str, dict[str, float]]]
"""Figures by folder, task and name."""


def score_folders(config: Config, folders: Sequence[Path], split: str = "test") -> Scores:
    """Score PEFT folders on every task of a configuration.

    Raises:
        InputError: the task is not `language`, or a folder holds no adapter of its form.
    """
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, AdapterScorer):
        raise InputError(
            f"task.name is {config.task.name if config.task else 'none'}, which scores no adapters; set language"
        )
    return {str(folder): task.score(Checkpoint.open(folder).state_dict(), split) for folder in folders}


def print_scores(scores: Scores, console: Console) -> None:
    """Print the scores of adapters, one row an adapter and task."""
    table = Table(title="held-out rows")
    for column in ("adapter", "task", "symbols %", "exact %", "perplexity"):
        table.add_column(column, justify="left" if column in ("adapter", "task") else "right")
    for folder, tasks in scores.items():
        for name, found in tasks.items():
            shares = [f"{100 * found[metric]:.2f}" for metric in ("symbol_accuracy", "exact_match")]
            table.add_row(Path(folder).name, name, *shares, f"{found['perplexity']:.4g}")
    console.print(table)
