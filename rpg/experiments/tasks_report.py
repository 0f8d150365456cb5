"""The page of an experiment on unseen tasks, gathered from its run folder, zoo and generator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.report.gather import losses_of, provenance_of
from rpg.evaluation.report.tasks_page import TasksPage, each_of, task_name, write_tasks_page
from rpg.experiments.single import find_task
from rpg.generation.generator import Generator
from rpg.tasks.base import TaskFamily
from rpg.tasks.side_by_side import stack
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

TASKS_SHOWN, VALUES_SHOWN, NETWORKS_SHOWN = 4, 100, 5
HELD_VALUES = 1 << 26
"""Values up to which the networks on their way from noise are held together; of larger ones none is shown."""


def write_tasks_report(run: Path | str, command: str) -> Path:
    """Write ``<run>/report.html`` from ``<run>/evaluation.json``; a few networks are generated for it.

    Args:
        run: the run of ``rpg unseen`` or ``rpg lora``.
        command: what wrote the scores, for the last table.

    Raises:
        InputError: the run has no scores, no generator, or no family of tasks.
    """
    run = Path(run)
    scores = run / "evaluation.json"
    if not scores.is_file():
        raise InputError(f"{scores} does not exist; score the run first")
    report, generator = json.loads(scores.read_text()), Generator.from_pretrained(run)
    zoo, config = Zoo.open(generator.config.zoo), generator.config
    names = zoo.condition.names if zoo.condition is not None else ()
    page = TasksPage(
        f"Networks for tasks nobody trained: {run.name}",
        names,
        provenance_of(generator, zoo, len(report["unseen_tasks"]["tasks"]), report["seed"], None, command),
        losses_of(run / "metrics.jsonl"),
    )
    page.head = head_of(generator)
    if page.head:
        page.heatmaps = _heatmaps(generator, zoo, page.head, report, names)
    task = find_task(config, zoo)
    if isinstance(task, TaskFamily):
        page.condition, page.trajectory = _trajectory(generator, task, report, names)
    write_tasks_page(run / "report.html", report, page)
    return run / "report.html"


def head_of(generator: Generator) -> str:
    """The classifier's matrix: the last tensor of two axes that is generated; empty without any."""
    matrices = [layer.name for layer in generator.layout.layers if len(layer.shape) == 2]
    return matrices[-1] if matrices else ""


def _heatmaps(
    generator: Generator, zoo: Zoo, head: str, report: dict[str, Any], names: Sequence[str]
) -> dict[str, tuple[list[str], Tensor]]:
    """Originals and generated networks for some seen and unseen tasks (arXiv 2501.11587, figure 5).

    Columns are the values of the classifier that vary most over the seen tasks, less their mean and over their spread.
    """
    last = {tuple(map(int, entry.condition or ())): i for i, entry in enumerate(zoo.entries)}

    def original(bits: Sequence[int]) -> Tensor:
        return generator.layout.checkpoint(zoo, last[tuple(bits)]).tensor(head).float().flatten()

    seen = torch.stack([original(bits) for bits in report["seen_tasks"]["tasks"]])
    mean, spread = seen.mean(0), seen.std(0).clamp(min=1e-12)
    columns = seen.std(0).topk(min(VALUES_SHOWN, seen.shape[1])).indices.sort().values
    found = {}
    for split in ("seen", "unseen"):
        tasks = report[f"{split}_tasks"]["tasks"]
        rows = torch.linspace(0, len(tasks) - 1, min(TASKS_SHOWN, len(tasks))).round().long().tolist()
        bits = [tasks[row] for row in rows]
        made = generator.one_by_one(len(bits), seed=report["seed"], condition=torch.tensor(bits).float())
        labels, values = [], []
        for each, network in zip(bits, made, strict=True):
            labels += [f"{task_name(each, names)}: {kind}" for kind in ("original", "generated")]
            values += [original(each), network[head].float().flatten()]
        found[split] = (labels, ((torch.stack(values) - mean) / spread)[:, columns].nan_to_num())
    return found


def _trajectory(
    generator: Generator, task: TaskFamily, report: dict[str, Any], names: Sequence[str]
) -> tuple[str, list[tuple[int, Tensor]]]:
    """Networks on their way from noise for the unseen task of median figure, and what that is called."""
    figures = each_of(report["unseen"]["generated"])
    middle = sorted(range(len(figures)), key=lambda place: figures[place])[len(figures) // 2]
    bits = torch.tensor(report["unseen_tasks"]["tasks"][middle])
    if generator.layout.num_values * NETWORKS_SHOWN > HELD_VALUES:
        return "", []
    shown = generator.trajectories(NETWORKS_SHOWN, seed=report["seed"], condition=bits.float())
    wanted = bits.expand(NETWORKS_SHOWN, -1)
    scored = [(step, task.accuracies(stack(networks), wanted)) for step, networks in shown]
    return task_name(bits.tolist(), names), scored
