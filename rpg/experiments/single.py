"""Parts that experiments share: collecting, judging, choices by validation data, the zoo's parts, denoising paths."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.console import bar_in_notebook
from rpg.devices import join_processes
from rpg.evaluation.span import ZooSpan
from rpg.generation.conditions import named_condition
from rpg.generation.generator import Generator
from rpg.merging.adapters import Merges, PeftMerges
from rpg.merging.methods import NetworkMerges
from rpg.planning.collection import plan_collection
from rpg.tasks import Task, build_task, task_of
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.collecting import Progress
from rpg.tasks.side_by_side import Stacked, stack
from rpg.training.data import training_entries
from rpg.training.loop import train_to_the_end
from rpg.training.run_folder import saved_config
from tokenization.checkpoint.checkpoint import Checkpoint, StateDict
from tokenization.compressed.form import Compressed
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

ALIGNED = "-aligned"
"""Ends the names of zoos that `rpg align` writes."""

KEPT_FOR_CHOICES = ("validation", "altered_validation")
"""Splits of a zoo that nothing is learned from where a choice is to be made."""


def _filled(config: Config) -> Path | None:
    """The zoo to lock for writing; None without a task, and for a read-only zoo, which is fine once it is complete."""
    zoo = Path(config.zoo)
    read_only = (zoo / "zoo.json").is_file() and not os.access(zoo, os.W_OK)
    return None if config.task is None or read_only else zoo


def collect(config: Config | Path | str, *, progress: Progress | None = None) -> Zoo:
    """Fill the zoo of ``config`` by its task; one that is partly filled is completed.

    Of several launched processes the first one works alone where the task does not share its work.

    Args:
        config: the experiment, or the file that describes it.
        progress: called with what is done and the total; a notebook shows a bar where it is None.

    Raises:
        InputError: the configuration has no task, the zoo there is another task's, or its name is that of an aligned
            zoo, which cannot be collected.
    """
    config = config if isinstance(config, Config) else Config.load(config)
    with bar_in_notebook("collecting", progress) as progress:
        return _collect(config, progress=progress)


@locks(lambda config, **_: _filled(config))
def _collect(config: Config, *, progress: Progress | None) -> Zoo:
    if config.task is None:
        raise InputError(
            "the configuration has no task that trains checkpoints; name one, or make a zoo of your own checkpoints "
            "with `rpg collect --from FOLDER --zoo ZOO`"
        )
    task, path = build_task(config.task), Path(config.zoo)
    if path.name.endswith(ALIGNED) and not (path / "zoo.json").exists():
        plain = path.with_name(path.name.removesuffix(ALIGNED))
        raise InputError(
            f"{path} is not there, and its name is that of a zoo in one order of hidden units; collect with "
            f"--set zoo={plain}, then `rpg align {plain} {path}`"
        )
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
    """The run to make choices by: this one, or ``<run>/choices`` if this one learns from the validation split.

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
    """Raise InputError if a run is to be scored on the validation split and was trained on it."""
    if split != "validation":
        return
    chosen = for_choices(config)
    if chosen is not config:
        raise InputError(
            f"{config.run} learns from the validation split, so that no choice can be made by it; train another "
            f"with --set 'train.splits=[{','.join(chosen.train.splits)}]' --set run={chosen.run}"
        )


def train_or_continue(config: Config, **options: Any) -> Path:
    """`train_to_the_end`: resumes a run of the same configuration and replaces any other."""
    same = saved_config(config.run) == config
    return train_to_the_end(config, resume=same, overwrite=not same, **options)


def existing(run: Path | str) -> Path | None:
    """A run folder that exists; None (nothing to lock) for a hub id or a wrong name."""
    return Path(run) if Path(run).is_dir() else None


def tasks_scored(split: str) -> str:
    """The split of the zoo whose tasks are scored on images of a split: those to choose by, or unseen ones."""
    return "validation" if split == "validation" else "unseen"


def stacked_networks(zoo: Zoo, entries: Sequence[int]) -> Stacked:
    """Some checkpoints of a zoo, ``[T, *shape]``."""
    return stack([zoo.state_dict(index) for index in entries])


def generate_for(generator: Generator, conditions: Any, seed: int, **options: Any) -> Stacked:
    """A generated network for each of T conditions, ``[T, *shape]``."""
    return stack(generator.generate(len(conditions), seed=seed, condition=conditions, **options))  # type: ignore[arg-type]


def parts_of(zoo: Zoo, config: Config) -> tuple[list[int], list[int]]:
    """The entries that the generator learned from, and the others."""
    trained = training_entries(zoo, config.train.splits)
    return trained, sorted(set(range(len(zoo))) - set(trained))


