"""The experiment on unseen tasks: collect, train, generate for tasks nobody trained, compare, report.

It serves any family of binary tasks: networks for groups of image classes, and adapters of a language model.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.held_out import (
    Diversity,
    SplitScores,
    TaskNetworks,
    base_summed,
    choose_regressions,
    held_out_baselines,
    measure_diversity,
    random_other,
    score_split,
    worst_tasks,
)
from rpg.evaluation.held_out_plots import plot_distance, plot_parameters
from rpg.evaluation.linear_head import LinearHeadTraining, tune_linear_head
from rpg.evaluation.per_task import measure_per_task
from rpg.evaluation.regression import Regression
from rpg.evaluation.vectors import FlatSpace
from rpg.experiments.single import collect
from rpg.generation.generator import Generator
from rpg.tasks import build_task
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.images.collection import single_threaded
from rpg.tasks.side_by_side import Stacked, stack
from rpg.training.loop import train
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.layouts import Layout
from tokenization.zoo.zoo import Zoo

NUM_DIVERSITY_TASKS, NUM_DRAWS = 50, 5


def run_held_out(config: Config, *, progress: dict[str, Callable[..., None]], seeds: int = 1) -> dict[str, Any]:
    """Collect, train and compare; with several seeds, generators differ by seed and the zoo is shared.

    Args:
        config: the experiment.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss).
        seeds: generators to train: ``config.seed``, the next, …; all but the first in ``<run>/seed-N``.

    Returns:
        The report of the first seed, with the figures of all seeds under ``seeds``; it is what
        ``<run>/evaluation.json`` holds.

    Raises:
        InputError: the task is no family of binary tasks.
    """
    task_family(config)
    started = time.perf_counter()
    collect(config, progress=progress.get("collect"))
    collected = time.perf_counter() - started
    reports = []
    for number in range(seeds):
        run = config.run if number == 0 else str(Path(config.run) / f"seed-{config.seed + number}")
        each = config.model_copy(update={"seed": config.seed + number, "run": run})
        train(each, overwrite=True, progress=progress.get("train"))
        reports.append(evaluate_held_out(run, seed=each.seed))
    report = {**reports[0], "collect_seconds": collected, "seconds": time.perf_counter() - started}
    report["seeds"] = [_headline(each) for each in reports]
    _write(Path(config.run), report)
    return report


def evaluate_held_out(run: Path | str, *, seed: int = 0, split: str = "test") -> dict[str, Any]:
    """Generate a network for every task and compare with what is trivial.

    Writes ``<run>/evaluation.json``, and of a family of image tasks ``distance.png`` and ``parameters.png``.
    Regressions and averages are made of the networks as the generator's layout cuts them: LoRA pairs in canonical form.

    Args:
        run: a run folder.
        seed: decides the generated networks.
        split: images or rows to score on; ``validation`` scores on validation tasks in place of the unseen ones, and
            writes nothing.

    Raises:
        InputError: the run is not one of a family of binary tasks.
    """
    run, choosing = Path(run), split == "validation"
    generator = Generator.from_pretrained(run)
    config, zoo, task = generator.config, Zoo.open(generator.config.zoo), task_family(generator.config)
    networks = {each: networks_of(zoo, each, generator.layout) for each in ("train", "validation")}
    seen = join([networks[each] for each in (("train",) if choosing else config.train.splits)])
    wanted = {"unseen": networks["validation"] if choosing else networks_of(zoo, "unseen", generator.layout)}
    wanted["seen"] = seen
    made: dict[str, dict[str, Stacked]] = {}
    with single_threaded():
        chosen = choose_regressions(task, networks["train"], networks["validation"])
        shown = chosen if isinstance(task, ImageTaskFamily) else ("ridge", "kernel_ridge")
        regressions = {name: chosen[name][0] for name in shown}
        heads, tried = _linear_head(config, zoo, task, networks, wanted)
        for name, originals in wanted.items():
            extra = task.untrained(zoo, originals.bits) | heads.get(name, {})
            made[name] = all_networks(generator, seen, originals, regressions, seed, own=name == "seen", extra=extra)
        scored = {name: score_split(task, each, wanted[name].bits, seen.bits, split) for name, each in made.items()}
        report = _report(generator, zoo, task, made, scored, split, seed)
        report["regressions"] = {name: {**asdict(each), "validation_accuracy": a} for name, (each, a) in chosen.items()}
        report |= {"linear_head": tried} if tried else {}
        if isinstance(task, ImageTaskFamily):
            per_task = measure_per_task(task, made["unseen"], wanted["unseen"].bits, split, seed)
            report["per_task"] = per_task and per_task.model_dump(mode="json")
        if choosing:
            return report
        if isinstance(task, ImageTaskFamily):
            spread = diversity(generator, task, wanted["unseen"].bits, seen, seed)
            report["diversity"] = spread.model_dump(mode="json")
            _plot(run, scored["unseen"], made)
    _write(run, report)
    return report


def _linear_head(
    config: Config, zoo: Zoo, task: TaskFamily, networks: Mapping[str, TaskNetworks], wanted: Mapping[str, TaskNetworks]
) -> tuple[dict[str, dict[str, Stacked]], dict[str, float]]:
    """The linear head's networks by split, and how it was tuned; none where the generator saw no images."""
    settings = config.train.behaviour
    if not isinstance(task, ImageTaskFamily) or settings is None or not config.evaluate.linear_head:
        return {}, {}
    training = LinearHeadTraining(
        config.train.steps, config.train.batch_size, settings.images, config.seed,
        task.teacher(zoo) if settings.target == "base" else None,
    )  # fmt: skip
    train, validation, seen = networks["train"].bits, networks["validation"].bits, wanted["seen"].bits
    head, rate, accuracy = tune_linear_head(task, task.base_network(zoo), train, validation, seen, training)
    with torch.no_grad():
        made = {name: {"linear_head": head(each.bits)} for name, each in wanted.items()}
    return made, {"learning_rate": rate, "validation_accuracy": accuracy}


