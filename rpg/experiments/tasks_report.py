"""The page of an experiment on unseen tasks, gathered from its run folder, zoo and generator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.page.gather import losses_of, provenance_of
from rpg.evaluation.page.tasks_page import TasksPage, each_of, task_name, write_tasks_page
from rpg.experiments.held_out_tasks import task_family
from rpg.experiments.single import find_task
from rpg.experiments.trajectories import OPTION, trajectory_of, wished_trajectory
from rpg.generation.generator import Generator
from rpg.tasks.base import TaskFamily
from rpg.tasks.class_splits import check_bits
from rpg.tasks.language.language import LanguageTask
from rpg.tasks.side_by_side import stack
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

TASKS_SHOWN, VALUES_SHOWN = 4, 100


def write_tasks_report(run: Path | str, command: str, trajectory: Sequence[float] | None = None) -> Path:
    """Write ``<run>/report.html`` from ``<run>/evaluation.json``; a few networks are generated for it.

    Args:
        run: the run of ``rpg unseen`` or ``rpg lora``.
        command: what wrote the scores, for the last table.
        trajectory: the task whose networks are shown on their way from noise; the unseen one of median figure if None.

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
        bits = torch.tensor(trajectory if trajectory is not None else _middle(report)).long()
        page.condition, page.chosen = task_name(bits.tolist(), names), trajectory is not None
        page.trajectory = trajectory_of(
            generator, bits.float(), report["seed"],
            lambda networks: task.accuracies(stack(networks), bits.expand(len(networks), -1)), wanted=page.chosen,
        )  # fmt: skip
    write_tasks_page(run / "report.html", report, page)
    return run / "report.html"


def wished_task(config: Config, text: str) -> list[int]:
    """The task that ``--trajectory`` names. Raises InputError if there is none such, or no way to show."""
    task = task_family(config)
    bits = check_bits(
        [float(bit) for bit in wished_trajectory(config, task.condition, text)], task.condition.size, OPTION
    )
    if isinstance(task, LanguageTask):
        task.places(bits[None])  # only of these there are rows
    return bits.tolist()


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


def _middle(report: dict[str, Any]) -> list[int]:
    """The unseen task of median figure."""
    figures = each_of(report["unseen"]["generated"])
    place = sorted(range(len(figures)), key=lambda place: figures[place])[len(figures) // 2]
    return report["unseen_tasks"]["tasks"][place]
