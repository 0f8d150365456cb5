"""Sweeps: a list of overrides, run in parallel and resumable, and one table of what they scored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from rpg.config import Config
from rpg.section import Section
from tokenization.errors import InputError
from tokenization.files import publish_text

Say = Callable[[str], None]
EVALUATION = "evaluation.json"


class SweepEntry(Section):
    """One experiment of a sweep."""

    name: str = Field(pattern=r"^[\w.+-]+$", description="of its run folder and of its row in the table")
    config: str | None = Field(None, description="another configuration than the sweep's, relative to the sweep's file")
    set: tuple[str, ...] = Field((), description="overrides, section.field=value")


class SweepConfig(Section):
    """A sweep file."""

    config: str | None = Field(None, description="the configuration all entries start from, relative to this file")
    run: str = Field(description="folder of the entries' run folders and of the table")
    set: tuple[str, ...] = Field((), description="overrides of every entry")
    entries: tuple[SweepEntry, ...] = Field(min_length=1)


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
        return (self.folder / EVALUATION).is_file() and _saved_config(self.folder) == self.config


def load_sweep(path: Path | str) -> tuple[SweepConfig, list[Experiment]]:
    """Read a sweep file and every configuration it implies.

    Raises:
        InputError: the file or one of the configurations is wrong, or two entries share a name.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(str(path), "no such file", "a sweep file", "see configs/sweeps for examples")
    try:
        sweep = SweepConfig.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"invalid YAML ({error})", "a sweep file") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {field}", repr(first.get("input")), first["msg"].lower()) from None
    names = [entry.name for entry in sweep.entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: entries", f"two named {name!r}", "different names")
    return sweep, [_experiment(path, sweep, entry) for entry in sweep.entries]


def _experiment(path: Path, sweep: SweepConfig, entry: SweepEntry) -> Experiment:
    base = entry.config or sweep.config
    if base is None:
        raise InputError(f"{path}: entries: {entry.name}", "no configuration", "config in the entry or in the sweep")
    overrides = (f"run={Path(sweep.run) / entry.name}", *sweep.set, *entry.set)
    return Experiment(entry.name, entry.set, Config.load(path.parent / base, list(overrides)))


def run_sweep(path: Path | str, *, jobs: int = 1, say: Say = print) -> Path:
    """Run what is not finished yet and write ``<run>/table.md`` and ``<run>/table.json``.

    Zoos are collected first, each by one process. A killed sweep goes on where it stopped; an entry whose configuration
    has changed is run anew. One that fails is named in the table, and the others go on.

    Args:
        path: the sweep file.
        jobs: experiments at a time, each on its share of the cores.
        say: receives a line for each finished experiment.

    Returns:
        The table.
    """
    sweep, experiments = load_sweep(path)
    waiting = [experiment for experiment in experiments if not experiment.finished()]
    threads = max(1, _num_threads() // jobs)
    zoos = {experiment.config.zoo: experiment for experiment in waiting if experiment.config.task is not None}
    failures = _in_parallel("collect", list(zoos.values()), jobs, threads, lambda line: say(f"{line}, zoo ready"))
    failures |= _in_parallel("run", waiting, jobs, threads, lambda line: say(f"{line}, done"))
    rows = [row_of(experiment, failures.get(experiment.name)) for experiment in experiments]
    folder = Path(sweep.run)
    folder.mkdir(parents=True, exist_ok=True)
    publish_text(folder / "table.json", json.dumps(rows, indent=1) + "\n")
    publish_text(folder / "table.md", markdown_table(rows))
    for name, failure in failures.items():
        say(f"{name}: {failure}")
    return folder / "table.md"


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
        for future in as_completed(futures):
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
    from rpg.experiments.single import collect, evaluate_run
    from rpg.training.loop import train

    config = Config.load(path)
    if step == "collect":
        collect(config)
        return
    run = Path(config.run)
    (run / EVALUATION).unlink(missing_ok=True)
    same = _saved_config(run) == config
    train(config, resume=same, overwrite=not same)
    evaluate_run(run)


def _saved_config(run: Path) -> Config | None:
    """The configuration of the run in a folder, if there is a readable one."""
    saved = run / "config.yaml"
    try:
        return Config.parse(yaml.safe_load(saved.read_text()), str(saved))
    except (OSError, InputError, yaml.YAMLError):
        return None


def row_of(experiment: Experiment, failure: str | None = None) -> dict[str, Any]:
    """What the table says of an experiment; accuracies in 0 … 1."""
    row: dict[str, Any] = {"name": experiment.name, "set": list(experiment.overrides)}
    path = experiment.folder / EVALUATION
    if failure is not None or not path.is_file():
        return {**row, "failure": failure or "not run"}
    scores = json.loads(path.read_text())
    row |= {
        "original_best": scores["original"]["accuracy"]["max"],
        "original_mean": scores["original"]["accuracy"]["mean"],
        "average": scores["ensemble"]["accuracy"],
        "best": scores["generated"]["accuracy"]["max"],
        "mean": scores["generated"]["accuracy"]["mean"],
        "min": scores["generated"]["accuracy"]["min"],
        "similarity": scores["generated"]["similarity"]["mean"],
        "seconds_per_network": scores["generated"]["seconds_per_network"],
        "training_seconds": _training_seconds(experiment.folder),
    }
    if scores.get("novelty_details"):
        distances = scores["novelty_details"]["sets"]["generated"]["matched_distances"]
        row["distance"] = sorted(distances)[len(distances) // 2]
        row["novelty"] = dict(zip(map(str, scores["novelty"]["tau"]), scores["novelty"]["generated"], strict=True))
    return row


def _training_seconds(folder: Path) -> float | None:
    from rpg.generation.generator import Generator

    seconds = Generator.from_pretrained(folder).facts.get("training seconds")
    return None if seconds is None else float(seconds)


_COLUMNS: tuple[tuple[str, str, float], ...] = (
    ("original_best", "original best", 100),
    ("original_mean", "mean", 100),
    ("average", "average", 100),
    ("best", "generated best", 100),
    ("mean", "mean", 100),
    ("min", "worst", 100),
    ("similarity", "IoU", 1),
    ("distance", "distance", 1),
    ("seconds_per_network", "s a network", 1),
    ("training_seconds", "s training", 1),
)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; accuracies in per cent."""
    lines = ["| run | " + " | ".join(title for _, title, _ in _COLUMNS) + " | overrides |"]
    lines.append("| --- |" + " ---: |" * len(_COLUMNS) + " --- |")
    for row in rows:
        if "failure" in row:
            figures = [row["failure"].replace("|", "/"), *[""] * (len(_COLUMNS) - 1)]
        else:
            figures = [_figure(row.get(key), factor) for key, _, factor in _COLUMNS]
        lines.append(f"| {row['name']} | " + " | ".join(figures) + f" | {' '.join(row['set'])} |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None, factor: float) -> str:
    if value is None:
        return ""
    return f"{factor * value:.1f}" if factor == 100 else f"{value:.2f}"


if __name__ == "__main__":
    try:
        _step(*sys.argv[1:])
        print(f"{time.process_time():.0f}")  # what it would take on a core of its own; the parent reads the last word
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
