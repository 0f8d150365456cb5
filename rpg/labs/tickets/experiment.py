"""The experiment on lottery tickets: find them, learn to generate them, train from the start under every kind of mask.

T tasks, S tasks that were learned from, P weights that may be pruned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.held_out import nearest_rows, random_other
from rpg.evaluation.metrics import summarize
from rpg.evaluation.page.drawing import COLORS, GENERATED, ORIGINAL, STYLE, Axis, draw_figure, save_png
from rpg.evaluation.page.page import Page, write_report
from rpg.evaluation.report import Curve, Report, networks
from rpg.experiments.single import collect, existing, require_for_choices
from rpg.experiments.task_methods import generate_for, networks_of
from rpg.generation.generator import Generator
from rpg.labs.tickets.task import TicketsTask, cut_globally, flatten, unflatten
from rpg.models.conditioning import regression_inputs
from rpg.models.kernel_regression import KernelRidge
from rpg.tasks import build_task
from rpg.training.loop import train_to_the_end
from tokenization.errors import InputError
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

SPARSITIES = (0.9, 0.95, 0.98)
"""Shares of zeros at which all kinds of masks are compared."""

Scores = Mapping[str, Tensor]
"""Of the weights, by kind of mask: ``[T, P]``."""


@locks(lambda config, **_: config.run)
def run_tickets(config: Config, *, progress: dict[str, Callable[..., None]]) -> dict[str, Any]:
    """Find the tickets, train the generator, compare on tasks nobody searched a ticket for, draw.

    Args:
        config: the experiment.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss).

    Returns:
        What ``<run>/evaluation.json`` holds.
    """
    tickets_task(config)
    started = time.perf_counter()
    collect(config, progress=progress.get("collect"))
    collected = time.perf_counter() - started
    train_to_the_end(config, overwrite=True, progress=progress.get("train"))
    return evaluate_tickets(config.run, seed=config.seed, seconds={"collect": collected, "started": started})


def tickets_task(config: Config) -> TicketsTask:
    """The task of a configuration. Raises InputError if it is another one."""
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, TicketsTask):
        name = config.task.name if config.task is not None else "none"
        raise InputError(f"task.name is {name}, but this is the experiment on tickets; set task.name to tickets")
    return task


@locks(lambda run, split="unseen", **_: None if split == "validation" else existing(run))
def evaluate_tickets(
    run: Path | str, *, split: str = "unseen", seed: int = 0, seconds: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Train the start under generated masks, tickets and what is trivial, for tasks nobody searched a ticket for.

    Args:
        run: a run folder.
        split: of the tasks; those of ``validation`` are scored on validation images, to choose by, and nothing is
            written.
        seed: decides what is generated, and the bootstrap.
        seconds: of the collection, and when it started.
    """
    run = Path(run)
    generator = Generator.from_pretrained(run)
    task, zoo = tickets_task(generator.config), Zoo.open(generator.config.zoo)
    require_for_choices(generator.config, split)
    seen, wanted = (networks_of(zoo, each, generator.layout) for each in ("train", split))
    like, bits = wanted.weights(), wanted.bits
    made: dict[str, Tensor] = {"original": flatten(like)}
    made["generated"] = flatten(generate_for(generator, bits, seed))
    made["no_condition"] = flatten(generate_for(generator, random_other(bits, seen.bits, seed), seed))
    made |= trivial(flatten(seen.weights()), seen.bits, bits)
    made |= {name: flatten(each) for name, each in task.untrained(zoo, bits).items()}
    images = "validation" if split == "validation" else "test"

    def judge(scores: Tensor, sparsity: float) -> Tensor:
        return task.accuracies(unflatten(scores, like), bits, images, sparsity)

    report = compare(made, judge, task.config.sparsity, seed)
    report |= {"sparsity": task.config.sparsity, "num": len(bits), "tasks": bits.tolist()}
    report["whole"] = judge(made["original"], 0.0).mean().item()
    report["seconds_of_one"] = seconds_of_one(generator, task, bits[:1])
    if split == "validation":
        return report
    report["training_seconds"] = generator.facts.get("training seconds")
    plot_tickets(report, run / "tickets.png")
    if seconds:
        report |= {"collect_seconds": seconds["collect"], "seconds": time.perf_counter() - seconds["started"]}
    page = Page(f"Lottery tickets: {run.name}", pictures={"Accuracy by share of zeros": run / "tickets.png"})
    write_report(run, report_of(report, split, seed), page)
    return report


