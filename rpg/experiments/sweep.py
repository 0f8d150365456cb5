"""Sweeps: a list or a matrix of overrides, run in parallel and resumable, and one table of what they scored."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from rpg.config import Config
from rpg.evaluation.report import FILE
from rpg.experiments.driver import experiment_of
from rpg.experiments.single import collect, require_for_choices, train_or_continue
from rpg.experiments.sweep_table import markdown_table, row_of, rows_of_rivals, write_similarities
from rpg.section import Section, read_mapping, validated
from rpg.training.run_folder import saved_config
from tokenization.checkpoint.progress import steps
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.zoo.locks import locked

Say = Callable[[str], None]


class SweepEntry(Section):
    """One experiment of a sweep."""

    name: str = Field(pattern=r"^[\w.+-]+$", description="of its run folder and of its row in the table")
    config: str | None = Field(None, description="another configuration than the sweep's, relative to the sweep's file")
    set: tuple[str, ...] = Field((), description="overrides, section.field=value")


class SweepMatrix(Section):
    """Every combination of one choice of each axis, as entries; the last axis varies fastest."""

    name: str = Field(description="of an entry; {AXIS} stands for the name of its choice of that axis")
    set: tuple[str, ...] = Field((), description="overrides of every entry, with {AXIS} and {name} in them")
    axes: dict[str, dict[str, tuple[str, ...]]] = Field(
        min_length=1, description="for each axis the overrides that each of its choices makes, by name"
    )

    def entries(self, where: str) -> list[SweepEntry]:
        """The entries; ``where`` names the file in errors.

        Raises:
            InputError: a template names no axis, or an entry's name has characters that no folder should have.
        """
        found = []
        for choices in itertools.product(*self.axes.values()):
            chosen = dict(zip(self.axes, choices, strict=True))
            try:
                name = self.name.format(**chosen)
                common = [each.format(name=name, **chosen) for each in self.set]
            except (LookupError, ValueError) as error:
                raise InputError(
                    f"{where} has a matrix with {error} in braces; write one of {', '.join(self.axes)}"
                ) from None
            own = [change for axis, choice in chosen.items() for change in self.axes[axis][choice]]
            found.append({"name": name, "set": [*common, *own]})
        return [validated(SweepEntry, each, where) for each in found]


class SweepConfig(Section):
    """A sweep file."""

    config: str | None = Field(None, description="the configuration all entries start from, relative to this file")
    run: str = Field(description="folder of the entries' run folders and of the table")
    set: tuple[str, ...] = Field((), description="overrides of every entry")
    entries: tuple[SweepEntry, ...] = Field((), description="the experiments, one by one")
    matrix: SweepMatrix | None = Field(None, description="more experiments: the product of lists of overrides")


@dataclass(frozen=True)
class Experiment:
    """An entry with its whole configuration."""

    name: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run)

    def finished(self) -> bool:
        """Whether the run folder holds the scores of this very configuration."""
        return (self.folder / FILE).is_file() and saved_config(self.folder) == self.config


def load_sweep(path: Path | str) -> tuple[SweepConfig, list[Experiment]]:
    """Read a sweep file and every configuration it implies.

    Raises:
        InputError: the file or one of the configurations is wrong, or two entries share a name.
    """
    path = Path(path)
    sweep = validated(SweepConfig, _read(path), str(path))
    entries = [*sweep.entries, *(sweep.matrix.entries(str(path)) if sweep.matrix else ())]
    if not entries:
        raise InputError(f"{path} has no entries; write at least one, or a matrix")
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path} has two entries named {name!r}; give them different names")
    return sweep, [_experiment(path, sweep, entry) for entry in entries]


def _read(path: Path) -> dict[str, Any]:
    tree = read_mapping(path, "a sweep file (see configs/sweeps for examples)")
    parent = tree.pop("extends", None)  # of a variant
    return {**_read(path.parent / parent), **tree} if parent else tree


def _experiment(path: Path, sweep: SweepConfig, entry: SweepEntry) -> Experiment:
    base = entry.config or sweep.config
    if base is None:
        raise InputError(f"{path}: entry {entry.name!r} has no configuration; set config in the entry or in the sweep")
    overrides = (f"run={Path(sweep.run) / entry.name}", *sweep.set, *entry.set)
    return Experiment(entry.name, entry.set, Config.load(path.parent / base, list(overrides)))


def run_sweep(path: Path | str, *, jobs: int = 1, only: Sequence[str] = (), say: Say = print) -> Path:
    """Run what is not finished yet, or some of it, and write `table.md`, `table.json` and similarities into `<run>`.

    Zoos are collected first, each by one process. A killed sweep goes on where it stopped; an entry whose configuration
    has changed is run anew. One that fails is named in the table, and the others go on.

    Args:
        jobs: experiments at a time, each on its share of the cores.
        only: names of the entries to run; all when empty. The table names the others where they are finished.

    Returns:
        The table.

    Raises:
        InputError: the file is wrong, has no entry that is named in ``only``, or one that a sweep cannot score.
    """
    sweep, experiments = load_sweep(path)
    for name in only:
        if name not in {experiment.name for experiment in experiments}:
            known = ", ".join(experiment.name for experiment in experiments)
            raise InputError(f"{path} has no entry named {name!r}; choose one of {known}")
    experiments = [each for each in experiments if not only or each.name in only or each.finished()]
    waiting = [experiment for experiment in experiments if not experiment.finished()]
    for experiment in waiting:
        _check(experiment)
    threads = max(1, _num_threads() // jobs)
    zoos = {experiment.config.zoo: experiment for experiment in waiting if experiment.config.task is not None}
    failures = _in_parallel("collect", list(zoos.values()), jobs, threads, lambda line: say(f"{line}, zoo ready"))
    broken = {zoo: failures[each.name] for zoo, each in zoos.items() if each.name in failures}
    failures |= {each.name: broken[each.config.zoo] for each in waiting if each.config.zoo in broken}
    waiting = [each for each in waiting if each.name not in failures]
    failures |= _in_parallel("run", waiting, jobs, threads, lambda line: say(f"{line}, done"))
    rows = [row_of(each.name, each.overrides, each.folder, failures.get(each.name)) for each in experiments]
    rows += rows_of_rivals([each.folder for each in experiments])
    folder = Path(sweep.run)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "table.md", markdown_table(rows))
    write_similarities({each.name: each.folder for each in experiments}, folder)
    for name, failure in failures.items():
        say(f"{name}: {failure}")
    return folder / "table.md"


def _check(experiment: Experiment) -> None:
    """Raise InputError, before anything is trained, if choices would be made on training data."""
    config = experiment.config
    if config.evaluate.split == "validation" and config.model.condition.kind != "none":
        require_for_choices(config)


def _num_threads() -> int:
    """The threads to share out: as many as the environment allows, else one a core."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return int(allowed) if allowed.isdigit() else os.cpu_count() or 1


