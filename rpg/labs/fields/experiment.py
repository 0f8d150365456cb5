"""The experiment on neural fields: fit, train, generate, compare in function space, draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from rpg.config import Config
from rpg.console import FiguresTable
from rpg.evaluation.field_judges import class_judge, letter_features
from rpg.evaluation.field_measures import DISTANCES, measure_samples, shown_by, trivial_weights
from rpg.evaluation.page.page import Page, write_report
from rpg.evaluation.report import Report, networks
from rpg.evaluation.vectors import FlatSpace
from rpg.experiments.single import collect, existing, require_for_choices
from rpg.generation.generator import Generator
from rpg.labs.fields.baselines import VALUES, baseline_configs, grid_zoo, write_grid_zoo
from rpg.labs.fields.data import alter
from rpg.labs.fields.pictures import draw_pictures, learned_originals
from rpg.labs.fields.task import FieldsTask
from rpg.seeding import make_rng
from rpg.tasks import build_task
from rpg.tasks.collecting import single_threaded
from rpg.tasks.side_by_side import stack
from rpg.training.loop import train_to_the_end
from tokenization.checkpoint.progress import steps
from tokenization.errors import InputError
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

NUM_SETS = 5
"""Sets of generated fields, and of every baseline's, whose figures are averaged."""

JUDGE_COPIES = 2
"""Altered copies of every datum that the judge of classes learns from."""

BETTER: dict[str, Literal["more", "less"]] = {
    "one_nna": "less", "coverage": "more", "mmd": "less", "precision": "more", "recall": "more", "frechet": "less",
    "class_accuracy": "more", "nearest": "more",
}  # fmt: skip
"""Measures of generated data; the first, 1-NNA, is 0.5 where they cannot be told from real ones."""

Progress = Callable[[int, int], None]


def fields_task(config: Config) -> FieldsTask:
    """The task of a configuration. Raises InputError if it is another one."""
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, FieldsTask):
        name = config.task.name if config.task is not None else "none"
        raise InputError(f"task.name is {name}, but this is the experiment on fields; set task.name to fields")
    return task


@locks(lambda config, **_: config.run)
def run_fields(config: Config, *, progress: Progress | None = None, baselines: bool = True) -> dict[str, Any]:
    """Fit the fields, train the generator and the baselines that are trained, compare and draw.

    Args:
        config: the experiment.
        progress: called with (fields fitted, fields in all).
        baselines: whether to train the baselines, too.

    Returns:
        What ``<run>/evaluation.json`` holds.
    """
    task, started = fields_task(config), time.perf_counter()
    zoo = collect(config, progress=progress)
    collected = time.perf_counter() - started
    configs = [config]
    if baselines:
        write_grid_zoo(task, zoo, Path(grid_zoo(config)))
        configs += baseline_configs(config).values()
    # The longest first; each on a thread of its own, which two cores bear better than two threads each.
    with ProcessPoolExecutor(min(2, len(configs)), mp_context=get_context("spawn")) as pool:
        list(steps("training", pool.map(_train, configs), len(configs), after=0))
    return evaluate_fields(config.run, seconds={"collect_seconds": collected, "started": started})


@single_threaded()
def _train(config: Config) -> None:
    train_to_the_end(config, overwrite=True)


@dataclass(frozen=True)
class Reference:
    """What generated data are compared with, as vectors of what is shown on the data's own grid.

    Attributes:
        training: what the originals show that were learned from ``[T, F]``.
        weights, labels: theirs, ``[T, P]`` and ``[T]``.
        held_out: data that nothing was learned from, ``[N, F]``.
        wanted: their classes ``[N]``, which are asked for.
    """

    training: Tensor
    weights: Tensor
    labels: Tensor
    held_out: Tensor
    wanted: Tensor


@single_threaded()
@locks(lambda run, split="unseen", **_: existing(run) if split == "unseen" else None)
def evaluate_fields(
    run: Path | str, *, split: str = "unseen", seed: int = 0, seconds: dict[str, float] | None = None
) -> dict[str, Any]:
    """Generate one field for every held-out datum, of its class, and compare; nothing is chosen here.

    Args:
        run: a run folder; baselines that were trained lie in it.
        split: ``unseen``; ``validation`` to make choices by, of a run that did not learn from it: nothing is written.
        seed: decides what is generated and drawn.
        seconds: of the collection, and when it started.
    """
    run = Path(run)
    generator = Generator.from_pretrained(run)
    config, zoo = generator.config, Zoo.open(generator.config.zoo)
    task = fields_task(config)
    reference = _reference(task, zoo, config, split)
    channels, size = task.data.values.shape[1:3]
    judge = class_judge(*_judged(task, config))
    dimensions = task.config.dimensions
    measure = partial(
        measure_samples,
        held_out=reference.held_out,
        training=reference.training,
        features=letter_features(size, channels) if dimensions == 2 else None,
        distances=DISTANCES[dimensions],
    )
    samples = _samples(run, generator, task, zoo, reference, seed)
    report: dict[str, Any] = {}
    for name, sets in samples.items():
        right = [(judge(each) == reference.wanted).double().mean().item() for each in sets]
        report[name] = {**measure(sets), "class_accuracy": sum(right) / len(right)}
    real = reference.held_out
    distances = DISTANCES[dimensions](real, reference.training).amin(1)
    report["held_out"] = {
        "num": len(real),
        "sets": NUM_SETS,
        "nearest": distances.median().item(),
        "class_accuracy": (judge(real) == reference.wanted).double().mean().item(),
    }
    if split != "unseen":
        return report
    report["training_seconds"] = generator.facts.get("training seconds")
    if seconds:
        report["collect_seconds"] = seconds["collect_seconds"]
    draw_pictures(run, generator, task, zoo, seed)
    if seconds:
        report["seconds"] = time.perf_counter() - seconds["started"]
    pictures = {path.stem.capitalize(): path for path in sorted(run.glob("*.png")) if path.stem != "scatter"}
    write_report(run, report_of(report, split, seed), Page(f"Generated fields: {run.name}", pictures=pictures))
    return report


