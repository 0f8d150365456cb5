"""Sweeps: a list or a matrix of overrides, run in parallel and resumable, and one table of what they scored."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console

from rpg.config import Config
from rpg.console import FiguresTable
from rpg.evaluation.page.charts import COLORS, GENERATED, ORIGINAL, Axis, draw_figure, save_png
from rpg.evaluation.report import FILE, Report, label_of, nearest_of, shown
from rpg.experiments.driver import experiment_of
from rpg.experiments.single import collect, require_for_choices, train_or_continue
from rpg.generation.generator import Generator
from rpg.section import Section, read_mapping, validated
from rpg.training.run_folder import saved_config
from tokenization.checkpoint.progress import steps
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.zoo.locks import locked

_COLUMNS = {
    "original_best": "original best", "original_mean": "mean", "average": "average", "best": "generated best",
    "mean": "mean", "worst": "worst", "similarity": "IoU", "distance": "distance", "one_nna": "1-NNA",
    "coverage": "coverage", "nearest_training": "nearest", "seconds_per_network": "s a network",
    "training_seconds": "s training",
}  # fmt: skip
METRICS = ("original_best", "original_mean", "average", "best", "mean", "worst")
"""Columns in the unit of the first metric."""


def row_of(name: str, overrides: Sequence[str], folder: Path, failure: str | None = None) -> dict[str, Any]:
    """The table's row of an experiment."""
    row: dict[str, Any] = {"name": name, "set": list(overrides)}
    if failure is not None or not (folder / FILE).is_file():
        return {**row, "failure": failure or "not run"}
    try:
        report = Report.load(folder)
    except InputError as error:
        return {**row, "failure": str(error)}
    seconds = Generator.from_pretrained(folder).facts.get("training seconds")
    row |= _of_kind(report, "generated") | {"training_seconds": seconds and float(seconds)}
    if report.kinds["original"].summaries.get(report.first):
        originals = _of_kind(report, "original")
        row |= {"original_best": originals["best"], "original_mean": originals["mean"]}
    row |= {"average": report.mean("average"), "seconds_per_network": report.facts.get("seconds_per_network")}
    if novel := report.kinds["generated"].novel:
        row["novelty"] = dict(zip(map(str, report.taus), novel, strict=True))
    return row


def _of_kind(report: Report, kind: str) -> dict[str, Any]:
    each = report.kinds[kind]
    found: dict[str, Any] = {"metric": report.first, "distance": nearest_of(each)}
    if summary := each.summaries.get(report.first):
        best, worst = (summary.max, summary.min)[:: report.sign]
        found |= {"best": best, "mean": summary.mean, "worst": worst}
    found["similarity"] = each.extras.get("error_iou", report.mean(kind, "similarity"))
    return found | {name: each.extras.get(name) for name in ("one_nna", "coverage", "nearest_training")}


def readable_reports(folders: Mapping[str, Path]) -> dict[str, Report]:
    """The reports that are there and can be read, by the name of the run."""
    found = {}
    for name, folder in folders.items():
        with contextlib.suppress(InputError):
            found[name] = Report.load(folder)
    return found


def rows_of_rivals(reports: Iterable[Report]) -> list[dict[str, Any]]:
    """A row for every baseline, of the first evaluation that compares it in what networks compute."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        names = [n for n, each in report.kinds.items() if {"one_nna", "error_iou"} & each.extras.keys()]
        rivals = {name: _of_kind(report, name) for name in names if name != "generated"}
        found = {name: {"name": name, "set": [], **each} for name, each in rivals.items()} | found
    return list(found.values())


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, without empty columns."""
    columns = _columns(rows)
    lines = ["| run | " + " | ".join(_COLUMNS[each] for each in columns) + " | overrides |"]
    lines.append("| --- |" + " ---: |" * len(columns) + " --- |")
    for row in rows:
        cells = [_cell(row, key) for key in columns]
        if "failure" in row:
            cells = [row["failure"].replace("|", "/"), *[""] * (len(columns) - 1)]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + f" | {' '.join(row['set'])} |")
    return "\n".join(lines) + "\n"


