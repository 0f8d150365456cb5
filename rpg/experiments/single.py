"""The steps of an experiment, each from its configuration: collect, evaluate, and the whole in a row."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rpg.config import Config
from rpg.evaluation.asking import Made
from rpg.evaluation.evaluate import evaluate, save_evaluation
from rpg.evaluation.network_merges import NetworkMerges
from rpg.evaluation.page.gather import write_html_report
from rpg.evaluation.results import EvaluationResult, Span
from rpg.evaluation.span import ZooSpan, measure_span
from rpg.evaluation.streamed import evaluate_streamed, score_span
from rpg.evaluation.two_sample import measure_two_sample
from rpg.evaluation.vectors import StateDict
from rpg.evaluation.workers import Workers
from rpg.generation.generator import Generator
from rpg.generation.sampler import join_processes
from rpg.planning.collection import plan_collection
from rpg.planning.guard import held_values
from rpg.tasks import Task, build_task, task_of
from rpg.tasks.base import Classifier, ImageTaskFamily, TaskFamily
from rpg.training.data import training_entries
from rpg.training.loop import train_to_the_end
from rpg.training.run_folder import saved_config
from tokenization.compressed.form import dense
from tokenization.errors import InputError
from tokenization.files import make_folder
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

Progress = Callable[[int, int], None]

KEPT_FOR_CHOICES = ("validation", "altered_validation")
"""Splits of a zoo that nothing is learned from where a choice is to be made."""

MOST_VALUES = 1 << 28
"""Values (1 GiB) of all networks together from which on an evaluation holds one at a time."""


def _filled(config: Config) -> Path | None:
    """The zoo that a collection may write; None for one that may only be read, as one that is whole may be."""
    zoo = Path(config.zoo)
    read_only = (zoo / "zoo.json").is_file() and not os.access(zoo, os.W_OK)
    return None if config.task is None or read_only else zoo


@locks(lambda config, **_: _filled(config))
def collect(config: Config, *, progress: Progress | None = None) -> Zoo:
    """Fill the zoo of ``config`` by its task; one that is partly filled is completed.

    Of several launched processes the first one works alone where the task does not share its work.

    Raises:
        InputError: the configuration has no task, or the zoo there is another task's.
    """
    if config.task is None:
        raise InputError(
            "the configuration has no task that trains checkpoints; name one, or make a zoo of your own checkpoints "
            "with `rpg collect --from FOLDER --zoo ZOO`"
        )
    task, path = build_task(config.task), Path(config.zoo)
    if isinstance(task, ImageTaskFamily):  # in as many processes as there is memory for
        planned = plan_collection(config)
        return task.collect(path, progress=progress, processes=planned.processes if planned is not None else None)
    if isinstance(task, TaskFamily) or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return task.collect(path, progress=progress)
    if join_processes()[0].rank == 0:
        task.collect(path, progress=progress)
    torch.distributed.barrier()
    return Zoo.open(path)


def for_choices(config: Config) -> Config:
    """The run to make choices by: this one, or where it learns from the validation split one that does not.

    That other run is ``<run>/choices``, trained on the remaining splits.

    Raises:
        InputError: no other split is trained on.
    """
    splits = tuple(each for each in config.train.splits if each not in KEPT_FOR_CHOICES)
    if splits == config.train.splits:
        return config
    if not splits:
        raise InputError("train.splits is [validation], which choices are made by; set train.splits=[train]")
    train = config.train.model_copy(update={"splits": splits})
    return config.model_copy(update={"train": train, "run": str(Path(config.run) / "choices")})


def require_for_choices(config: Config, split: str = "validation") -> None:
    """See to it that a run may be scored on a split. Raises InputError if it is for choices, and was learned from."""
    if split != "validation":
        return
    chosen = for_choices(config)
    if chosen is not config:
        raise InputError(
            f"{config.run} learns from the validation split, so that no choice can be made by it; train another "
            f"with --set 'train.splits=[{','.join(chosen.train.splits)}]' --set run={chosen.run}"
        )


def train_or_continue(config: Config, **options: Any) -> Path:
    """`train_to_the_end`; a run of this very configuration goes on where it stopped, another one is replaced."""
    same = saved_config(config.run) == config
    return train_to_the_end(config, resume=same, overwrite=not same, **options)


def generate_timed(generator: Generator, num: int, seed: int, **options: Any) -> tuple[list, float]:
    """``num`` networks in memory and the seconds each took, loading apart."""
    started = time.perf_counter()
    networks = generator.generate(num, seed=seed, **options)
    return networks, (time.perf_counter() - started) / num


@locks(lambda run, output=None, **_: output or existing(run))
def evaluate_run(
    run: Path | str,
    *,
    num: int | None = None,
    seed: int = 0,
    output: Path | str | None = None,
    workers: Workers | None = None,
) -> EvaluationResult:
    """Generate networks with the generator of a run, score them beside originals and baselines, write the results.

    ``evaluation.json`` holds every figure, ``scatter.png`` shows accuracy against similarity, and ``report.html`` is
    the whole as one page.

    Args:
        run: a run folder.
        num: networks to generate; the configuration's number when None.
        seed: decides everything random.
        output: where the results go; the run folder when None.
        workers: the processes that share the scoring; this one alone when None.

    Raises:
        InputError: the run has no generator, or its zoo no task to score with.
    """
    run, workers = Path(run), workers or Workers()
    generator = Generator.from_pretrained(run)
    config = generator.config
    zoo = Zoo.open(config.zoo)
    task = scoring_task(config, zoo)
    num = num or config.evaluate.num
    if held_values(config, generator.layout, len(zoo), num) > MOST_VALUES:
        if generator.layout.compressed is not None:
            raise InputError(
                f"{run}: pruned and quantised networks of this size are not scored; score fewer with --num"
            )
        networks, result = None, _evaluate_streamed(generator, zoo, task, num, seed, workers)
    else:
        networks, result = _evaluate_together(generator, zoo, task, num, seed, workers)
    if workers.is_first:
        folder = Path(output or run)
        make_folder(folder)
        save_evaluation(result, folder)
        write_html_report(run, result, generator, zoo, task, networks, num=num, seed=seed, output=folder)
    return result


def _evaluate_together(
    generator: Generator, zoo: Zoo, task: Classifier, num: int, seed: int, workers: Workers
) -> tuple[list[StateDict], EvaluationResult]:
    config = generator.config.evaluate
    networks, seconds = generate_timed(generator, num, seed)
    trained, held_out = parts_of(zoo, generator.config)
    originals, others = ([dense(zoo.state_dict(index)) for index in each] for each in (trained, held_out))
    form, stored = generator.layout.compressed, networks
    networks = [dict(dense(each)) for each in stored]  # baselines are made of what networks compute with
    runs = [zoo.entries[index].run for index in trained]
    result = evaluate(
        task, originals, networks, config, runs=runs, seed=seed, seconds_per_network=seconds, workers=workers,
        finish=form.again if form is not None else None,
    )  # fmt: skip
    two_sample = measure_two_sample(task, originals, networks, others, config.split, seed)
    span, asked = None, generator.asked(num, seed)
    if asked:
        place = zoo_span(generator, zoo, trained)
        if generator.config.generate.state == "stored":
            placed = place.place(stored if form is None else [form.expand(each) for each in stored])
            span = measure_span(place, placed, asked, result.generated.accuracy.mean)
        else:
            span = _stored_span(generator, place, task, asked, seed, workers)
    return networks, result.model_copy(update={"span": span, "two_sample": two_sample})


def _evaluate_streamed(
    generator: Generator, zoo: Zoo, task: Classifier, num: int, seed: int, workers: Workers
) -> EvaluationResult:
    trained, held_out = parts_of(zoo, generator.config)
    place, asked = zoo_span(generator, zoo, trained), generator.asked(num, seed)
    stored = generator.config.generate.state == "stored"
    share = generator.share(num, workers.partition)
    networks = generator.one_by_one(num, seed=seed, partition=workers.partition)
    result = evaluate_streamed(
        task,
        place,
        Made(num, share, networks, asked if stored else ()),
        generator.config.evaluate,
        held_out=[generator.layout.checkpoint(zoo, index) for index in held_out],
        seed=seed,
        merges=NetworkMerges(place.checkpoints, [zoo.entries[index].run for index in trained]),
        workers=workers,
    )
    if asked and not stored:
        span = _stored_span(generator, place, task, asked, seed, workers)
        result = result.model_copy(update={"span": span})
    return result


def _stored_span(
    generator: Generator, zoo: ZooSpan, task: Classifier, asked: Sequence[int], seed: int, workers: Workers
) -> Span | None:
    """Of networks with stored states, made for this alone where others are evaluated."""
    part, num, split = workers.partition, len(asked), generator.config.evaluate.split
    form = generator.layout.compressed
    if form is not None:  # placed in the form of their tokens, scored as they are stored
        stored = generator.generate(num, seed=seed, state="stored")
        right = task.predict(stored, split) == task.labels(split)  # type: ignore[arg-type]
        places = zoo.place([form.expand(each) for each in stored])  # type: ignore[arg-type]
        return measure_span(zoo, places, asked, right.double().mean().item())
    networks = generator.one_by_one(num, seed=seed, state="stored", partition=part)
    made = Made(num, generator.share(num, part), networks, asked)
    return score_span(task, zoo, made, split, workers)


def existing(run: Path | str) -> Path | None:
    """A run folder that is there; of one on the hub, or that is named by mistake, there is nothing to lock."""
    return Path(run) if Path(run).is_dir() else None


def parts_of(zoo: Zoo, config: Config) -> tuple[list[int], list[int]]:
    """The entries that the generator learned from, and the others."""
    trained = training_entries(zoo, config.train.splits)
    return trained, sorted(set(range(len(zoo))) - set(trained))


def zoo_span(generator: Generator, zoo: Zoo, trained: Sequence[int]) -> ZooSpan:
    """How networks lie among the checkpoints that a generator learned from."""
    checkpoints = [generator.layout.checkpoint(zoo, index) for index in trained]
    return ZooSpan(checkpoints, [layer.name for layer in generator.layout.layers])


def scoring_task(config: Config, zoo: Zoo) -> Classifier:
    """The task that scores checkpoints, of `find_task`.

    Raises:
        InputError: there is none, or it is a family of tasks, whose networks answer different questions.
    """
    task = find_task(config, zoo)
    if not isinstance(task, Classifier):
        command = "rpg unseen" if isinstance(task, ImageTaskFamily) else "rpg lora"
        raise InputError(f"{type(task).__name__} is a family of tasks, not a single one; score it with `{command}`")
    return task


def find_task(config: Config, zoo: Zoo) -> Task:
    """The configuration's own task, else the one recorded in the zoo. Raises InputError if there is none."""
    if config.task is None and zoo.task is None:
        raise InputError(
            f"neither the configuration nor {zoo.path} has a task that scores checkpoints; name one, or give a "
            "function of your own with --score package.module:function"
        )
    return task_of(zoo, config.task)


@locks(lambda config, **_: config.run)
def run_all(config: Config, *, progress: dict[str, Callable[..., None]], overwrite: bool = True) -> EvaluationResult:
    """Collect, train, generate and score.

    Args:
        config: the experiment.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss); ``watch``, as
            `rpg.training.loop.train` takes it.
        overwrite: discard an earlier run of the same folder.
    """
    collect(config, progress=progress.get("collect"))
    train_to_the_end(config, overwrite=overwrite, progress=progress.get("train"), watch=progress.get("watch"))
    return evaluate_run(config.run, workers=Workers(report=progress.get("score")))