def judge(run: Path | str, *, split: str = "unseen", seed: int = 0) -> Report:
    """The report of a run, as `evaluate_fields` finds it."""
    return report_of(evaluate_fields(run, split=split, seed=seed), split, seed)


def report_of(found: Mapping[str, Any], split: str, seed: int) -> Report:
    """What was found of every kind in the form that all evaluations share; training data are the originals."""
    kinds = {
        {"training_data": "original"}.get(name, name): networks({each: [value] for each, value in measured.items()})
        for name, measured in found.items()
        if isinstance(measured, Mapping) and name != "held_out"
    }
    names = [name for name in BETTER if name in found["generated"]]
    facts = {name: value for name, value in found.items() if name.endswith("seconds")}
    return Report(
        experiment="fields", judge=f"beside {found['held_out']['num']} held-out data", split=split, seed=seed,
        better={name: BETTER[name] for name in names}, kinds=kinds, facts=facts,
        extras={"held_out": found["held_out"]},
    )  # fmt: skip


def _reference(task: FieldsTask, zoo: Zoo, config: Config, split: str) -> Reference:
    data = task.data
    require_for_choices(config, split)
    learned = learned_originals(zoo, config)
    fields = [zoo.state_dict(i) for i in learned]
    weights = stack(fields)
    held_out = torch.tensor([i for i, each in enumerate(data.splits) if each == split])
    return Reference(
        training=shown_by(task.sample(fields, data.size)),
        weights=FlatSpace(weights).flatten(weights),
        labels=torch.tensor([int(data.labels[zoo.entries[i].run]) for i in learned]),
        held_out=shown_by(data.values[held_out]),
        wanted=data.labels[held_out],
    )


def _judged(task: FieldsTask, config: Config) -> tuple[Tensor, Tensor]:
    """What the judge of classes learns from: the data of the splits that were learned from, and altered copies."""
    rows = torch.tensor([i for i, split in enumerate(task.data.splits) if split in config.train.splits])
    values, labels = task.data.values[rows], task.data.labels[rows]
    copies = range(min(task.config.altered, JUDGE_COPIES) + 1)
    altered = [alter(values, task.config, copy) if copy else values for copy in copies]
    return shown_by(torch.cat(altered)), labels.repeat(len(copies))


def _samples(
    run: Path, generator: Generator, task: FieldsTask, zoo: Zoo, reference: Reference, seed: int
) -> dict[str, list[Tensor]]:
    """The sets of every kind, what the fields show ``[N, F]``: generated, trained baselines that are there, trivial."""
    size, wanted = task.data.size, reference.wanted

    def drawn(source: Generator, number: int) -> Tensor:
        condition = wanted[:, None].float() if source.condition is not None else None
        made = source.generate(len(wanted), seed=seed + number, condition=condition)
        direct = VALUES in made[0]  # type: ignore[operator]
        return shown_by(torch.stack([each[VALUES] for each in made]) if direct else task.sample(made, size))  # type: ignore

    sets = range(NUM_SETS)
    samples = {"generated": [drawn(generator, number) for number in sets]}
    rng, space = make_rng(seed, "trivial"), FlatSpace(stack([zoo.state_dict(0)]))
    for _ in sets:
        for name, weights in trivial_weights(reference.weights, reference.labels, wanted, rng).items():
            samples.setdefault(name, []).append(shown_by(task.sample_stacked(space.unflatten(weights), size)))
        others = torch.randperm(len(reference.training), generator=rng)[: len(wanted)]
        samples.setdefault("training_data", []).append(reference.training[others])
    for name in baseline_configs(generator.config):
        if (run / name / "generator").is_dir():
            other = Generator.from_pretrained(run / name)
            samples[name] = [drawn(other, number) for number in sets]
    for name, some in samples.items():
        if len(some[0]) != len(wanted):
            raise InputError(f"there are fewer training data than held-out ones ({name}); hold fewer out")
    return samples


def print_fields(report: dict[str, Any], console: Console) -> None:
    """One row a kind."""
    columns = ("one_nna", "coverage", "mmd", "precision", "recall", "frechet", "class_accuracy", "nearest")
    rows = [
        [name.replace("_", " "), *(f"{found[each]:.3f}" if each in found else "" for each in columns)]
        for name, found in report.items()
        if isinstance(found, dict)
    ]
    heads = ("fields", *(column.replace("_", " ") for column in columns))
    console.print(FiguresTable(heads, rows, f"fields beside {report['held_out']['num']} held-out data"))