def merges_of(
    adapter: str | None, zoo: Zoo, entries: Sequence[int], layout: Layout | None = None, form: Compressed | None = None
) -> Merges:
    """Merges some of a zoo's networks, or its adapters as they were saved; the results have the layout's form."""
    form = layout.compressed if layout is not None else form
    opened = zoo.checkpoint if form is None else functools.partial(form.checkpoint, zoo)
    if adapter is None:
        return NetworkMerges([opened(index) for index in entries], [zoo.entries[i].run for i in entries])
    finish = layout.canonical.apply if layout is not None and layout.canonical is not None else None
    return PeftMerges(adapter, [zoo.checkpoint(index) for index in entries], finish)


def zoo_span(
    generator: Generator, zoo: Zoo, trained: Sequence[int], runs: Sequence[int] | None = None, matched: bool = False
) -> ZooSpan:
    """How networks lie among the checkpoints that a generator learned from; by spread where units are matched."""
    checkpoints = [generator.layout.checkpoint(zoo, index) for index in trained]
    names = [layer.name for layer in generator.layout.layers]
    return ZooSpan(checkpoints, names, runs, "spread" if matched else "deviation")


def find_task(config: Config, zoo: Zoo) -> Task:
    """The configuration's own task, else the one recorded in the zoo. Raises InputError without either."""
    if config.task is None and zoo.task is None:
        raise InputError(
            f"neither the configuration nor {zoo.path} has a task that scores checkpoints; name one, or give a "
            "function of your own with --score package.module:function"
        )
    return task_of(zoo, config.task)


NETWORKS_SHOWN, POINTS = 5, 20

HELD_VALUES = 1 << 26
"""Values up to which the networks on their way from noise are held together; of larger ones fewer are shown, if any."""

OPTION = "--denoising-path"


def denoising_path_of(
    generator: Generator, condition: Any, seed: int, measure: Callable[[Sequence[StateDict]], Tensor], *, wanted: bool
) -> list[tuple[int, Tensor]]:
    """(Sampling steps taken, a figure ``[networks]`` then) of some networks for one condition.

    Args:
        condition: as ``Generator.generate`` takes it.
        measure: gives networks their figure.
        wanted: show large networks, too: a single one, at no more steps than fit into the memory of the others.
    """
    num, points, size = NETWORKS_SHOWN, POINTS, generator.layout.num_values
    if size * num > HELD_VALUES:
        if not wanted:
            return []
        num, points = 1, max(2, min(points, HELD_VALUES * POINTS // NETWORKS_SHOWN // size))
    shown = generator.denoising_paths(num, seed=seed, points=points, condition=condition)
    return [(step, measure(networks)) for step, networks in shown]


def requested_condition(config: Config, spec: ConditionSpec | None, text: str) -> list[float] | str:
    """The condition that ``--denoising-path`` names, checked before anything long begins.

    Raises:
        InputError: the generator has no such condition, or makes networks in a single step.
    """
    condition = named_condition(spec, text, OPTION)
    if config.model.kind in ("kernel_ridge", "sane") or config.generate.steps < 2:
        raise InputError(
            f"{OPTION} shows networks step by step, but this generator takes one step (generate.steps); leave it out"
        )
    return condition


MOST_VALUES = 50_000_000
"""Of a zoo that is read for this."""

NEAR = 0.05
"""Of the median distance of an original to its nearest neighbour: a network so near to an original is a copy."""

_LOOKED_AT = 4


def copies_notice(generator: Generator, networks: Sequence[Path], state: str | None = None) -> str | None:
    """One line if networks are copies of originals, from their distances where the zoo is there and not too large.

    Args:
        networks: files or folders; the first few are looked at.
        state: the permutation state asked for; the configuration's when None.

    Raises:
        InputError: a network cannot be read.
    """
    folder, stored = Path(generator.config.zoo), (state or generator.config.generate.state) == "stored"
    if not stored or generator.layout.compressed is not None or not (folder / "zoo.json").is_file():
        return None
    zoo = Zoo.open(folder)
    trained, _ = parts_of(zoo, generator.config)
    if len(trained) < 2 or len(trained) * generator.layout.num_values > MOST_VALUES:
        return None
    span = zoo_span(generator, zoo, trained)
    places = span.project(Checkpoint.open(path).state_dict() for path in networks[:_LOOKED_AT])
    near, unit = span.distances(places).min(1), span.unit()
    if not unit or not bool((near.values < NEAR * unit).any()):
        return None
    place = int(near.values.argmin())
    which, far = zoo.entries[trained[int(near.indices[place])]].file, near.values[place].item() / unit
    what = f"{networks[place]} is a copy of {which}: {far:.1g} of the distance between neighbouring originals"
    return f"{what}; --state gaussian makes new ones"
