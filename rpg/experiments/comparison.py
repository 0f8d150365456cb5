"""Choosing a generator on validation data while it is trained, and several kinds of model side by side.

A diffusion that is no better than a regression has learned nothing. The test split and unseen tasks are never looked
at.

T tasks, C condition values, N networks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rpg.config import Config
from rpg.devices import single_threaded
from rpg.evaluation.judges import TaskScorer
from rpg.evaluation.report import Summary, shown, summarize
from rpg.experiments.single import find_task, require_for_choices
from rpg.generation.generator import Generator
from rpg.models import KernelRidgeConfig
from rpg.section import Section
from rpg.tasks.base import Classifier, TaskFamily
from rpg.training.data import training_entries
from rpg.training.loop import Stopped, TrainingProgress, WatchGenerator, train_to_the_end
from rpg.training.run_folder import RunFolder
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo


class Validation:
    """Scores some networks of a generator on validation data; never on the test split or unseen tasks.

    Args:
        num: networks to score, or tasks to make one for each; ``evaluate.num`` networks and all tasks when None.

    Attributes:
        of: ``validation tasks``; ``seen tasks`` where none is held out; ``validation images`` of a single task.
        wanted: the condition of each network, None without any.

    Raises:
        InputError: nothing scores the networks.
    """

    def __init__(self, config: Config, zoo: Zoo, num: int | None = None) -> None:
        self.task, self.seed, self.of = find_task(config, zoo), config.seed, "validation images"
        self.scorer = TaskScorer(self.task, "validation")
        self.wanted: Sequence[Sequence[float] | None] = [None] * (num or config.evaluate.num)
        kind = config.model.condition.kind
        if kind == "none" and not isinstance(self.task, TaskFamily):
            return
        if not isinstance(self.task, TaskFamily) or not kind == self.task.condition.kind in ("binary", "vector"):
            raise InputError(
                f"the task {type(self.task).__name__} scores no networks for these conditions on validation data "
                f"(model.condition.kind is {kind})"
            )
        held_out = zoo.subset("validation") if "validation" not in config.train.splits else []
        self.of = "validation tasks" if held_out else "seen tasks"
        places = held_out or training_entries(zoo, config.train.splits)
        self.wanted = list(dict.fromkeys(zoo.entries[place].condition for place in places))[:num]

    def scores(self, generator: Generator) -> tuple[str, Tensor]:
        """The name of the first metric, and its value for each network, float64."""
        condition = None if self.wanted[0] is None else torch.tensor(self.wanted)
        with single_threaded():
            networks = generator.one_by_one(len(self.wanted), seed=self.seed, condition=condition)
            found = [self.scorer(*each, "a network") for each in zip(networks, self.wanted, strict=True)]
        name = next(iter(found[0]))
        return name, torch.tensor([each[name] for each in found], dtype=torch.float64)

    def told(self, generator: Generator) -> str:
        """The mean of the first metric, in words."""
        name, values = self.scores(generator)
        seen = " on seen tasks" if self.of == "seen tasks" else ""
        return f"{name.replace('_', ' ')} {shown(values.mean().item(), name)}{seen}"


FILE = "compare.json"

RIVAL = "kernel_ridge"
"""The rival's run folder, inside that of the configured generator."""


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
    progress: TrainingProgress | None = None,
    watch: WatchGenerator | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Path, Comparison | None]:
    """Train the configured generator, and kernel ridge in ``<run>/kernel_ridge``; write ``<run>/compare.json``.

    Kernel ridge has the same zoo, tokens and condition. Given a condition its networks are the regression's mean
    (``generate.temperature: 0``), which is what is as accurate as it can be; without one they are draws.

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
    validation = validation_of(config, zoo)
    RunFolder(config.run).check(config, resume=resume, overwrite=overwrite)
    how: Any = {"resume": resume, "overwrite": overwrite, "progress": progress, "watch": watch, "say": say}
    try:
        folder = train_to_the_end(config, **how)
    except Stopped as stopped:
        return stopped.folder, None
    folders = (folder, train_to_the_end(rival, overwrite=True, say=say))
    metrics = [validation.scores(Generator.from_pretrained(each))[1] for each in folders]
    comparison = compare(validation.of, config.model.kind, *metrics, seed=config.seed)
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


def compare(of: str, model: str, configured: Tensor, kernel_ridge: Tensor, *, seed: int) -> Comparison:
    """Compare the accuracies ``[N]`` of two generators, in 0 … 1; ``seed`` decides the bootstrap."""
    difference = summarize(configured - kernel_ridge, seed)
    means = {"configured": summarize(configured, seed), "kernel_ridge": summarize(kernel_ridge, seed)}
    better = {0: "neither", 1: "configured", -1: "kernel_ridge"}[(difference.mean > 0) - (difference.mean < 0)]
    found = {"of": of, "num": len(configured), "model": model, **means, "difference": difference, "better": better}
    return Comparison.model_validate(found)


def validation_of(config: Config, zoo: Zoo) -> Validation:
    """The validation that compares generators: a network for each validation task, or ``evaluate.num`` networks.

    Raises:
        InputError: there is no task that scores, no validation split, or it is trained on.
    """
    if config.model.condition.kind != "none":
        require_for_choices(config)
    found = Validation(config, zoo)
    if found.of == "seen tasks":
        raise InputError(f"{zoo.path} has no task of split 'validation' to compare on; set task.validation")
    if not isinstance(found.task, TaskFamily | Classifier):
        raise InputError(f"the task {type(found.task).__name__} gives no accuracy, which --compare needs; leave it out")
    return found