def _plot(run: Path, scores: SplitScores, made: Mapping[str, Mapping[str, Stacked]]) -> None:
    plot_distance({name: scores.first(name) for name in scores.figures}, scores.hamming_to_seen, run / "distance.png")
    pairs = {name: (made[name]["original"], made[name]["generated"]) for name in ("seen", "unseen")}
    plot_parameters(pairs, run / "parameters.png")


def all_networks(
    generator: Generator,
    seen: TaskNetworks,
    originals: TaskNetworks,
    regressions: dict[str, Regression],
    seed: int,
    own: bool,
    extra: Mapping[str, Stacked] | None = None,
) -> dict[str, Stacked]:
    """Every method's networks for the tasks of ``originals``, ``extra`` methods among them."""
    bits = originals.bits
    return {
        "original": originals.weights,
        "generated": generate_for(generator, bits, seed),
        "no_condition": generate_for(generator, random_other(bits, seen.bits, seed), seed),
        **(extra or {}),
        **held_out_baselines(seen, bits, regressions, own),
    }


def diversity(
    generator: Generator, task: ImageTaskFamily, bits: Tensor, seen: TaskNetworks, seed: int, **options: Any
) -> Diversity:
    """Several networks for each of some unseen tasks; ``options`` as :meth:`Generator.generate` takes them."""
    bits = bits[:NUM_DIVERSITY_TASKS]
    draws = [generate_for(generator, bits, 1000 * (seed + 1) + number, **options) for number in range(NUM_DRAWS)]
    vectors = FlatSpace(seen.weights).flatten(seen.weights)
    spread = vectors.std(0).square().mean().sqrt().item()
    return measure_diversity(task, draws, bits, spread)


def generate_for(generator: Generator, bits: Tensor, seed: int, **options: Any) -> Stacked:
    """One generated network for each task ``[T, C]``, stacked."""
    return stack(generator.generate(len(bits), condition=bits.float(), seed=seed, **options))  # type: ignore[arg-type]


def networks_of(zoo: Zoo, split: str, layout: Layout | None = None) -> TaskNetworks:
    """The last checkpoint of every task of a split; with a layout as that cuts them, LoRA pairs in canonical form.

    Raises:
        InputError: the split is empty.
    """
    last = {zoo.entries[index].run: index for index in zoo.subset(split)}
    if not last:
        raise InputError(f"{zoo.path} has no task of split {split!r}; change task.held_out")
    bits = torch.tensor([zoo.entries[index].condition for index in last.values()]).long()
    read = zoo.checkpoint if layout is None else functools.partial(layout.checkpoint, zoo)
    return TaskNetworks(bits, stack([read(index).state_dict() for index in last.values()]))