def judge(run: Path | str, *, split: str = "unseen", seed: int = 0) -> Report:
    """The report of a run, as `evaluate_tickets` finds it."""
    return report_of(evaluate_tickets(run, split=split, seed=seed), split, seed)


def report_of(found: Mapping[str, Any], split: str, seed: int) -> Report:
    """What was found of every kind of mask in the form that all evaluations share."""
    names = _kinds(found)
    kinds = {
        name: networks(
            {"accuracy": found[name]["accuracies"]}, conditions=found["tasks"], seed=seed,
            extras={key: found[name][key] for key in ("overlap", "better_than_random", "generated_better")},
        )
        for name in names
    }  # fmt: skip
    shares = tuple(float(each) for each in found["generated"]["by_sparsity"])
    lines = {name: tuple(found[name]["by_sparsity"].values()) for name in names}
    known = ("sparsity", "whole", "seconds_of_one", "training_seconds", "collect_seconds", "seconds")
    return Report(
        experiment="tickets", judge=f"trained under masks of {found['sparsity']:.0%} zeros", split=split, seed=seed,
        better={"accuracy": "more"}, kinds=kinds, references=("original", "no_condition"),
        curves={"accuracy by share of zeros": Curve(x=shares, lines=lines, across="share of zeros", up="accuracy")},
        facts={name: found[name] for name in known if name in found},
    )  # fmt: skip


def trivial(tickets: Tensor, seen: Tensor, bits: Tensor) -> dict[str, Tensor]:
    """Scores that need no generator, made of the tickets ``[S, P]`` of ``seen`` tasks, for ``bits``: ``[T, P]`` each.

    ``nearest_seen``: the ticket of the nearest task; ``average``: of all; ``kernel_ridge``: regression on the bits.
    """
    mean = tickets.mean(0)
    known, asked = (regression_inputs("binary", each, each.shape[1]) for each in (seen, bits))
    rest = (tickets - mean).double()
    regression = KernelRidge.fit(known, rest @ rest.T)
    regressed = regression.kernel(asked) @ (regression.inverse @ rest)
    return {
        "kernel_ridge": mean + regressed.float(),
        "nearest_seen": tickets[nearest_rows(bits, seen, own=False)],
        "average": mean.expand(len(bits), -1),
    }


def compare(made: Scores, judge: Callable[[Tensor, float], Tensor], sparsity: float, seed: int) -> dict[str, Any]:
    """Every kind of mask at one share of zeros, task by task, and its mean accuracy at others.

    Args:
        made: scores by kind, ``original`` (the tickets), ``generated`` and ``random`` among them.
        judge: accuracies ``[T]`` of masks cut from scores at a share of zeros.
        sparsity: the share that kinds are compared at.
        seed: of the bootstrap.

    Returns:
        By kind ``accuracy`` (a summary), ``accuracies``, ``overlap`` (intersection over union of living weights with
        the tickets'), ``better_than_random`` (share of tasks), ``generated_better`` (share of tasks on which generated
        masks are better than these) and ``by_sparsity``.
    """
    shares = sorted({*SPARSITIES, sparsity})
    found = {name: {share: judge(scores, share) for share in shares} for name, scores in made.items()}
    tickets = cut_globally(made["original"], sparsity)
    report: dict[str, Any] = {}
    for name, by_share in found.items():
        accuracies, masks = by_share[sparsity], cut_globally(made[name], sparsity)
        overlap = (masks * tickets).sum(1) / (masks + tickets).clamp(max=1).sum(1)
        report[name] = {
            "accuracy": summarize(accuracies, seed).model_dump(mode="json"),
            "accuracies": accuracies.tolist(),
            "overlap": overlap.mean().item(),
            "better_than_random": _share_above(accuracies, found["random"][sparsity]),
            "generated_better": _share_above(found["generated"][sparsity], accuracies),
            "by_sparsity": {str(share): values.mean().item() for share, values in by_share.items()},
        }
    return report


