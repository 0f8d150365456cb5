"""The experiment on unseen tasks: collect, train, generate for tasks nobody trained, compare, report."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.held_out import (
    Diversity,
    SplitScores,
    TaskNetworks,
    choose_regressions,
    measure_diversity,
    random_other,
    score_split,
    trivial_networks,
)
from rpg.evaluation.held_out_plots import plot_distance, plot_parameters
from rpg.evaluation.regression import Regression
from rpg.evaluation.vectors import FlatSpace
from rpg.experiments.single import collect
from rpg.generation.generator import Generator
from rpg.tasks import build_task
from rpg.tasks.images.collection import single_threaded
from rpg.tasks.images.subsets import SubsetTask, load_base
from rpg.tasks.side_by_side import Stacked, stack
from rpg.training.loop import train
from tokenization.errors import InputError
from tokenization.files import publish_text
from tokenization.layout.layout import TokenLayout
from tokenization.zoo.zoo import Zoo

NUM_DIVERSITY_TASKS, NUM_DRAWS = 50, 5


def run_unseen(config: Config, *, progress: dict[str, Callable[..., None]], seeds: int = 1) -> dict[str, Any]:
    """Collect, train and compare; with several seeds, generators differ by seed and the zoo is shared.

    Args:
        config: the experiment.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss).
        seeds: generators to train: ``config.seed``, the next, …; all but the first in ``<run>/seed-N``.

    Returns:
        The report of the first seed, with the figures of all seeds under ``seeds``; it is what
        ``<run>/evaluation.json`` holds.
    """
    subset_task(config)
    started = time.perf_counter()
    collect(config, progress=progress.get("collect"))
    collected = time.perf_counter() - started
    reports = []
    for number in range(seeds):
        run = config.run if number == 0 else str(Path(config.run) / f"seed-{config.seed + number}")
        each = config.model_copy(update={"seed": config.seed + number, "run": run})
        train(each, overwrite=True, progress=progress.get("train"))
        reports.append(evaluate_unseen(run, seed=each.seed))
    report = {**reports[0], "collect_seconds": collected, "seconds": time.perf_counter() - started}
    report["seeds"] = [_headline(each) for each in reports]
    write_report(Path(config.run), report)
    return report


def evaluate_unseen(run: Path | str, *, seed: int = 0, image_split: str = "test") -> dict[str, Any]:
    """Generate a network for every task and compare with what is trivial.

    Writes ``<run>/evaluation.json``, ``distance.png`` and ``parameters.png``.

    Args:
        run: a run folder.
        seed: decides the generated networks.
        image_split: images to score on; ``validation`` scores on validation tasks in place of the unseen ones, and
            writes nothing.

    Raises:
        InputError: the run is not one of a family of binary tasks.
    """
    run = Path(run)
    generator = Generator.from_pretrained(run)
    zoo, task = Zoo.open(generator.config.zoo), subset_task(generator.config)
    choosing = image_split == "validation"
    networks = {split: networks_of(zoo, split) for split in ("train", "validation", "unseen")}
    trained = ("train",) if choosing else generator.config.train.splits
    seen = join([networks[split] for split in trained])
    wanted = {"unseen": networks["validation" if choosing else "unseen"], "seen": seen}
    with single_threaded():
        chosen = choose_regressions(task, networks["train"], networks["validation"])
        regressions = {name: each for name, (each, _) in chosen.items()}
        base, probabilities = load_base(zoo), task.base_probabilities(zoo, image_split)
        made, scored = {}, {}
        for name, originals in wanted.items():
            extra = {"start": task.starts(base, originals.bits)}
            made[name] = all_networks(generator, seen, originals, regressions, seed, own=name == "seen", extra=extra)
            scored[name] = score_split(task, made[name], originals.bits, seen.bits, probabilities, image_split, seed)
        report = _report(generator, scored)
        report["regressions"] = {name: {**asdict(each), "validation_accuracy": a} for name, (each, a) in chosen.items()}
        if choosing:
            return report
        spread = diversity(generator, task, networks["unseen"].bits, seen, seed)
        report["diversity"] = spread.model_dump(mode="json")
    plot_distance(scored["unseen"], run / "distance.png")
    pairs = {name: (made[name]["original"], made[name]["generated"]) for name in ("seen", "unseen")}
    plot_parameters(pairs, run / "parameters.png")
    write_report(run, report)
    return report


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
        **trivial_networks(seen, bits, regressions, own),
    }


def diversity(
    generator: Generator, task: SubsetTask, bits: Tensor, seen: TaskNetworks, seed: int, **options: Any
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


def networks_of(zoo: Zoo, split: str, layout: TokenLayout | None = None) -> TaskNetworks:
    """The last checkpoint of every task of a split; with a layout as that cuts them, LoRA pairs in canonical form.

    Raises:
        InputError: the split is empty.
    """
    last = {zoo.entries[index].run: index for index in zoo.subset(split)}
    if not last:
        raise InputError(str(zoo.path), f"no task of split {split!r}", "at least one", "change task.held_out")
    bits = torch.tensor([zoo.entries[index].condition for index in last.values()]).long()
    read = zoo.checkpoint if layout is None else functools.partial(layout.checkpoint, zoo)
    return TaskNetworks(bits, stack([read(index).state_dict() for index in last.values()]))


def join(networks: Sequence[TaskNetworks]) -> TaskNetworks:
    """All of them, one after the other."""
    weights = {name: torch.cat([each.weights[name] for each in networks]) for name in networks[0].weights}
    return TaskNetworks(torch.cat([each.bits for each in networks]), weights)


def subset_task(config: Config) -> SubsetTask:
    """The family of tasks of a configuration. Raises InputError if it is none."""
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, SubsetTask):
        found = "none" if config.task is None else config.task.name
        raise InputError("task.name", found, "a family of binary tasks", "see configs/digits_unseen.yaml")
    return task


def print_unseen(report: dict[str, Any], console: Any) -> None:
    """Print the comparison, one row a method."""
    from rich.table import Table

    table = Table(title="accuracy (%) on test images, over tasks")
    table.add_column("networks", no_wrap=True)
    for split in ("unseen", "seen"):
        for column in ("mean", "95 % interval", "min"):
            table.add_column(f"{split} {column}", justify="right")
    for name in report["unseen"]:
        cells = []
        for split in ("unseen", "seen"):
            accuracy = report[split][name]["accuracy"]
            low, high = accuracy["ci95"]
            cells += [
                f"{100 * accuracy['mean']:.2f}",
                f"{100 * low:.2f} – {100 * high:.2f}",
                f"{100 * accuracy['min']:.1f}",
            ]
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "generated" else "")
    console.print(table)
    beats = report["unseen_tasks"]["beats_kernel_ridge"]
    console.print(
        f"better than kernel ridge on {beats:.0%} of the unseen tasks, trained in {report['train_seconds']:.0f} s",
        highlight=False,
    )
    for each in report.get("seeds", []):
        console.print(
            f"seed {each['seed']}: mean {each['mean']:.2%}, worst {each['min']:.1%}, better than kernel ridge on "
            f"{each['beats_kernel_ridge']:.0%}, trained in {each['train_seconds']:.0f} s",
            highlight=False,
        )


def _report(generator: Generator, scored: dict[str, SplitScores]) -> dict[str, Any]:
    report: dict[str, Any] = {
        name: {key: value.model_dump(mode="json") for key, value in scores.methods.items()}
        for name, scores in scored.items()
    }
    for name, scores in scored.items():
        report[f"{name}_tasks"] = scores.model_dump(mode="json", exclude={"methods"})
    report |= {"seed": generator.config.seed, "train_seconds": generator.facts.get("training seconds")}
    return {**report, "facts": generator.facts}


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    accuracy = report["unseen"]["generated"]["accuracy"]
    return {
        "seed": report["seed"],
        "mean": accuracy["mean"],
        "min": accuracy["min"],
        "beats_kernel_ridge": report["unseen_tasks"]["beats_kernel_ridge"],
        "train_seconds": report["train_seconds"],
    }


def write_report(run: Path, report: dict[str, Any]) -> None:
    """Write ``<run>/evaluation.json``."""
    publish_text(run / "evaluation.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
