"""The commands that run whole experiments."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any

from rpg.cli import parameters as o
from rpg.cli.making import load, training_bar
from rpg.console import console, progress_bar, say
from tokenization.errors import InputError


def sweep(file: o.SweepFile, jobs: o.Jobs = 1, only: o.Only = None) -> dict[str, Any]:
    """Run a list or a matrix of overrides (resumable, in parallel) and write one table."""
    from rpg.experiments.sweep import print_sweep, run_sweep

    table = run_sweep(file, jobs=jobs, only=only or (), say=console.print)
    rows = json.loads(table.with_suffix(".json").read_text())
    print_sweep(rows, console)
    console.print(f"table: {table}")
    return {"table": str(table), "rows": rows}


def unseen(
    config: o.OtherConfig = None, overrides: o.Overrides = None, seeds: o.NumSeeds = 1, split: o.ScoredSplit = None,
    path_condition: o.DenoisingPath = None, device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
    full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """Networks for unseen tasks: zoo, training, comparison with simple baselines.

    On several devices: accelerate launch -m rpg unseen CONFIG
    """
    from rpg.experiments.unseen_tasks import task_family

    settings = load(config, overrides, "digits_unseen.yaml")
    task_family(settings)
    how: Any = {"device": device, "ignore_memory": ignore_memory, "full": full}
    return experiment(settings, "unseen", split=split, seeds=seeds, path_condition=path_condition, **how)


def lora(
    config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None,
    function: o.Function = None, lower: o.Lower = None, higher: o.Higher = None, path_condition: o.DenoisingPath = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False, full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """LoRA adapters: zoo, training, comparison with simple baselines on unseen tasks, if there are any.

    Conditions may be of any kind, or none; without a task or a function that scores, adapters are compared by distance.
    On several devices: accelerate launch -m rpg lora CONFIG
    """
    from rpg.experiments.driver import require_adapters

    settings = load(config, overrides, "lora/tiny.yaml")
    require_adapters(settings)
    judge = (function, lower or (), higher or ())
    how: Any = {"device": device, "ignore_memory": ignore_memory, "full": full}
    return experiment(settings, "lora", judge, split=split, path_condition=path_condition, **how)


def fields(
    config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False, full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """Neural fields of images or shapes: zoo, training, comparison in function space, pictures."""
    settings = load(config, overrides, "fields.yaml")
    return experiment(settings, "fields", split=split, device=device, ignore_memory=ignore_memory, full=full)


def metric(
    config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False, full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """Networks with a target loss: training runs, a generator that continues from weights, optimizers beside it."""
    settings = load(config, overrides, "gpt.yaml")
    return experiment(settings, "metric", split=split, device=device, ignore_memory=ignore_memory, full=full)


def render(
    files: o.Fields, size: o.Resolution = 64, output: o.PictureFolder = None, config: o.FieldsConfig = None
) -> dict[str, Any]:
    """Render neural fields as PNG files, and solid shapes also as PLY meshes, at any resolution."""
    from rpg.labs.fields.pictures import render_files

    written = list(render_files(files, size, output, load(config, None) if config else None))
    console.print(*written, sep="\n")
    return {"files": [str(path) for path in written]}


def demo(
    config: o.DemoConfig = None, overrides: o.Overrides = None, seeds: o.NumSeeds = 1, split: o.ScoredSplit = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False, full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """Tiny networks for uncalibrated sensors: zoo, training, generation from settings, comparison."""
    settings = load(config, overrides, "demo.yaml")
    how: Any = {"device": device, "ignore_memory": ignore_memory, "full": full}
    return experiment(settings, "demo", split=split, seeds=seeds, **how)


def run(
    config: o.ConfigFile, overrides: o.Overrides = None, seeds: o.NumSeeds = 1, device: o.Device = "auto",
    ignore_memory: o.IgnoreMemory = False, full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """Run everything a configuration describes: zoo, training, generation, comparison with originals and baselines.

    Its task says which experiment that is: on networks, on unseen tasks, on fields, target losses or lottery tickets.
    """
    settings = load(config, overrides)
    return experiment(settings, "run", seeds=seeds, device=device, ignore_memory=ignore_memory, full=full)


def _guard_memory(settings: Any, ignore: bool) -> None:
    from rpg.planning.collection import collection_need
    from rpg.planning.plan import guard, training_need

    for need in (collection_need, training_need):
        guard(functools.partial(need, settings), ignore)


def _to_score(settings: Any, split: str, place: Any, ignore_memory: bool) -> Any:
    """The run that ``--split`` scores: for choices one that has not learned from what they are made on.

    It is trained here where the configured one has.
    """
    from rpg.experiments.single import collect, for_choices, train_or_continue

    chosen = for_choices(settings) if split == "validation" else settings
    if chosen is settings:
        return settings
    say(f"{settings.run} learns from the validation split; choices are made by {chosen.run}, which does not")
    _guard_memory(chosen, ignore_memory)
    with progress_bar("collecting") as collecting, training_bar(f"training on {place}") as training:
        if chosen.task is not None:
            collect(chosen, progress=collecting)
        train_or_continue(chosen, progress=training["train"], watch=training["watch"])
    return chosen


def experiment(
    settings: Any, command: str, judge: Any = (None, (), ()), *, device: str, ignore_memory: bool, full: bool,
    split: str | None = None, seeds: int = 1, path_condition: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run an experiment, or judge a split of one that was run before.

    Raises:
        InputError: the configuration's task has another experiment than the command is for.
    """
    from rpg.devices import join_processes
    from rpg.evaluation.engine import Workers
    from rpg.evaluation.page.page import print_report
    from rpg.experiments.driver import Judge, experiment_of, run_experiment
    from rpg.generation.folders import find_folder, require_files
    from rpg.tasks.config import TASKS
    from rpg.training.run_folder import saved_config
    from tokenization.zoo.locks import locked

    task = settings.task.name if settings.task is not None else "none"
    wanted = next((name for name, each in TASKS.items() if each.command == command), task)
    if task != wanted:
        raise InputError(f"task.name is {task}, but `rpg {command}` is for {wanted}; use `rpg run`")
    partition, place = join_processes(device)
    words = [
        f"rpg {command}",
        *(f"{n} {v}" for n, v in {"--split": split, "--denoising-path": path_condition}.items() if v),
    ]
    if split == "test":
        require_files(find_folder(settings.run))
    with locked(settings.run) if split is None else contextlib.nullcontext():
        chosen = experiment_of(settings, Judge(*judge), path_condition=path_condition, command=" ".join(words))
        if split is not None and settings.model.condition.kind != "none":
            settings = _to_score(settings, split, place, ignore_memory)
        if split is None:
            _guard_memory(settings, ignore_memory)
            if saved_config(settings.run) is not None:
                say(f"{settings.run} exists and is trained anew; `rpg evaluate {settings.run}` only scores it")
        with (
            progress_bar("collecting") as collecting,
            training_bar(f"training on {place}") as training,
            progress_bar(f"scoring on {place}") as scoring,
        ):
            workers = Workers(partition, scoring)
            if split is not None:
                report = chosen.evaluate(settings.run, seed=settings.seed, split=split, workers=workers)
            else:
                progress = {"collect": collecting, **training}
                report = run_experiment(settings, chosen, progress=progress, seeds=seeds, workers=workers)
    print_report(report, console, folder=settings.run, full=full, then=chosen.next(settings, settings.run))
    return report.told(settings.run, settings.run)
