"""The experiment on adapters for unseen tasks: train a zoo of adapters, a generator, and compare on unseen tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rpg.config import Config
from rpg.evaluation.held_out import choose_regressions
from rpg.evaluation.held_out_adapters import score_adapter_split
from rpg.experiments.held_out_tasks import all_networks, join, networks_of, write_report
from rpg.experiments.single import collect
from rpg.generation.generator import Generator
from rpg.tasks import build_task
from rpg.tasks.images.collection import single_threaded
from rpg.tasks.language.language import LanguageTask
from rpg.tasks.side_by_side import repeat
from rpg.training.loop import train
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


def run_lora(config: Config, *, progress: dict[str, Callable[..., None]]) -> dict[str, Any]:
    """Train the zoo's adapters and a generator, and compare on unseen tasks.

    Args:
        config: the experiment.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss).

    Returns:
        What ``<run>/evaluation.json`` holds.

    Raises:
        InputError: the task is not ``language`` with binary conditions.
    """
    language_task(config)
    started = time.perf_counter()
    collect(config, progress=progress.get("collect"))
    collected = time.perf_counter() - started
    train(config, overwrite=True, progress=progress.get("train"))
    report = evaluate_lora(config.run, seed=config.seed)
    report |= {"collect_seconds": collected, "seconds": time.perf_counter() - started}
    write_report(Path(config.run), report)
    return report


def evaluate_lora(run: Path | str, *, seed: int = 0, split: str = "test") -> dict[str, Any]:
    """Generate an adapter for every task and compare with what is trivial; writes ``<run>/evaluation.json``.

    Regressions and averages are made of the adapters as the generator's layout cuts them: in canonical form, if it has
    one.

    Args:
        run: a run folder.
        seed: decides the generated adapters.
        split: rows to score on; ``validation`` scores on validation tasks in place of the unseen ones, and writes
            nothing.
    """
    run = Path(run)
    generator = Generator.from_pretrained(run)
    zoo, task = Zoo.open(generator.config.zoo), language_task(generator.config)
    choosing = split == "validation"
    train_tasks, validation = (networks_of(zoo, each, generator.layout) for each in ("train", "validation"))
    parts = {"train": train_tasks, "validation": validation}
    seen = join([parts[each] for each in (("train",) if choosing else generator.config.train.splits)])
    wanted = {"unseen": validation if choosing else networks_of(zoo, "unseen", generator.layout), "seen": seen}
    report: dict[str, Any] = {}
    with single_threaded():
        chosen = choose_regressions(task, train_tasks, validation)
        regressions = {name: chosen[name][0] for name in ("ridge", "kernel_ridge")}
        for name, originals in wanted.items():
            extra = {"no_adapter": repeat(task.no_adapter(), len(originals.bits))}
            adapters = all_networks(generator, seen, originals, regressions, seed, own=name == "seen", extra=extra)
            scored = score_adapter_split(task, adapters, originals.bits, seen.bits, split, seed)
            report[name] = {key: value.model_dump(mode="json") for key, value in scored.methods.items()}
            report[f"{name}_tasks"] = scored.model_dump(mode="json", exclude={"methods"})
    accuracy = {name: each["symbol_accuracy"]["mean"] for name, each in report["unseen"].items()}
    report["share_of_originals"] = accuracy["generated"] / accuracy["original"]
    report["regressions"] = {name: {**asdict(each), "validation_accuracy": a} for name, (each, a) in chosen.items()}
    report |= {"seed": generator.config.seed, "train_seconds": generator.facts.get("training seconds")}
    report["facts"] = generator.facts
    if not choosing:
        write_report(run, report)
    return report


def language_task(config: Config) -> LanguageTask:
    """The tasks of a configuration. Raises InputError if they are not `language` with binary conditions."""
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, LanguageTask):
        found = "none" if config.task is None else config.task.name
        raise InputError("task.name", found, "language", "see configs/lora/tiny.yaml")
    if task.condition.kind != "binary":
        raise InputError(
            "task.conditions", f"conditions of kind {task.condition.kind}", "binary ones",
            "the comparison's regressions are on bits; train and generate work with any",
        )  # fmt: skip
    return task


def score_folders(
    config: Config, folders: Sequence[Path], split: str = "test"
) -> dict[str, dict[str, dict[str, float]]]:
    """Score PEFT folders on every task of a configuration: figures by folder and task.

    Raises:
        InputError: the task is not `language`, or a folder holds no adapter of its form.
    """
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, LanguageTask):
        raise InputError("task.name", "none" if config.task is None else config.task.name, "language")
    return {str(folder): task.score(Checkpoint.open(folder).state_dict(), split) for folder in folders}


def print_scores(scores: dict[str, dict[str, dict[str, float]]], console: Any) -> None:
    """Print the scores of adapters, one row an adapter and task."""
    from rich.table import Table

    table = Table(title="held-out rows")
    for column in ("adapter", "task", "symbols %", "exact %", "perplexity"):
        table.add_column(column, justify="left" if column in ("adapter", "task") else "right")
    for folder, tasks in scores.items():
        for name, found in tasks.items():
            shares = [f"{100 * found[metric]:.2f}" for metric in ("symbol_accuracy", "exact_match")]
            table.add_row(Path(folder).name, name, *shares, f"{found['perplexity']:.4g}")
    console.print(table)


def print_lora(report: dict[str, Any], console: Any) -> None:
    """Print the comparison, one row a method."""
    from rich.table import Table

    table = Table(title="held-out rows, over tasks (%)")
    table.add_column("adapters", no_wrap=True)
    for split in ("unseen", "seen"):
        for column in ("symbols", "95 % interval", "min", "exact"):
            table.add_column(f"{split} {column}", justify="right")
    for name in report["unseen"]:
        cells = []
        for split in ("unseen", "seen"):
            symbols, exact = (report[split][name][metric] for metric in ("symbol_accuracy", "exact_match"))
            low, high = symbols["ci95"]
            interval = f"{100 * low:.1f} – {100 * high:.1f}"
            cells += [
                f"{100 * symbols['mean']:.2f}",
                interval,
                f"{100 * symbols['min']:.1f}",
                f"{100 * exact['mean']:.1f}",
            ]
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "generated" else "")
    console.print(table)
    console.print(
        f"generated: {report['share_of_originals']:.1%} of the originals' symbol accuracy on unseen tasks, better than "
        f"kernel ridge on {report['unseen_tasks']['better_than']['kernel_ridge']:.0%} of them, "
        f"trained in {report['train_seconds']:.0f} s",
        highlight=False,
    )