def _in_parallel(
    step: str, experiments: list[Experiment], jobs: int, threads: int, finished: Callable[[str], None]
) -> dict[str, str]:
    """Run a step of every experiment, each in a process of its own; return what went wrong, by name.

    ``finished`` receives "<name>: <seconds> s (processor <seconds> s)" of each that went well.
    """
    failures: dict[str, str] = {}
    if not experiments:
        return failures
    with ThreadPoolExecutor(min(jobs, len(experiments))) as pool:
        futures = {pool.submit(_in_process, step, experiment, threads): experiment for experiment in experiments}
        for future in steps(
            {"collect": "collecting zoos"}.get(step, "training and scoring"),
            as_completed(futures),
            len(futures),
            after=0,
        ):
            name = futures[future].name
            failure, took = future.result()
            if failure is None:
                finished(f"{name}: {took}")
            else:
                failures[name] = failure
    return failures


def _in_process(step: str, experiment: Experiment, threads: int) -> tuple[str | None, str]:
    """Run one step of one experiment; what went wrong, in one line, or None, and the time it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        experiment.config.save(path)
        process = subprocess.run(
            [sys.executable, "-m", "rpg.experiments.sweep", step, str(path)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
    took = f"{time.perf_counter() - started:.0f} s"
    if process.returncode == 0:
        return None, f"{took} (processor {process.stdout.split()[-1]} s)"
    lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    return lines[-1].removeprefix("error: "), took


def _step(step: str, path: str) -> None:
    """Collect the zoo of a configuration, or train (going on where a killed run stopped) and score."""
    config = Config.load(path)
    if step == "collect":
        collect(config)
        return
    run = Path(config.run)
    with locked(run):
        (run / FILE).unlink(missing_ok=True)
        train_or_continue(config)
        experiment = experiment_of(config)
        report = experiment.evaluate(run, seed=config.seed, split=config.evaluate.split, **experiment.further)
        report.save(run)  # on the validation split, by which choices are made, nothing was written


if __name__ == "__main__":
    try:
        _step(*sys.argv[1:])
        print(f"{time.process_time():.0f}")  # what it would take on a core of its own; the parent reads the last word
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
