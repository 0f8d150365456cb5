"""The steps of an experiment, each from its configuration: collect, evaluate, and the whole in a row."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rpg.config import Config
from rpg.evaluation.evaluate import evaluate, save_evaluation
from rpg.evaluation.report.gather import write_html_report
from rpg.evaluation.results import EvaluationResult
from rpg.generation.generator import Generator
from rpg.tasks import build_task, task_of
from rpg.tasks.base import Classifier, ImageTaskFamily
from rpg.training.loop import train
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

Progress = Callable[[int, int], None]


def collect(config: Config, *, progress: Progress | None = None) -> Zoo:
    """Fill the zoo of ``config`` by its task; one that is partly filled is completed.

    Raises:
        InputError: the configuration has no task, or the zoo there is another task's.
    """
    if config.task is None:
        raise InputError(
            "task",
            "none",
            "a task that trains checkpoints",
            "make a zoo of your own checkpoints with `rpg collect --from FOLDER --zoo ZOO`",
        )
    return build_task(config.task).collect(Path(config.zoo), progress=progress)


def generate_timed(generator: Generator, num: int, seed: int, **options: Any) -> tuple[list, float]:
    """``num`` networks in memory and the seconds each took, loading apart."""
    started = time.perf_counter()
    networks = generator.generate(num, seed=seed, **options)
    return networks, (time.perf_counter() - started) / num


def evaluate_run(run: Path | str, *, num: int | None = None, seed: int = 0) -> EvaluationResult:
    """Generate networks with the generator of a run, score them beside originals and baselines, write the results.

    ``<run>/evaluation.json`` holds every figure, ``<run>/scatter.png`` shows accuracy against similarity, and
    ``<run>/report.html`` is the whole as one page.

    Raises:
        InputError: the run has no generator, or its zoo no task to score with.
    """
    run = Path(run)
    generator = Generator.from_pretrained(run)
    config = generator.config
    zoo = Zoo.open(config.zoo)
    task = scoring_task(config, zoo)
    num = num or config.evaluate.num
    networks, seconds = generate_timed(generator, num, seed)
    indices = zoo.subset("train")
    result = evaluate(
        task,
        [zoo.state_dict(index) for index in indices],
        networks,
        config.evaluate,
        runs=[zoo.entries[index].run for index in indices],
        seed=seed,
        seconds_per_network=seconds,
    )
    save_evaluation(result, run)
    write_html_report(run, result, generator, zoo, task, networks, num=num, seed=seed)
    return result


def scoring_task(config: Config, zoo: Zoo) -> Classifier:
    """The task that scores checkpoints: the configuration's own, else the one recorded in the zoo.

    Raises:
        InputError: there is none, or it is a family of tasks, whose networks answer different questions.
    """
    if config.task is None and zoo.task is None:
        raise InputError(
            str(zoo.path), "no task", "one that scores checkpoints", "score the generated files with code of your own"
        )
    task = build_task(config.task) if config.task is not None else task_of(zoo)
    if not isinstance(task, Classifier):
        command = "rpg unseen" if isinstance(task, ImageTaskFamily) else "rpg lora"
        raise InputError("task.name", type(task).__name__, "a single task", f"score a family of tasks with `{command}`")
    return task


def run_all(config: Config, *, progress: dict[str, Callable[..., None]], overwrite: bool = True) -> EvaluationResult:
    """Collect, train, generate and score.

    Args:
        config: the experiment.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss).
        overwrite: discard an earlier run of the same folder.
    """
    collect(config, progress=progress.get("collect"))
    train(config, overwrite=overwrite, progress=progress.get("train"))
    return evaluate_run(config.run)