def print_sweep(rows: list[dict[str, Any]], console: Console) -> None:
    """The same on the screen; overrides are in ``table.md``."""
    columns = _columns(rows)
    if done := [[row["name"], *(_cell(row, key) for key in columns)] for row in rows if "failure" not in row]:
        console.print(FiguresTable(("run", *(_COLUMNS[each] for each in columns)), done))
    for row in rows:
        if "failure" in row:
            console.print(f"{row['name']}: {row['failure']}", markup=False, highlight=False)


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return [each for each in _COLUMNS if any(row.get(each) is not None for row in rows)]


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if key in METRICS:
        return shown(value, row.get("metric", "")).removesuffix(" %")
    return "" if value is None else f"{value:.2f}"


def write_similarities(reports: Mapping[str, Report], folder: Path) -> None:
    """Write ``similarity.md`` and ``similarity.png`` of those runs that were scored by similarity, if any."""
    reports = {name: each for name, each in reports.items() if "similarity" in each.kinds["generated"].metrics}
    if reports:
        write_text(folder / "similarity.md", similarity_table(reports))
        draw_similarities(reports, folder / "similarity.png")


def similarity_table(reports: Mapping[str, Report]) -> str:
    """A row for each run and for originals, noise and generated: best and mean accuracy, and range of similarity."""
    lines = ["| run | networks | best | mean | similarity, range | mean |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for run, report in reports.items():
        for kind in ("original", *(name for name in report.kinds if name.startswith("noise_0")), "generated"):
            right, alike = (report.kinds[kind].summaries.get(name) for name in (report.first, "similarity"))
            if right and alike and "_at_" not in kind:
                lines.append(
                    f"| {run} | {label_of(kind)} | {100 * right.max:.1f} | {100 * right.mean:.1f} "
                    f"| {alike.min:.2f} … {alike.max:.2f} | {alike.mean:.2f} |"
                )
    return "\n".join(lines) + "\n"


def draw_similarities(reports: Mapping[str, Report], path: Path) -> None:
    """The distributions of similarity of originals and generated networks, side by side for each run (figure 5c)."""

    def draw(axes: Any) -> None:
        for kind, name, shift in ((ORIGINAL, "original", -0.2), (GENERATED, "generated", 0.2)):
            places = [place + shift for place in range(len(reports))]
            values = [each.kinds[name].metrics["similarity"] for each in reports.values()]
            drawn = axes.violinplot(values, places, widths=0.36)
            for part in (*drawn["bodies"], *(drawn[each] for each in ("cmins", "cmaxes", "cbars"))):
                part.set_color(COLORS[kind])
            axes.plot([], [], color=COLORS[kind], linewidth=6, label=name)
        axes.set_xticks(range(len(reports)), list(reports))
        axes.legend(frameon=False, ncols=2, loc="lower left")

    size = (max(4.0, 1.3 * len(reports)), 3.5)
    save_png(draw_figure(draw, Axis("run"), Axis("similarity to the nearest (other) original"), size), path)


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
class SweepRun:
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


def load_sweep(path: Path | str) -> tuple[SweepConfig, list[SweepRun]]:
    """Read a sweep file and every configuration it implies.

    Raises:
        InputError: the file or one of the configurations is wrong, or two entries share a name.
    """
    path = Path(path)
    sweep = validated(SweepConfig, _read(path), str(path))
    entries = [*sweep.entries, *(sweep.matrix.entries(str(path)) if sweep.matrix else ())]
    if not entries:
        raise InputError(f"{path} has no entries; write at least one, or a matrix")
    names = Counter(entry.name for entry in entries)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"{path} has two entries named {twice[0]!r}; give them different names")
    runs = []
    for entry in entries:
        if (base := entry.config or sweep.config) is None:
            raise InputError(
                f"{path}: entry {entry.name!r} has no configuration; set config in the entry or in the sweep"
            )
        overrides = [f"run={Path(sweep.run) / entry.name}", *sweep.set, *entry.set]
        runs.append(SweepRun(entry.name, entry.set, Config.load(path.parent / base, overrides)))
    return sweep, runs


