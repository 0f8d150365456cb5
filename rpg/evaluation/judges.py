"""Scorers of networks: a task, or a user's function.

A metric is a number with a name; of several the first one counts. More is better, unless the name speaks of what should
be small (`SMALL`) or the user says otherwise.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rpg.evaluation.field_measures import sample_metrics
from rpg.evaluation.report import accuracy
from rpg.generation.folders import WEIGHTS_NAME, write_side_files
from rpg.tasks import load_callable
from rpg.tasks.base import (
    AdapterScorer,
    Classifier,
    ImageTaskFamily,
    LogitTask,
    MetricsTask,
    SampleTask,
    Task,
    TaskFamily,
)
from rpg.tasks.images.networks import answers
from rpg.tasks.side_by_side import Stacked, alone
from tokenization.checkpoint.checkpoint import StateDict, save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec

Metrics = dict[str, float]
SMALL = re.compile(r"(^|_)(loss|error|errors|perplexity|nll|bpc|mse|rmse|mae|wer|cer|fid|nna|mmd|frechet|regret)($|_)")
"""Names of metrics of which less is better, as whole words between underscores."""

PATHS = re.compile(r"(^|_)(path|file|filename|folder)$")
"""Names of a parameter that takes a path."""


@dataclass(frozen=True)
class Answer:
    """A judge's result for one network.

    Attributes:
        predictions: classes of the images ``[B]``, of classifiers.
        probabilities: of the classes ``[B, classes]``, of classifiers that give logits.
    """

    metrics: Metrics
    predictions: Tensor | None = None
    probabilities: Tensor | None = None


class Scorer(Protocol):
    """Gives a network its metrics."""

    @property
    def name(self) -> str:
        """Its name in reports."""

    def __call__(self, network: StateDict, condition: Sequence[float] | None, where: str) -> Metrics:
        """The metrics of a network that was made for ``condition``; ``where`` names it in errors."""


class OwnScorer:
    """A function of the user's.

    Args:
        function: takes a state dict, or the path of a checkpoint if its first parameter is annotated with ``Path`` or
            ``str`` or is named so (``path``, ``file``, ``folder``); of a second parameter that is called ``condition``
            also what the network was made for. Returns a number, or a dict of numbers.
        adapter: text of PEFT's ``adapter_config.json``, of adapters: a path is then that of a PEFT folder.

    Raises:
        InputError: it takes no network.
    """

    def __init__(self, function: Callable[..., Any], name: str, adapter: str | None = None) -> None:
        self.function, self.name, self.adapter = function, name, adapter
        self.label = re.sub(r"\W", "_", getattr(function, "__name__", "score")).strip("_") or "score"
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # compiled ones need not say
            parameters = []
        if not parameters:
            raise InputError(f"--score {name} takes no argument; write it with one, a state dict or a path")
        self.takes_path = _is_path(parameters[0])
        self.takes_condition = any(each.name == "condition" for each in parameters[1:])

    def __call__(self, network: StateDict, condition: Sequence[float] | None, where: str) -> Metrics:
        """The function's metrics of a network. Raises InputError if it fails or returns no numbers."""
        if self.takes_path:
            with self._written(network) as path:
                return self.of(path, condition, where)
        return self.of(dict(network), condition, where)

    def of(self, network: Any, condition: Sequence[float] | None, where: str) -> Metrics:
        """The metrics of what the function takes, a path or a state dict. Raises InputError as a call does."""
        more = {"condition": condition} if self.takes_condition else {}
        try:
            found = self.function(network, **more)
        except InputError:
            raise
        except Exception as error:  # the function is not ours
            place = _place(error)
            raise InputError(
                f"--score {self.name} failed on {where}{place}: {type(error).__name__}: {error}"
            ) from error
        return self._metrics(found, where)

    @contextlib.contextmanager
    def _written(self, network: StateDict) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="rpg-score-") as folder:
            if self.adapter is None:
                path = Path(folder) / "network.safetensors"
                save_checkpoint(path, network)
                yield path
                return
            path = Path(folder) / "network"
            path.mkdir()
            save_checkpoint(path / WEIGHTS_NAME, network)
            write_side_files(path, self.adapter, {})
            yield path

    def _metrics(self, found: Any, where: str) -> Metrics:
        values = found if isinstance(found, Mapping) else {self.label: found}
        try:
            metrics = {str(name): float(value) for name, value in values.items()}
        except (TypeError, ValueError):
            metrics = {}
        if not metrics:
            raise InputError(
                f"--score {self.name} returned {type(found).__name__} for {where}; return a number or a dict of numbers"
            )
        return metrics


