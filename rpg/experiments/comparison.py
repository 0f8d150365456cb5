"""Train the configured generator beside kernel ridge, and say which of the two is better on validation data.

A user wants the best networks, whoever writes them, and a diffusion that is no better than a regression has learned
nothing. The test split and unseen tasks are never looked at.

T tasks, C condition values, N networks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.metrics import Summary, accuracy, summarize
from rpg.experiments.single import find_task, require_for_choices
from rpg.experiments.task_methods import generate_for
from rpg.generation.generator import Generator
from rpg.models import KernelRidgeConfig
from rpg.section import Section
from rpg.tasks.base import Classifier, TaskFamily
from rpg.tasks.collecting import single_threaded
from rpg.training.loop import Progress, Watch, train
from rpg.training.run_folder import RunFolder
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

FILE = "compare.json"

RIVAL = "kernel_ridge"
"""The rival's run folder, inside that of the configured generator."""

Scores = Callable[[Generator], Tensor]


class Comparison(Section):
    """What ``compare.json`` holds.

    ``difference`` is the configured generator's accuracy less kernel ridge's, task by task or network by network.
    """

    of: Literal["validation tasks", "validation images"]
    num: int
    model: str
    configured: Summary
    kernel_ridge: Summary
    difference: Summary
    better: Literal["configured", "kernel_ridge", "neither"]

    def line(self) -> str:
        """The result in one line."""
        what = f"{self.num} {self.of}" if self.of == "validation tasks" else f"{self.of}, {self.num} networks each"
        means = f"{what}: {self.model} {self.configured.mean:.2%}, kernel ridge {self.kernel_ridge.mean:.2%}"
        if self.better == "neither":
            return f"{means}; neither is better"
        name, sign = (self.model, 100) if self.better == "configured" else ("kernel ridge", -100)
        low, high = sorted(sign * bound for bound in self.difference.ci95)
        points = sign * self.difference.mean
        return f"{means}; {name} is better by {points:.2f} points (95 % interval {low:.2f} to {high:.2f})"


@locks(lambda config, **_: config.run)
def train_and_compare(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Path, Comparison | None]:
    """Train the configured generator, and kernel ridge in ``<run>/kernel_ridge``; write ``<run>/compare.json``.

    Kernel ridge has the same zoo, tokens and condition. Given a condition its networks are the regression's mean
    (``generate.temperature: 0``), which is what is as accurate as it can be; without one they are draws.

    Args:
        config, resume, overwrite, progress, watch, say: as of `rpg.training.loop.train`.

    Returns:
        The configured generator's folder and the comparison; None if the run was stopped before its end.

    Raises:
        InputError: nothing scores the networks on validation data, or as `rpg.training.loop.train`. What is known
            beforehand is said before anything is trained.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--compare works in one process; train with several, then compare with a run of one")
    zoo = Zoo.open(config.zoo)
    rival = rival_of(config)
    of, scores = validation_scores(config, zoo)
    RunFolder(config.run).check(config, resume=resume, overwrite=overwrite)
    stopped = False

    def advance(done: int, total: int, loss: float) -> None:
        nonlocal stopped
        stopped = done < total
        if progress is not None:
            progress(done, total, loss)

    folder = train(config, resume=resume, overwrite=overwrite, progress=advance, watch=watch, say=say)
    if stopped:
        return folder, None
    figures = [scores(Generator.from_pretrained(each)) for each in (folder, train(rival, overwrite=True, say=say))]
    comparison = compare(of, config.model.kind, *figures, seed=config.seed)
    plain = comparison.model_dump(mode="json")
    write_text(Path(config.run) / FILE, json.dumps(plain, indent=1, allow_nan=False) + "\n")
    return folder, comparison


def rival_of(config: Config) -> Config:
    """The configuration of kernel ridge for the same zoo. Raises InputError if ``config`` is kernel ridge already."""
    if config.model.kind == "kernel_ridge":
        raise InputError("model.kind is kernel_ridge, which --compare compares with; name another, or leave it out")
    condition = config.model.condition
    changes: dict[str, object] = {"sampler": None}
    if condition.kind != "none":
        changes["temperature"] = 0.0
    return config.model_copy(
        update={
            "run": str(Path(config.run) / RIVAL),
            "model": KernelRidgeConfig(condition=condition),
            "generate": config.generate.model_copy(update=changes),
        }
    )


def compare(
    of: Literal["validation tasks", "validation images"],
    model: str,
    configured: Tensor,
    kernel_ridge: Tensor,
    *,
    seed: int,
) -> Comparison:
    """Compare the accuracies ``[N]`` of two generators, in 0 … 1; ``seed`` decides the bootstrap."""
    difference = summarize(configured - kernel_ridge, seed)
    sides = {0: "neither", 1: "configured", -1: "kernel_ridge"}
    return Comparison.model_validate(
        {
            "of": of,
            "num": len(configured),
            "model": model,
            "configured": summarize(configured, seed),
            "kernel_ridge": summarize(kernel_ridge, seed),
            "difference": difference,
            "better": sides[(difference.mean > 0) - (difference.mean < 0)],
        }
    )


def validation_scores(config: Config, zoo: Zoo) -> tuple[Literal["validation tasks", "validation images"], Scores]:
    """What generators are compared by, and a function that gives a generator's accuracies ``[N]``.

    Of a family of tasks: one network for each task of the zoo's validation split, on validation images or rows. Of a
    single task: ``evaluate.num`` networks on validation images.

    Raises:
        InputError: there is no task that scores, no validation split, or it is trained on.
    """
    task = find_task(config, zoo)
    if isinstance(task, TaskFamily):
        return "validation tasks", _of_tasks(config, zoo, task)
    if isinstance(task, Classifier) and config.model.condition.kind == "none":
        return "validation images", _of_images(config, task)
    raise InputError(
        f"The task {type(task).__name__} cannot score networks for conditions (model.condition.kind is "
        f"{config.model.condition.kind}), so --compare cannot; leave it out."
    )


def _of_tasks(config: Config, zoo: Zoo, task: TaskFamily) -> Scores:
    kind = config.model.condition.kind
    if kind != "binary" or task.condition.kind != "binary":
        raise InputError(
            f"--compare asks for a network of each validation task by its bits, but model.condition.kind is {kind} and "
            f"the task's is {task.condition.kind}; set both to binary, or leave --compare out"
        )
    require_for_choices(config)
    found = dict.fromkeys(zoo.entries[index].condition for index in zoo.subset("validation"))
    if not found:
        raise InputError(f"{zoo.path} has no task of split 'validation' to compare on; set task.validation")
    bits = torch.tensor(list(found)).long()  # [T, C]

    def scores(generator: Generator) -> Tensor:
        with single_threaded():
            return task.accuracies(generate_for(generator, bits, config.seed), bits, "validation").double()

    return scores


def _of_images(config: Config, task: Classifier) -> Scores:
    labels = task.labels("validation")

    def scores(generator: Generator) -> Tensor:
        networks = generator.one_by_one(config.evaluate.num, seed=config.seed)
        return accuracy(task.predict(networks, "validation"), labels)

    return scores
