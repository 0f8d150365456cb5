"""Networks generated from a few examples, labelled or not, compared with other uses of the same examples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rpg.evaluation.page.page import Page, write_report
from rpg.evaluation.report import Curve, Networks, Report, networks
from rpg.experiments.calibration import error_by_distance
from rpg.experiments.example_sets import ExampleSets
from rpg.experiments.few_examples import FewExamples
from rpg.experiments.single import existing
from rpg.generation.generator import Generator
from rpg.tasks import build_task
from rpg.tasks.collecting import single_threaded
from rpg.tasks.sensors.sensors import BASE
from rpg.tasks.side_by_side import Stacked, stack
from rpg.training.data import training_entries, zoo_conditions
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

PER_CLASS = (1, 2, 5, 10, 20)
"""Examples of each class."""


@locks(lambda run, split="test", **_: None if split == "validation" else existing(run))
def evaluate_by_examples(
    run: Path | str, *, seed: int = 0, split: str = "test", compare: bool = True, **_: Any
) -> Report:
    """Score networks for unseen tasks by the number of examples a class, and everything simpler.

    Args:
        run: a run of ``model.condition.kind: examples`` without codes.
        seed: decides the examples and all that is random.
        split: ``test``: unseen tasks and test images; ``validation``: validation tasks and images.
        compare: whether the rivals are trained and scored, too.
    """
    started = time.perf_counter()
    generator = Generator.from_pretrained(run)
    zoo, task = Zoo.open(generator.config.zoo), build_task(generator.config.task)  # type: ignore[arg-type]
    with single_threaded():
        sets = {
            name: ExampleSets(task, zoo_conditions(zoo, zoo.subset(name)), "test" if name == "unseen" else name, seed)
            for name in ("validation", "unseen")
        }
        wanted, tuning = sets["validation" if split == "validation" else "unseen"], sets["validation"]
        seen = training_entries(zoo, generator.config.train.splits)
        rivals = FewExamples(
            task, zoo_conditions(zoo, seen), stack([zoo.state_dict(i) for i in seen]), load_file(zoo.path / BASE), seed
        )
        kinds: dict[int, dict[str, Networks]] = {}
        for number in PER_CLASS:
            num = number * wanted.num_classes
            found: dict[str, Networks] = {}
            for name, labelled in (("generated", True), ("generated_unlabelled", False)):
                found[name] = rivals.scored(wanted, asked(generator, wanted, num, labelled, seed))
            for name, method in rivals.methods.items() if compare else ():
                found[name] = rivals.scored(wanted, method[0](wanted, num, rivals.tuned(name, tuning, num)))
            if compare:
                found["logistic_regression"] = networks(
                    {"accuracy": rivals.logistic_regression(wanted, num)}, seed=seed
                )
            kinds[number] = found
        names = zoo.subset("validation" if split == "validation" else "unseen")
        trained = rivals.scored(wanted, stack([zoo.state_dict(i) for i in names]))
        wrong = 1 - torch.tensor(kinds[PER_CLASS[0]]["generated"].metrics["accuracy"])
        calibration, extras = error_by_distance(generator, wanted.rows(PER_CLASS[0] * wanted.num_classes, True), wrong)
    kinds = {number: {**found, "original": trained} for number, found in kinds.items()}
    report = Report(
        experiment="examples", judge="sensors", split=split, seed=seed, better={"accuracy": "more", "joint": "less"},
        kinds=kinds[PER_CLASS[0]],
        parts={f"{number} examples a class": found for number, found in kinds.items() if number != PER_CLASS[0]},
        references=("original", "generated_unlabelled"),
        asked={"examples a class": PER_CLASS[0]},
        curves={"Accuracy by examples": _curve(kinds), **calibration},
        extras=extras,
        facts={
            **generator.facts, "processor milliseconds a network": _milliseconds(generator, wanted, seed),
            "seconds": round(time.perf_counter() - started, 1),
        },
    )  # fmt: skip
    if split == "test":
        write_report(run, report, Page("Networks asked for by examples"))
    return report


def asked(generator: Generator, sets: ExampleSets, num: int, labelled: bool, seed: int) -> Stacked:
    """A network for every task of ``num`` examples, ``[T, *shape]``."""
    rows = sets.rows(num, labelled)
    return stack(generator.generate(len(rows), seed=seed, condition=rows))  # type: ignore[arg-type]


def _milliseconds(generator: Generator, sets: ExampleSets, seed: int) -> dict[str, float]:
    """Of the processor for a network by one labelled example a class: all sets together, and one by one (median)."""
    rows, times = sets.rows(sets.num_classes, True), []
    for request in (rows, *(rows[number % len(rows)] for number in range(100))):
        started = time.process_time()
        generator.generate(len(rows) if request is rows else 1, seed=seed, condition=request)
        times.append(1000 * (time.process_time() - started))
    return {"together": round(times[0] / len(rows), 2), "singly": round(statistics.median(times[1:]), 2)}


def _curve(kinds: Mapping[int, Mapping[str, Networks]]) -> Curve:
    names = list(next(iter(kinds.values())))

    def mean(found: Networks) -> float | None:
        summary = found.summaries["accuracy"]
        return summary.mean if summary else None

    lines = {name: tuple(mean(found[name]) for found in kinds.values()) for name in names}
    return Curve(x=tuple(map(float, kinds)), lines=lines, across="examples a class", up="accuracy", log=True)