class TaskScorer:
    """Scores networks by a task, on one split of its data; in a family, by the task that the network was made for.

    An adapter that was made for no particular task gets the mean over all of them.

    Args:
        names: what the zoo calls its classes or texts, by whose places conditions are told.

    Raises:
        InputError: the task scores no network.
    """

    def __init__(self, task: Task, split: str, names: Sequence[str] = ()) -> None:
        if not isinstance(task, MetricsTask | SampleTask | Classifier | AdapterScorer | TaskFamily):
            raise InputError(f"{type(task).__name__} scores no single network; give a function of your own (--score)")
        self.task, self.split, self.names = task, split, names
        self.name = f"{type(task).__name__}, {split} data"

    def __call__(self, network: StateDict, condition: Sequence[float] | None, where: str) -> Metrics:
        """Its metrics. Raises InputError if the network does not fit the task."""
        if isinstance(self.task, MetricsTask):
            return self.task.own_metrics(network, self.split)
        if isinstance(self.task, SampleTask):
            return sample_metrics(self.task, network, self.split)
        if isinstance(self.task, Classifier):
            predictions = self.task.predict([network], self.split)
            return {"accuracy": accuracy(predictions, self.task.labels(self.split)).item()}
        if (answers := self.of_family(alone(network), [condition])) is not None:
            return answers[0].metrics
        if not isinstance(self.task, AdapterScorer):
            raise InputError(f"{where} was made for no task of {type(self.task).__name__}; train with a condition")
        tasks = self.task.score(network, self.split)
        names = next(iter(tasks.values()))
        return {name: sum(each[name] for each in tasks.values()) / len(tasks) for name in names}

    def of_family(
        self, part: Stacked, conditions: Sequence[Sequence[float] | None], keep: bool = False
    ) -> list[Answer] | None:
        """Answers of T networks, scored together, each at the task of its condition; None without family or conditions.

        Args:
            keep: the probabilities of image tasks.
        """
        if not isinstance(self.task, TaskFamily) or isinstance(self.task, MetricsTask | SampleTask | Classifier):
            return None
        spec, given = self.task.condition, [each for each in conditions if each is not None]
        if len(given) < len(conditions):
            return None
        asked, probabilities = torch.stack([self._asked(spec, each) for each in given]), None
        if keep and isinstance(self.task, ImageTaskFamily):
            probabilities = self.task.probabilities(part, self.split)
            right = probabilities.argmax(-1) == self.task.targets(asked, self.split)
            scores: Mapping[str, Tensor] = {"accuracy": right.double().mean(1)}
        else:
            scores = self.task.scores(part, asked, self.split)
        return [
            Answer(
                {name: values[row].item() for name, values in scores.items()}, None,
                None if probabilities is None else probabilities[row].clone(),
            )
            for row in range(len(given))
        ]  # fmt: skip

    def _asked(self, spec: ConditionSpec, condition: Sequence[float]) -> Tensor:
        """A condition of the zoo as the task writes it, ``[C]``."""
        if spec.kind == "binary":
            return torch.tensor(condition).long()
        if spec.kind in ("class", "text") and self.names and spec.names:
            name = self.names[int(condition[0])]
            if name not in spec.names:
                raise InputError(f"the task has no {spec.kind} {name!r}, which the zoo has; name it in task.conditions")
            return torch.tensor([float(spec.names.index(name))])
        return torch.tensor(condition)


def answers_of(
    scorer: Scorer | None, part: Stacked, conditions: Sequence[Sequence[float] | None], where: Sequence[str],
    keep: bool = False,
) -> list[Answer]:  # fmt: skip
    """Answers of T stacked networks: of a family together, else one by one. Raises as the scorer does.

    Args:
        conditions: what each was made for.
        where: names each in errors.
        keep: the class probabilities of a family, too.
    """
    if scorer is None:
        return [Answer({}) for _ in where]
    if isinstance(scorer, TaskScorer) and (found := scorer.of_family(part, conditions, keep)) is not None:
        return found
    return [
        _answer(scorer, {name: value[row] for name, value in part.items()}, *each)
        for row, each in enumerate(zip(conditions, where, strict=True))
    ]


def _answer(scorer: Scorer, network: StateDict, condition: Sequence[float] | None, where: str) -> Answer:
    """A network's metrics and, for a single classifier, its predictions."""
    if isinstance(scorer, StoredScorer):
        return _answer(scorer.scorer, scorer.compress(network), condition, where)
    task = getattr(scorer, "task", None)
    if not isinstance(task, Classifier) or isinstance(task, MetricsTask | SampleTask):
        return Answer(scorer(network, condition, where))
    split, probabilities = scorer.split, None  # type: ignore[attr-defined]
    if isinstance(task, LogitTask):
        (logits,) = task.logits([network], split)
        predictions, probabilities = answers(logits), logits.float().softmax(-1)
    else:
        predictions = task.predict([network], split)[0]
    right = accuracy(predictions[None], task.labels(split)).item()
    return Answer({"accuracy": right}, predictions, probabilities)


@dataclass(frozen=True)
class StoredScorer:
    """Scores networks in the form of their tokens as they are stored: baselines, too, have masks and codes."""

    scorer: Scorer
    compress: Callable[[StateDict], StateDict]

    @property
    def name(self) -> str:
        """The scorer's own."""
        return self.scorer.name

    def __call__(self, network: StateDict, condition: Sequence[float] | None, where: str) -> Metrics:
        """The scorer's metrics. Raises as it does."""
        return self.scorer(self.compress(network), condition, where)


def load_scorer(reference: str, adapter: str | None = None) -> OwnScorer:
    """The scorer of a function by its place. Raises InputError as `rpg.tasks.load_callable` does."""
    return OwnScorer(load_callable(reference, "--score"), reference, adapter)


def less_is_better(names: Collection[str], lower: Collection[str] = (), higher: Collection[str] = ()) -> set[str]:
    """The metrics of which less is better.

    Raises:
        InputError: a name in ``lower`` or ``higher`` is that of no metric, or in both.
    """
    for each in (*lower, *higher):
        if each not in names:
            raise InputError(f"there is no metric {each!r} to be judged by; the scores are {', '.join(names)}")
        if each in lower and each in higher:
            raise InputError(f"--lower and --higher both name {each!r}; give one of them")
    return {each for each in names if each in lower or (SMALL.search(each.lower()) and each not in higher)}


def _is_path(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        return bool(PATHS.search(parameter.name))
    if isinstance(annotation, str):
        return bool(re.fullmatch(r"(\w+\.)?(Path|PathLike|str)(\[str\])?(\s*\|.*)?", annotation))
    return annotation in (str, Path, os.PathLike) or bool(PATHS.search(parameter.name))


def _place(error: Exception) -> str:
    """Where the user's function failed, as ``(file, line n)``."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return f" ({Path(last.tb_frame.f_code.co_filename).name}, line {last.tb_lineno})" if last is not None else ""
