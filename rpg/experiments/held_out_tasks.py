"""The experiment on unseen tasks: collect, train, generate for tasks nobody trained, compare, report.

It serves any family of binary tasks: networks for groups of image classes, and adapters of a language model.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.diversity import Diversity, measure_diversity
from rpg.evaluation.held_out import (
    SplitScores,
    base_summed,
    choose_regressions,
    score_split,
    worst_tasks,
)
from rpg.evaluation.held_out_plots import plot_distance, plot_parameters
from rpg.evaluation.linear_head import LinearHead, LinearHeadTraining, tune_linear_head
from rpg.evaluation.per_task import measure_per_task
from rpg.evaluation.task_networks import Parts, TaskNetworks
from rpg.evaluation.workers import Workers
from rpg.experiments.held_out_table import headline
from rpg.experiments.single import collect, existing, require_for_choices
from rpg.experiments.task_methods import Methods, as_many, networks_of, parts_for, untrained
from rpg.generation.generator import Generator
from rpg.tasks import build_task
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.collecting import single_threaded
from rpg.training.loop import train_to_the_end
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

NUM_DIVERSITY_TASKS, NUM_DRAWS = 50, 5


@locks(lambda config, **_: config.run)
def run_held_out(
    config: Config, *, progress: dict[str, Callable[..., None]], seeds: int = 1, workers: Workers | None = None
) -> dict[str, Any]:
    """Collect, train and compare; with several seeds, generators differ by seed and the zoo is shared.

    Args:
        config: the experiment.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss); ``watch``, as
            `rpg.training.loop.train` takes it.
        seeds: generators to train: ``config.seed``, the next, …; all but the first in ``<run>/seed-N``.
        workers: the processes that share the scoring; this one alone when None.

    Returns:
        The report of the first seed, with the figures of all seeds under ``seeds``; it is what
        ``<run>/evaluation.json`` holds.

    Raises:
        InputError: the task is no family of binary tasks, or has none for choices or none that is unseen.
    """
    _require_splits(task_family(config))
    started = time.perf_counter()
    collect(config, progress=progress.get("collect"))
    collected = time.perf_counter() - started
    reports = []
    for number in range(seeds):
        run = config.run if number == 0 else str(Path(config.run) / f"seed-{config.seed + number}")
        each = config.model_copy(update={"seed": config.seed + number, "run": run})
        train_to_the_end(each, overwrite=True, progress=progress.get("train"), watch=progress.get("watch"))
        reports.append(evaluate_held_out(run, seed=each.seed, workers=workers))
    report = {**reports[0], "collect_seconds": collected, "seconds": time.perf_counter() - started}
    report["seeds"] = [headline(each) for each in reports]
    if workers is None or workers.is_first:
        _write(Path(config.run), report)
    return report


@locks(lambda run, split="test", **_: None if split == "validation" else existing(run))
def evaluate_held_out(
    run: Path | str, *, seed: int = 0, split: str = "test", workers: Workers | None = None
) -> dict[str, Any]:
    """Generate a network for every task and compare with what is trivial.

    Writes ``<run>/evaluation.json``, and of a family of image tasks ``distance.png`` and ``parameters.png``.
    Regressions and averages are made of the networks as the generator's layout cuts them: LoRA pairs in canonical form.
    Networks are made, scored and dropped some at a time; of large ones, and to choose by, no more seen tasks are scored
    than unseen ones.

    Args:
        run: a run folder.
        seed: decides the generated networks.
        split: images or rows to score on; ``validation`` scores on validation tasks in place of the unseen ones, and
            writes nothing.
        workers: the processes that share the tasks; this one alone when None.

    Raises:
        InputError: the run is not one of a family of binary tasks, or has learned what choices are to be made by.
    """
    run, choosing, workers = Path(run), split == "validation", workers or Workers()
    generator = Generator.from_pretrained(run)
    config, zoo, task = generator.config, Zoo.open(generator.config.zoo), task_family(generator.config)
    require_for_choices(config, split)
    networks = {each: networks_of(zoo, each, generator.layout) for each in ("train", "validation")}
    seen = _joined(networks) if "validation" in config.train.splits else networks["train"]
    wanted = {"unseen": networks["validation"] if choosing else networks_of(zoo, "unseen", generator.layout)}
    wanted["seen"] = as_many(seen, len(wanted["unseen"].bits)) if seen.is_large or choosing else seen
    scored: dict[str, SplitScores] = {}
    with contextlib.nullcontext() if seen.is_large else single_threaded():
        chosen = choose_regressions(task, networks["train"], networks["validation"], workers)
        shown = chosen if isinstance(task, ImageTaskFamily) else ("ridge", "kernel_ridge")
        regressions = {name: chosen[name][0] for name in shown}
        methods = Methods(generator, zoo, seen, regressions, task, seed, workers.partition)
        head, tried = _linear_head(config, zoo, task, networks, seen.bits, workers)
        for name, originals in wanted.items():
            rows = methods.rows(len(originals.bits))
            mine = originals.bits[rows]
            extra: dict[str, Parts] = untrained(task, zoo, mine, originals.part_size) if rows else {}
            if head is not None and rows:
                extra["linear_head"] = [{key: value.detach() for key, value in head(mine).items()}]
            made = methods.networks(originals, name == "seen", extra)
            scored[name] = score_split(task, made, originals.bits, seen.bits, split, workers, rows)
        report = _report(generator, zoo, task, scored, split, seed)
        report["regressions"] = {name: {**asdict(each), "validation_accuracy": a} for name, (each, a) in chosen.items()}
        report |= {"linear_head": tried} if tried else {}
        if isinstance(task, ImageTaskFamily):
            known = {name: each.probabilities for name, each in scored["unseen"].kept.items()}
            per_task = measure_per_task(task, known, wanted["unseen"].bits, split, seed)
            report["per_task"] = per_task and per_task.model_dump(mode="json")
        if choosing:
            return report
        if isinstance(task, ImageTaskFamily):
            spread = diversity(generator, task, wanted["unseen"].bits, seen, seed, workers)
            report["diversity"] = spread.model_dump(mode="json")
    if workers.is_first:
        if isinstance(task, ImageTaskFamily):
            _plot(run, scored)
        _write(run, report)
    return report


def _require_splits(task: TaskFamily) -> None:
    """Raise InputError, before anything is trained, where the comparison would have no task of some split."""
    splits = task.splits()
    unseen = "task.held_out" if isinstance(task, ImageTaskFamily) else "task.unseen"
    for split, field in (("unseen", unseen), ("validation", "task.validation")):
        if split not in splits:
            raise InputError(f"no task has the split {split!r}, which the comparison needs; set {field}")


def _joined(networks: Mapping[str, TaskNetworks]) -> TaskNetworks:
    return networks["train"].join(networks["validation"])


def _linear_head(
    config: Config, zoo: Zoo, task: TaskFamily, networks: Mapping[str, TaskNetworks],
    seen: Tensor, workers: Workers,
) -> tuple[LinearHead | None, dict[str, float]]:  # fmt: skip
    """The linear head of all ``seen`` tasks, and how it was tuned; none where the generator saw no images."""
    settings = config.train.behaviour
    if not isinstance(task, ImageTaskFamily) or settings is None or not config.evaluate.linear_head:
        return None, {}
    training = LinearHeadTraining(
        config.train.steps, config.train.batch_size, settings.images, config.seed,
        task.teacher(zoo) if settings.target == "base" else None,
    )  # fmt: skip
    tasks = networks["train"].bits, networks["validation"].bits, seen
    head, rate, accuracy = tune_linear_head(task, task.base_network(zoo), *tasks, training, workers)
    return head, {"learning_rate": rate, "validation_accuracy": accuracy}


def _plot(run: Path, scored: Mapping[str, SplitScores]) -> None:
    unseen = scored["unseen"]
    plot_distance({name: unseen.first(name) for name in unseen.figures}, unseen.hamming_to_seen, run / "distance.png")
    kept = {name: scored[name].kept for name in ("seen", "unseen")}
    heads = {name: (each["original"].head, each["generated"].head) for name, each in kept.items()}
    plot_parameters(heads, run / "parameters.png")


def diversity(
    generator: Generator, task: ImageTaskFamily, bits: Tensor, seen: TaskNetworks, seed: int,
    workers: Workers | None = None, **options: Any,
) -> Diversity:  # fmt: skip
    """Several networks for each of some unseen tasks; ``options`` as :meth:`Generator.one_by_one` takes them."""
    workers, bits = workers or Workers(), bits[:NUM_DIVERSITY_TASKS]
    rows = generator.share(len(bits), workers.partition)
    seeds = [1000 * (seed + 1) + number for number in range(NUM_DRAWS)]
    draws = [parts_for(generator, bits, each, partition=workers.partition, **options) for each in seeds]
    return measure_diversity(task, draws, bits, seen.spread(), "test", workers, rows)


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
    generator: Generator, zoo: Zoo, task: TaskFamily, scored: Mapping[str, SplitScores], split: str, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What every family reports, and of image tasks the summed base network and the worst tasks."""
    report: dict[str, Any] = {}
    probabilities = task.base_probabilities(zoo, split) if isinstance(task, ImageTaskFamily) else torch.empty(0)
    for name, scores in scored.items():
        more = {}
        if isinstance(task, ImageTaskFamily):
            summed = base_summed(task, probabilities, scores.bits, split)
            scores.figures["base_summed"] = {"accuracy": summed}
            more["worst"] = worst_tasks(task, scores.kept["generated"].probabilities, scores.bits, split)
        report[name] = scores.methods(seed)
        report[f"{name}_tasks"] = scores.tasks() | more
    means = {name: scored["unseen"].first(name).mean().item() for name in ("generated", "original")}
    report["share_of_originals"] = means["generated"] / means["original"]
    report |= {"seed": generator.config.seed, "train_seconds": generator.facts.get("training seconds")}
    return {**report, "facts": generator.facts}


def _write(run: Path, report: dict[str, Any]) -> None:
    write_text(run / "evaluation.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