def _share_above(first: Tensor, second: Tensor) -> float:
    return (first > second).double().mean().item()


def seconds_of_one(generator: Generator, task: TicketsTask, bits: Tensor) -> dict[str, float]:
    """Processor seconds of one mask for a task ``[1, C]``: generated, searched, or pruned once after training."""
    ones = {name: torch.ones(1, *value.shape) for name, value in task.build().named_parameters()}
    makers: dict[str, Callable[[], Any]] = {
        "generated": lambda: generate_for(generator, bits, 0),
        "original": lambda: task.find(bits),
        "one_shot": lambda: task.sizes(ones, bits),
    }
    found = {}
    for name, make in makers.items():
        started = time.process_time()
        make()
        found[name] = time.process_time() - started
    return found


def plot_tickets(report: Mapping[str, Any], path: Path) -> None:
    """Draw the mean accuracy of every kind of mask by the share of zeros, as a PNG. Raises InputError if it cannot."""
    from matplotlib import rc_context

    kinds = _kinds(report)
    shares = [float(each) for each in report["generated"]["by_sparsity"]]

    def draw(axes: Any) -> None:
        others = iter((2, 3, 4, 5, 7, 8, 9, 6))
        for name in kinds:
            color = {"original": ORIGINAL, "generated": GENERATED}.get(name)
            color = next(others) if color is None else color
            axes.plot(
                shares, report[name]["by_sparsity"].values(), color=COLORS[color], marker="o", markersize=3,
                linewidth=2 if name == "generated" else 1.2, label=_label(name),
                linestyle="--" if name in ("no_condition", "shuffled", "random") else "-",
            )  # fmt: skip
        axes.axhline(report["whole"], color=COLORS[2], linewidth=0.8, linestyle=":", label="no zeros")

    x = Axis("share of zeros", percent=True, ticks=shares)
    y = Axis(f"mean accuracy on test images, {report['num']} unseen tasks", percent=True)
    figure = draw_figure(draw, x, y, (7.5, 5))
    with rc_context(STYLE):
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save_png(figure, path)


LABELS = {
    "original": "ticket (searched)", "no_condition": "generated for another", "nearest_seen": "nearest seen ticket",
    "average": "average ticket", "start_magnitude": "size of the start", "one_shot": "size after training",
    "shuffled": "ticket, shuffled",
}  # fmt: skip


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def _kinds(report: Mapping[str, Any]) -> list[str]:
    return [name for name, found in report.items() if isinstance(found, Mapping) and "by_sparsity" in found]


def print_tickets(report: Mapping[str, Any], console: Console) -> None:
    """One row a kind of mask; the last columns are shares of tasks on which it is better or worse than that kind."""
    table = Table(title=f"trained under masks of {report['sparsity']:.0%} zeros, {report['num']} tasks (%)")
    columns = ("mean", "min", "overlap", "> random", "< generated")
    table.add_column("mask", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for name in _kinds(report):
        found = report[name]
        values = (found["accuracy"]["mean"], found["accuracy"]["min"], found["overlap"], found["better_than_random"])
        better = "" if name == "generated" else f"{100 * found['generated_better']:.0f}"
        style = "bold" if name == "generated" else ""
        table.add_row(_label(name), *(f"{100 * each:.1f}" for each in values), better, style=style)
    console.print(table)
    one = report["seconds_of_one"]
    console.print(
        f"without zeros {report['whole']:.1%}; one mask takes {one['generated']:.2f} s of processor generated, "
        f"{one['original']:.2f} s searched",
        highlight=False,
    )
