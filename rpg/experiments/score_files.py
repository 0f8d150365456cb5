"""Scoring checkpoints of any origin, and what a generator is asked for when it is scored."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rpg.config import Config
from rpg.evaluation.conditions import Conditions
from rpg.evaluation.judges import Metrics, TaskScorer, load_scorer
from rpg.evaluation.workers import Workers
from rpg.experiments.single import find_task
from rpg.generation.generator import Generator
from rpg.models.conditioning import are_new, regression_inputs
from rpg.tasks import build_task
from rpg.tasks.base import AdapterScorer, Classifier, MetricsTask, SampleTask
from tokenization.checkpoint.checkpoint import read_state_dict
from tokenization.checkpoint.weights import AS_FOUND, Chosen
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


def score_checkpoints(
    paths: Sequence[Path],
    reference: str | None,
    config: Config | None,
    split: str,
    workers: Workers | None = None,
    chosen: Chosen = AS_FOUND,
) -> dict[str, dict[str, Metrics]]:
    """Metrics of checkpoints, by name, then by task; the task is called "" where there is but one.

    Args:
        paths: zoos, of which every checkpoint is scored; checkpoints of any kind; PEFT folders.
        reference: the user's function, as ``package.module:function``.
        config: its task scores where there is no function; a zoo may do with its own.
        split: of the task's data.
        workers: the processes that share the work.
        chosen: which weights of each file, where it holds several, and the prefix to cut off their names.

    Raises:
        InputError: nothing scores them, or one of them does not fit.
    """
    workers, own = workers or Workers(), load_scorer(reference) if reference else None
    if own is not None and own.takes_path and chosen != AS_FOUND:
        raise InputError(f"{reference} reads files by itself; leave --key and --strip out")
    named = config is not None and config.task is not None  # one task for all, whatever lies where
    items = [each for path in paths for each in _checkpoints(path)]
    task_of = functools.cache(lambda source: _task(source, config))

    def score(place: int, item: tuple[str, Path, Path]) -> dict[str, Metrics]:
        name, file, source = item
        if own is not None:
            condition = None
            return {
                "": own.of_file(file, name) if own.takes_path else own(read_state_dict(file, chosen), condition, name)
            }
        task, state_dict = task_of(None if named else source), read_state_dict(file, chosen)
        if isinstance(task, AdapterScorer):
            return task.score(state_dict, split)
        return {"": TaskScorer(task, split)(state_dict, None, name)}

    workers.expect(len(items))
    found = workers.map(score, items)
    return {item[0]: each for item, each in zip(items, found, strict=True)}


def _task(source: Path | None, config: Config | None) -> Any:
    if source is None:
        assert config is not None and config.task is not None
        task = build_task(config.task)
    elif (source / "zoo.json").is_file():
        task = find_task(config or Config(), Zoo.open(source))
    else:
        raise InputError(
            f"nothing says how to score {source}; give a CONFIG with a task, or a function of your own (--score)"
        )
    if not isinstance(task, AdapterScorer | Classifier | MetricsTask | SampleTask):
        raise InputError(
            f"the task {type(task).__name__} scores no single checkpoint; give a function of your own (--score)"
        )
    return task


def _checkpoints(path: Path) -> Iterator[tuple[str, Path, Path]]:
    """Name, file and origin of every checkpoint of a path."""
    if not path.exists():
        raise InputError(f"there is no {path}; name zoos or checkpoints to score")
    if not (path / "zoo.json").is_file():
        yield str(path), path, path
        return
    zoo = Zoo.open(path)
    for index in range(len(zoo)):
        yield zoo.entries[index].file, zoo.file(index), path


def conditions_asked(
    generator: Generator, zoo: Zoo, trained: Sequence[int], held_out: Sequence[int], num: int, split: str
) -> tuple[Conditions, Any]:
    """What networks are made for, and the same as the generator is asked for it; nothing of one without conditions."""
    if generator.condition is None:
        return Conditions(), None
    places = _asked_entries(zoo, held_out, split) or trained
    chosen = _spread(places, num)
    own, others, wanted = ([zoo.entries[index].condition for index in each] for each in (trained, held_out, chosen))
    if zoo.condition is None or any(each is None for each in (*own, *wanted)):  # of a metric
        return Conditions(own, others), None
    text = zoo.condition.kind == "text"
    known = [zoo.condition.names[int(each[0])] for each in (*own, *wanted) if each is not None] if text else []
    if generator.texts is not None:
        inputs = torch.stack([generator.texts.condition(each) for each in known]).double()
    else:
        inputs = regression_inputs(zoo.condition.kind, torch.tensor([*own, *wanted]), zoo.condition.size)
    conditions = Conditions(
        own, others, wanted, [generator.layout.checkpoint(zoo, index) for index in chosen],
        inputs[: len(own)], inputs[len(own) :], own=places is trained, by_class=not are_new(zoo.condition.kind),
    )  # fmt: skip
    return conditions, known[len(own) :] if text else wanted


def _asked_entries(zoo: Zoo, held_out: Sequence[int], split: str) -> Sequence[int]:
    """The held-out entries to make networks for: unseen tasks where the zoo tells them apart."""
    if split == "validation":  # choices look at no unseen task
        return [index for index in held_out if zoo.entries[index].split == "validation"]
    return [index for index in held_out if zoo.entries[index].split in ("unseen", "test")] or held_out


def _spread(places: Sequence[int], num: int) -> list[int]:
    """``num`` of ``places``, evenly spaced; again and again where there are fewer."""
    chosen = places if len(places) <= num else [places[i * len(places) // num] for i in range(num)]
    return [chosen[i % len(chosen)] for i in range(num)]