def _read(path: Path) -> dict[str, Any]:
    tree = read_mapping(path, "a sweep file (see configs/sweeps for examples)")
    parent = tree.pop("extends", None)  # of a variant
    return {**_read(path.parent / parent), **tree} if parent else tree


def run_sweep(path: Path | str, *, jobs: int = 1, only: Sequence[str] = (), say: Say = print) -> Path:
    """Run what is not finished yet, or some of it, and write `table.md`, `table.json` and similarities into `<run>`.

    Zoos of several entries are collected first, each by one process. A killed sweep goes on where it stopped; an entry
    whose configuration has changed is run anew. One that fails is named in the table, and the others go on.

    Args:
        jobs: experiments at a time, each on its share of the cores.
        only: names of the entries to run; all when empty. The table names the others where they are finished.

    Returns:
        The table.

    Raises:
        InputError: the file is wrong, has no entry that is named in ``only``, or one that a sweep cannot score.
    """
    sweep, runs = load_sweep(path)
    names = [each.name for each in runs]
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"{path} has no entry named {unknown[0]!r}; choose one of {', '.join(names)}")
    runs = [each for each in runs if not only or each.name in only or each.finished()]
    waiting = [each for each in runs if not each.finished()]
    for config in (each.config for each in waiting):  # before anything is trained
        if config.model.condition.kind != "none":
            require_for_choices(config, config.evaluate.split)
    users, makers = Counter(each.config.zoo for each in waiting), [e for e in waiting if e.config.task is not None]
    zoos = {each.config.zoo: each for each in makers if users[each.config.zoo] > 1}
    alone = {each.name for each in makers if users[each.config.zoo] == 1}
    shared = [("collect", each) for each in zoos.values()]
    failures = _in_parallel("collecting zoos", shared, jobs, lambda line: say(f"{line}, zoo ready"))
    broken = {zoo: failures[each.name] for zoo, each in zoos.items() if each.name in failures}
    failures |= {each.name: broken[each.config.zoo] for each in waiting if each.config.zoo in broken}
    left = [("both" if each.name in alone else "run", each) for each in waiting if each.name not in failures]
    failures |= _in_parallel("training and scoring", left, jobs, lambda line: say(f"{line}, done"))
    rows = [row_of(each.name, each.overrides, each.folder, failures.get(each.name)) for each in runs]
    reports, folder = readable_reports({each.name: each.folder for each in runs}), Path(sweep.run)
    rows += rows_of_rivals(reports.values())
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "table.md", markdown_table(rows))
    write_similarities(reports, folder)
    for name, failure in failures.items():
        say(f"{name}: {failure}")
    return folder / "table.md"


def _num_threads() -> int:
    """The threads to share out: as many as the environment allows, else one a core."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return int(allowed) if allowed.isdigit() else os.cpu_count() or 1


def _in_parallel(
    title: str, todo: list[tuple[str, SweepRun]], jobs: int, finished: Callable[[str], None]
) -> dict[str, str]:
    """Do a step of every run, each in a process of its own; return what went wrong, by name.

    ``finished`` receives "<name>: <seconds> s (processor <seconds> s)" of each that went well.
    """
    failures: dict[str, str] = {}
    if not todo:
        return failures
    threads = max(1, _num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_in_process, step, each.config, threads): each.name for step, each in todo}
        for future in steps(title, as_completed(futures), len(futures), after=0):
            failure, took = future.result()
            if failure is None:
                finished(f"{futures[future]}: {took}")
            else:
                failures[futures[future]] = failure
    return failures


def _in_process(step: str, config: Config, threads: int) -> tuple[str | None, str]:
    """Do one step of one run; what went wrong, in one line, or None, and the time it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        config.save(path)
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
    """Collect the zoo of a configuration, or train (going on where a killed run stopped) and score, or both."""
    config = Config.load(path)
    if step in ("collect", "both"):
        collect(config)
    if step == "collect":
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