def join(networks: Sequence[TaskNetworks]) -> TaskNetworks:
    """All of them, one after the other."""
    weights = {name: torch.cat([each.weights[name] for each in networks]) for name in networks[0].weights}
    return TaskNetworks(torch.cat([each.bits for each in networks]), weights)


def task_family(config: Config) -> Any:
    """The family of binary tasks of a configuration. Raises InputError if it is none."""
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, TaskFamily):
        found = "none" if config.task is None else config.task.name
        raise InputError(
            f"task.name is {found}, which is no family of binary tasks; see configs/digits_unseen.yaml and "
            "configs/lora/tiny.yaml"
        )
    if task.condition.kind != "binary":
        raise InputError(
            f"task.conditions are of kind {task.condition.kind}, but the comparison's regressions take bits; "
            "give binary ones, or only train and generate, which work with any"
        )
    return task


def _report(
    generator: Generator, zoo: Zoo, task: TaskFamily, made: Mapping[str, Mapping[str, Stacked]],
    scored: Mapping[str, SplitScores], split: str, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What every family reports, and of image tasks the summed base network and the worst tasks."""
    report: dict[str, Any] = {}
    probabilities = task.base_probabilities(zoo, split) if isinstance(task, ImageTaskFamily) else torch.empty(0)
    for name, scores in scored.items():
        more = {}
        if isinstance(task, ImageTaskFamily):
            summed = base_summed(task, probabilities, scores.bits, split)
            scores.figures["base_summed"] = {"accuracy": summed}
            weights, accuracies = made[name]["generated"], scores.first("generated")
            more["worst"] = worst_tasks(task, weights, scores.bits, accuracies, split)
        report[name] = scores.methods(seed)
        report[f"{name}_tasks"] = scores.tasks() | more
    means = {name: scored["unseen"].first(name).mean().item() for name in ("generated", "original")}
    report["share_of_originals"] = means["generated"] / means["original"]
    report |= {"seed": generator.config.seed, "train_seconds": generator.facts.get("training seconds")}
    return {**report, "facts": generator.facts}


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    summary = next(iter(report["unseen"]["generated"].values()))
    return {
        "seed": report["seed"],
        "mean": summary["mean"],
        "min": summary["min"],
        "beats_kernel_ridge": report["unseen_tasks"]["beats_kernel_ridge"],
        "train_seconds": report["train_seconds"],
    }


def _write(run: Path, report: dict[str, Any]) -> None:
    write_text(run / "evaluation.json", json.dumps(report, indent=1, allow_nan=False) + "\n")


def print_held_out(report: dict[str, Any], console: Console) -> None:
    """Print the comparison, one row a method."""
    first = next(iter(report["unseen"]["generated"]))
    exact = "exact_match" in report["unseen"]["generated"]
    table = Table(title=f"{first.replace('_', ' ')} (%), over tasks")
    table.add_column("networks", no_wrap=True)
    for split in ("unseen", "seen"):
        for column in ("mean", "95 % interval", "min", *(("exact",) if exact else ())):
            table.add_column(f"{split} {column}", justify="right")
    for name in report["unseen"]:
        cells = []
        for figures in (report[split][name] for split in ("unseen", "seen")):
            low, high = figures[first]["ci95"]
            cells += [f"{100 * figures[first]['mean']:.2f}", f"{100 * low:.2f} – {100 * high:.2f}"]
            cells += [f"{100 * figures[first]['min']:.1f}"]
            cells += [f"{100 * figures['exact_match']['mean']:.1f}"] if exact else []
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "generated" else "")
    console.print(table)
    shown = {"": _headline(report)} | {f"seed {each['seed']}, ": each for each in report.get("seeds", [])}
    for seed, each in shown.items():
        console.print(
            f"{seed}generated for unseen tasks: mean {each['mean']:.2%}, worst {each['min']:.1%}, better than kernel "
            f"ridge on {each['beats_kernel_ridge']:.0%} of them, trained in {each['train_seconds']:.0f} s",
            highlight=False,
        )
    if per_task := report.get("per_task"):
        for name, each in per_task["methods"].items():
            alike, told = each["error_iou"], each["nearest_neighbour_accuracy"]
            line = f"{per_task['networks_per_task']} for one task: {name.replace('_', ' ')}, error IoU {alike:.2f}"
            console.print(line + ("" if told is None else f", 1-NNA {told:.2f}"), highlight=False)
    console.print(f"that is {report['share_of_originals']:.1%} of the originals' mean", highlight=False)
