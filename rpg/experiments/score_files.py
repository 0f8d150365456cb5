"""Scoring checkpoints of any origin."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rpg.config import Config
from rpg.evaluation.engine import Workers
from rpg.evaluation.judges import Metrics, TaskScorer, load_scorer
from rpg.experiments.single import find_task
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
            return {"": own.of(file if own.takes_path else read_state_dict(file, chosen), None, name)}
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
