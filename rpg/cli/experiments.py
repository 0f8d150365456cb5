"""The commands that run whole experiments."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

from rpg import options as o
from rpg.cli.reading import guard, load
from rpg.console import console, progress_bar
from tokenization.errors import InputError


def sweep(file: o.SweepFile, jobs: o.Jobs = 1, only: o.Only = None) -> None:
    """Run a list or a matrix of overrides (resumable, in parallel) and write one table."""
    from rpg.experiments.sweep import run_sweep

    table = run_sweep(file, jobs=jobs, only=only or (), say=console.print)
    console.print(table.read_text(), markup=False, soft_wrap=True)
    console.print(f"table: {table}")


def unseen(
    config: o.OtherConfig = None, overrides: o.Overrides = None, seeds: o.NumSeeds = 1, split: o.ScoredSplit = None,
    trajectory: o.Trajectory = None, device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> None:  # fmt: skip
    """Networks for tasks nobody trained: zoo of 1,022 tasks, training, comparison with all that is trivial.

    On several devices: accelerate launch scripts/unseen.py CONFIG
    """
    settings = load(config or o.default_config("digits_unseen.yaml"), overrides)
    written = "pictures: {run}/distance.png, parameters.png"
    held_out(settings, split, seeds, device, "unseen", trajectory, written, ignore_memory=ignore_memory)


def lora(
    config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None,
    function: o.Function = None, lower: o.Lower = None, higher: o.Higher = None, trajectory: o.Trajectory = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> None:  # fmt: skip
    """LoRA adapters: zoo, training, comparison with all that is trivial, for tasks nobody trained where there are any.

    Conditions may be of any kind, or none; without a task or a function that scores, adapters are compared by distance.
    On several devices: accelerate launch scripts/lora.py CONFIG
    """
    from rpg.experiments.adapters import is_comparison_of_tasks

    settings = load(config or o.default_config("lora/tiny.yaml"), overrides)
    if function is None and is_comparison_of_tasks(settings):
        if lower or higher:
            raise InputError("--lower and --higher are for figures of your own; give --score, too")
        held_out(settings, split, 1, device, "lora", trajectory, ignore_memory=ignore_memory)
        return
    figures(settings, split, (function, lower or (), higher or ()), device, trajectory, ignore_memory)


def fields(config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None) -> None:
    """Neural fields of images or shapes: zoo, training, comparison in function space, pictures."""
    from rpg.experiments.fields import evaluate_fields, print_fields, run_fields

    settings = load(config or o.default_config("fields.yaml"), overrides)
    if split is not None:
        scored = "validation" if split == "validation" else "unseen"
        print_fields(evaluate_fields(settings.run, split=scored, seed=settings.seed), console)
        return
    with progress_bar("fitting fields") as collecting:
        print_fields(run_fields(settings, progress=collecting), console)
    console.print(f"figures: {settings.run}/evaluation.json\npictures: *.png beside it")


def metric(config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None) -> None:
    """Networks of a wished loss: whole training runs, a generator that goes on from weights, optimizers beside it."""
    from rpg.experiments.metric import evaluate_metric, print_metric, run_metric

    settings = load(config or o.default_config("gpt.yaml"), overrides)
    if split is not None:
        scored = "validation" if split == "validation" else "unseen"
        print_metric(evaluate_metric(settings.run, split=scored, seed=settings.seed), console)
        return
    with progress_bar("collecting the runs") as collecting, progress_bar("training") as training:
        print_metric(run_metric(settings, progress={"collect": collecting, "train": training}), console)
    console.print(f"figures: {settings.run}/evaluation.json\npicture: {settings.run}/wishes.png")


def render(
    files: o.Fields, size: o.Resolution = 64, output: o.PictureFolder = None, config: o.FieldsConfig = None
) -> None:
    """Draw neural fields as PNG files, and solid shapes as PLY meshes too, at any resolution."""
    from rpg.experiments.field_pictures import render_files

    console.print(*render_files(files, size, output, load(config, None) if config else None), sep="\n")


def demo(
    config: Annotated[Path | None, o.option("Configuration (default: configs/demo.yaml).")] = None,
    overrides: o.Overrides = None,
) -> None:
    """The whole job on real handwritten digits: zoo, training, generation, scores."""
    from rpg.evaluation.tables import print_table
    from rpg.experiments.single import run_all

    settings = load(config or o.default_config("demo.yaml"), overrides or [])
    with progress_bar("collecting the zoo") as collecting, progress_bar("training") as training:
        print_table(run_all(settings, progress={"collect": collecting, "train": training}))
    console.print(f"run folder: {settings.run}\npicture:    {Path(settings.run) / 'scatter.png'}")


def run(
    config: o.ConfigFile, overrides: o.Overrides = None, device: o.Device = "auto",
    ignore_memory: o.IgnoreMemory = False,
) -> None:  # fmt: skip
    """All that a configuration describes, in a row: zoo, training, generation, scores beside originals and baselines.

    Its task says which experiment that is: one of `rpg demo`, `unseen`, `lora`, `fields`, `metric`, lottery tickets, or
    figures of the task's own.
    """
    from rpg.tasks import build_task
    from rpg.tasks.base import Classifier, ImageTaskFamily, TaskFamily

    settings = load(config, overrides)
    task = build_task(settings.task) if settings.task is not None else None
    kind = settings.task.name if settings.task is not None else ""
    if kind in ("fields", "trajectories"):
        {"fields": fields, "trajectories": metric}[kind](config, overrides)
    elif kind == "tickets":
        tickets(settings, ignore_memory)
    elif isinstance(task, ImageTaskFamily):
        unseen(config, overrides, device=device, ignore_memory=ignore_memory)
    elif isinstance(task, TaskFamily):
        lora(config, overrides, device=device, ignore_memory=ignore_memory)
    elif isinstance(task, Classifier):
        _guard_memory(settings, ignore_memory)
        demo(config, overrides)
    else:
        figures(settings, None, (None, (), ()), device, None, ignore_memory)


def tickets(settings: Any, ignore_memory: bool) -> None:
    """Lottery tickets: search, training, comparison with all that is trivial on tasks nobody searched one for."""
    from rpg.experiments.tickets import print_tickets, run_tickets

    _guard_memory(settings, ignore_memory)
    with progress_bar("searching tickets") as collecting, progress_bar("training") as training:
        print_tickets(run_tickets(settings, progress={"collect": collecting, "train": training}), console)
    console.print(f"figures: {settings.run}/evaluation.json\npicture: {settings.run}/tickets.png")


def _guard_memory(settings: Any, ignore: bool) -> None:
    from rpg.planning.collection import collection_need
    from rpg.planning.guard import training_need

    for need in (collection_need, training_need):
        guard(functools.partial(need, settings), ignore)


def figures(
    settings: Any, split: str | None, judge: Any, device: str, trajectory: str | None, ignore_memory: bool
) -> None:
    """Networks judged by figures: collect what the task trains, train, score; or score a run alone."""
    from rpg.evaluation.scores.show import print_scores
    from rpg.evaluation.workers import Workers
    from rpg.experiments.adapters import prepare_adapters
    from rpg.experiments.scores import Judge, evaluate_run_by_scores
    from rpg.generation.partition import join_processes

    partition, place = join_processes(device)
    if split is None:
        _guard_memory(settings, ignore_memory)
        with progress_bar("collecting") as collecting, progress_bar(f"training on {place}") as training:
            prepare_adapters(settings, {"collect": collecting, "train": training})
    with progress_bar(f"scoring on {place}") as advance:
        workers = Workers(partition, advance)
        result = evaluate_run_by_scores(
            settings.run, Judge(*judge), seed=settings.seed, split=split, workers=workers, trajectory=trajectory
        )
    print_scores(result, console)
    console.print(f"figures:  {settings.run}/evaluation.json\nreport:   {settings.run}/report.html")


def held_out(
    settings: Any,
    split: str | None,
    seeds: int,
    device: str,
    command: str,
    trajectory: str | None,
    written: str = "",
    *,
    ignore_memory: bool,
) -> None:
    """Run an experiment on unseen tasks, or score a split of one that was run before."""
    from rpg.evaluation.workers import Workers
    from rpg.experiments.held_out_table import print_held_out
    from rpg.experiments.held_out_tasks import evaluate_held_out, run_held_out
    from rpg.experiments.tasks_report import wished_task, write_tasks_report
    from rpg.generation.partition import join_processes

    partition, place = join_processes(device)
    workers = Workers(partition)
    wish = None if trajectory is None else wished_task(settings, trajectory)
    if split is not None:
        print_held_out(evaluate_held_out(settings.run, seed=settings.seed, split=split, workers=workers), console)
    else:
        _guard_memory(settings, ignore_memory)
        with progress_bar("collecting") as collecting, progress_bar(f"training on {place}") as training:
            progress = {"collect": collecting, "train": training}
            report = run_held_out(settings, progress=progress, seeds=seeds, workers=workers)
        print_held_out(report, console)
    if split == "validation" or not workers.is_first:  # which writes nothing
        return
    options = {"--split": split, "--trajectory": trajectory}
    words = [word for name, value in options.items() if value for word in (name, value)]
    write_tasks_report(settings.run, " ".join([f"rpg {command}", *words]), wish)
    console.print(f"figures:  {settings.run}/evaluation.json\nreport:   {settings.run}/report.html")
    console.print(written.format(run=settings.run), end="\n" if written else "")
