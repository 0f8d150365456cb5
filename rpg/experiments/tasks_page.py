"""The page of unseen tasks beside its report: worst tasks, classifiers, denoising paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rpg.config import Config
from rpg.evaluation.page.page import Heatmap, Page, PageTable
from rpg.evaluation.report import Report, shown
from rpg.experiments.evaluating import losses_of, provenance_of
from rpg.experiments.single import OPTION, denoising_path_of, requested_condition
from rpg.generation.generator import Generator
from rpg.tasks.base import TaskFamily
from rpg.tasks.class_splits import check_bits
from rpg.tasks.language.task import LanguageTask
from rpg.tasks.side_by_side import stack
from tokenization.zoo.zoo import Zoo

TASKS_SHOWN, VALUES_SHOWN, NUM_WORST = 4, 100, 8


def tasks_page(
    run: Path,
    report: Report,
    generator: Generator,
    zoo: Zoo,
    task: TaskFamily,
    command: str,
    path_condition: Sequence[float] | None = None,
) -> Page:
    """The page of ``rpg unseen`` and ``rpg lora``; a few networks are generated for it.

    Args:
        path_condition: the task whose denoising paths are shown; the unseen one of median metric when None.
    """
    names = zoo.condition.names if zoo.condition is not None else ()
    num = report.kinds["generated"].count
    page = Page(
        f"Networks for unseen tasks: {run.name}",
        provenance_of(generator, zoo, num, report.seed, None, command),
        losses_of(run / "metrics.jsonl"),
    )
    if head := head_of(generator):
        page.heatmaps = _heatmaps(generator, zoo, head, report, names)
    page.tables = [worst_table(report, names)]
    bits = torch.tensor(path_condition if path_condition is not None else _middle(report)).long()
    kind = "the task" if path_condition is not None else "the unseen task"
    page.condition = f"{kind} {task_name(bits.tolist(), names)}"
    page.denoising_path = denoising_path_of(
        generator, bits.float(), report.seed,
        lambda networks: task.accuracies(stack(networks), bits.expand(len(networks), -1)),
        wanted=path_condition is not None,
    )  # fmt: skip
    return page


def requested_task(task: TaskFamily, config: Config, text: str) -> list[int]:
    """The task that ``--denoising-path`` names. Raises InputError if there is no such task, or no path to show."""
    bits = check_bits(
        [float(bit) for bit in requested_condition(config, task.condition, text)], task.condition.size, OPTION
    )
    if isinstance(task, LanguageTask):
        task.places(bits[None])  # only of these there are rows
    return bits.tolist()


def task_name(bits: Sequence[float], names: Sequence[str]) -> str:
    """A task in words: its positive classes, or its bits where these have no names."""
    if len(names) == len(bits):
        return ", ".join(name for name, bit in zip(names, bits, strict=True) if bit)
    return "".join(str(int(bit)) for bit in bits)


def worst_table(report: Report, names: Sequence[str]) -> PageTable:
    """The unseen tasks with the worst generated networks, with the originals' metric beside theirs."""
    first, kinds = report.first, report.kinds
    generated, originals = (kinds[name].metrics[first] for name in ("generated", "original"))
    known = {tuple(each["bits"]): each["accuracy_of_class"] for each in report.extras.get("worst", [])}
    rows = []
    for place in sorted(range(len(generated)), key=lambda place: generated[place] or 0.0)[:NUM_WORST]:
        bits = kinds["generated"].conditions[place]
        shares, words = known.get(tuple(map(int, bits))), ""
        if shares:
            least = min(range(len(shares)), key=lambda i: shares[i])
            words = f"{names[least] if len(names) > least else least} ({shown(shares[least], 'accuracy')})"
        cells = (shown(generated[place], first), shown(originals[place], first))
        far = kinds["generated"].distances["hamming"][place]
        rows.append([task_name(bits, names), *cells, f"{far:g}", words])
    return PageTable("Worst tasks", ("unseen task", "generated", "original", "distance to seen", "worst class"), rows)


def head_of(generator: Generator) -> str:
    """The classifier's matrix: the last tensor of two axes that is generated; empty without any."""
    matrices = [layer.name for layer in generator.layout.layers if len(layer.shape) == 2]
    return matrices[-1] if matrices else ""


def _heatmaps(generator: Generator, zoo: Zoo, head: str, report: Report, names: Sequence[str]) -> list[Heatmap]:
    """Originals and generated networks for some seen and unseen tasks (arXiv 2501.11587, figure 5).

    Columns are the values of the classifier that vary most over the seen tasks, less their mean and over their spread.
    """
    last = {tuple(map(int, entry.condition or ())): i for i, entry in enumerate(zoo.entries)}

    def original(bits: Sequence[float]) -> torch.Tensor:
        return generator.layout.checkpoint(zoo, last[tuple(map(int, bits))]).tensor(head).float().flatten()

    splits = {"seen": report.parts["seen"]["generated"].conditions, "unseen": report.kinds["generated"].conditions}
    seen = torch.stack([original(bits) for bits in splits["seen"]])
    mean, spread = seen.mean(0), seen.std(0).clamp(min=1e-12)
    columns = seen.std(0).topk(min(VALUES_SHOWN, seen.shape[1])).indices.sort().values
    found = []
    for split, tasks in splits.items():
        rows = torch.linspace(0, len(tasks) - 1, min(TASKS_SHOWN, len(tasks))).round().long().tolist()
        bits = [tasks[row] for row in rows]
        made = generator.one_by_one(len(bits), seed=report.seed, condition=torch.tensor(bits).float())
        labels, values = [], []
        for each, network in zip(bits, made, strict=True):
            labels += [f"{task_name(each, names)}: {kind}" for kind in ("original", "generated")]
            values += [original(each), network[head].float().flatten()]
        shown_values = ((torch.stack(values) - mean) / spread)[:, columns].nan_to_num()
        caption = (
            f"{split.capitalize()} tasks: values of {head} that vary most over the seen tasks, less their mean and "
            "divided by their spread."
        )
        found.append(Heatmap(labels, shown_values, caption))
    return found


def _middle(report: Report) -> Sequence[float]:
    """The unseen task of median metric."""
    kind = report.kinds["generated"]
    values = kind.metrics[report.first]
    return kind.conditions[sorted(range(len(values)), key=lambda place: values[place] or 0.0)[len(values) // 2]]
