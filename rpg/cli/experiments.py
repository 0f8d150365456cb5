"""The commands that run whole experiments."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

from rpg.cli import parameters as o
from rpg.cli.reading import guard, load, training_bar
from rpg.console import console, progress_bar
from tokenization.errors import InputError


def sweep(file: o.SweepFile, jobs: o.Jobs = 1, only: o.Only = None) -> dict[str, Any]:
    """Run a list or a matrix of overrides (resumable, in parallel) and write one table."""
    from rpg.experiments.sweep import run_sweep
    from rpg.experiments.sweep_table import print_sweep

    table = run_sweep(file, jobs=jobs, only=only or (), say=console.print)
    rows = json.loads(table.with_suffix(".json").read_text())
    print_sweep(rows, console)
    console.print(f"table: {table}")
    return {"table": str(table), "rows": rows}


def unseen(
    config: o.OtherConfig = None, overrides: o.Overrides = None, seeds: o.NumSeeds = 1, split: o.ScoredSplit = None,
    trajectory: o.Trajectory = None, device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:  # fmt: skip
    """Networks for tasks nobody trained: zoo of 1,022 tasks, training, comparison with all that is trivial.

    On several devices: accelerate launch -m rpg unseen CONFIG
    """
    settings = load(config or o.default_config("digits_unseen.yaml"), overrides)
    written = "pictures: {run}/distance.png, parameters.png"
    return held_out(settings, split, seeds, device, "unseen", trajectory, written, ignore_memory=ignore_memory)


def lora(
    config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None,
    function: o.Function = None, lower: o.Lower = None, higher: o.Higher = None, trajectory: o.Trajectory = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:  # fmt: skip
    """LoRA adapters: zoo, training, comparison with all that is trivial, for tasks nobody trained where there are any.

    Conditions may be of any kind, or none; without a task or a function that scores, adapters are compared by distance.
    On several devices: accelerate launch -m rpg lora CONFIG
    """
    from rpg.experiments.adapters import is_comparison_of_tasks

    settings = load(config or o.default_config("lora/tiny.yaml"), overrides)
    if function is None and is_comparison_of_tasks(settings):
        if lower or higher:
            raise InputError("--lower and --higher are for figures of your own; give --score, too")
        return held_out(settings, split, 1, device, "lora", trajectory, ignore_memory=ignore_memory)
    return figures(settings, split, (function, lower or (), higher or ()), device, trajectory, ignore_memory)


def fields(
    config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:  # fmt: skip
    """Neural fields of images or shapes: zoo, training, comparison in function space, pictures."""
    from rpg.devices import use_device
    from rpg.labs.fields.experiment import evaluate_fields, print_fields, run_fields

    settings, place = load(config or o.default_config("fields.yaml"), overrides), use_device(device)
    if split is not None:
        settings = _to_score(settings, split, place, ignore_memory)
        scored = "validation" if split == "validation" else "unseen"
        report = evaluate_fields(settings.run, split=scored, seed=settings.seed)
        print_fields(report, console)
        return {"run": settings.run, "split": split, **report}
    _guard_memory(settings, ignore_memory)
    with progress_bar("fitting fields") as collecting:
        report = run_fields(settings, progress=collecting)
    print_fields(report, console)
    console.print(f"figures: {settings.run}/evaluation.json\npictures: *.png beside it")
    return {"run": settings.run, "figures": f"{settings.run}/evaluation.json", **report}


def metric(
    config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:  # fmt: skip
    """Networks of a wished loss: whole training runs, a generator that goes on from weights, optimizers beside it."""
    from rpg.devices import use_device
    from rpg.labs.training_runs.experiment import evaluate_metric, print_metric, run_metric

    settings, place = load(config or o.default_config("gpt.yaml"), overrides), use_device(device)
    if split is not None:
        scored = "validation" if split == "validation" else "unseen"
        report = evaluate_metric(settings.run, split=scored, seed=settings.seed)
        print_metric(report, console)
        return {"run": settings.run, "split": split, **report}
    _guard_memory(settings, ignore_memory)
    with progress_bar("collecting the runs") as collecting, training_bar(f"training on {place}") as training:
        report = run_metric(settings, progress={"collect": collecting, **training})
    print_metric(report, console)
    console.print(f"figures: {settings.run}/evaluation.json\npicture: {settings.run}/wishes.png")
    return {"run": settings.run, "figures": f"{settings.run}/evaluation.json", **report}


def render(
    files: o.Fields, size: o.Resolution = 64, output: o.PictureFolder = None, config: o.FieldsConfig = None
) -> dict[str, Any]:
    """Draw neural fields as PNG files, and solid shapes as PLY meshes too, at any resolution."""
    from rpg.labs.fields.pictures import render_files

    written = list(render_files(files, size, output, load(config, None) if config else None))
    console.print(*written, sep="\n")
    return {"files": [str(path) for path in written]}


def demo(
    config: Annotated[Path | None, o.option("Configuration (default: configs/demo.yaml).")] = None,
    overrides: o.Overrides = None, seeds: o.NumSeeds = 1, split: o.ScoredSplit = None, device: o.Device = "auto",
    ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:  # fmt: skip
    """Tiny networks for sensors that nobody calibrated: zoo, training, generation from settings, comparison."""
    from rpg.devices import use_device
    from rpg.evaluation.table import print_report
    from rpg.experiments.sensors import evaluate_sensors, run_sensors

    settings, place = load(config or o.default_config("demo.yaml"), overrides), use_device(device)
    if split is not None:
        report = evaluate_sensors(settings.run, split=split, seed=settings.seed)
    else:
        _guard_memory(settings, ignore_memory)
        with progress_bar("collecting the zoo") as collecting, training_bar(f"training on {place}") as training:
            report = run_sensors(settings, progress={"collect": collecting, **training}, seeds=seeds)
    then = f"rpg generate {settings.run} --setting angle=137 --setting inverted=true --output mine"
    print_report(report, console, folder=settings.run, then=then)
    return {"run": settings.run, "figures": f"{settings.run}/evaluation.json", "networks": report.means()}


def single(
    config: Path, overrides: o.Overrides = None, device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False
) -> dict[str, Any]:
    """Networks like those of a zoo of one task: zoo, training, generation, scores."""
    from rpg.devices import use_device
    from rpg.evaluation.tables import means_of, print_table
    from rpg.experiments.single import run_all

    settings, place = load(config, overrides or []), use_device(device)
    _guard_memory(settings, ignore_memory)
    with (
        progress_bar("collecting the zoo") as collecting,
        training_bar(f"training on {place}") as training,
        progress_bar("scoring") as scoring,
    ):
        result = run_all(settings, progress={"collect": collecting, **training, "score": scoring})
    print_table(result, console)
    console.print(f"run folder: {settings.run}\npicture:    {Path(settings.run) / 'scatter.png'}")
    return {"run": settings.run, "figures": f"{settings.run}/evaluation.json", "networks": means_of(result)}


def run(
    config: o.ConfigFile, overrides: o.Overrides = None, device: o.Device = "auto",
    ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:  # fmt: skip
    """All that a configuration describes, in a row: zoo, training, generation, scores beside originals and baselines.

    Its task says which experiment that is: one of `rpg demo`, `unseen`, `lora`, `fields`, `metric`, lottery tickets, or
    figures of the task's own.
    """
    from rpg.tasks import build_task
    from rpg.tasks.base import Classifier, ImageTaskFamily, TaskFamily

    settings = load(config, overrides)
    task = build_task(settings.task) if settings.task is not None else None
    kind = settings.task.name if settings.task is not None else ""
    how: Any = {"device": device, "ignore_memory": ignore_memory}
    if kind in ("fields", "trajectories"):
        return {"fields": fields, "trajectories": metric}[kind](config, overrides, **how)
    if kind == "tickets":
        return tickets(settings, **how)
    if kind == "sensors" and settings.model.condition.kind == "examples":
        return examples(settings, **how)
    if kind == "sensors":
        return demo(config, overrides, **how)
    if isinstance(task, ImageTaskFamily):
        return unseen(config, overrides, **how)
    if isinstance(task, TaskFamily):
        return lora(config, overrides, **how)
    if isinstance(task, Classifier):
        return single(config, overrides, **how)
    return figures(settings, None, (None, (), ()), trajectory=None, **how)


def examples(settings: Any, device: str, ignore_memory: bool) -> dict[str, Any]:
    """Networks asked for by examples; draws of them where the model has a prior."""
    from rpg.devices import use_device
    from rpg.evaluation.table import print_report
    from rpg.experiments.by_examples import run_by_examples
    from rpg.experiments.draws import run_draws

    use_device(device)
    _guard_memory(settings, ignore_memory)
    experiment = run_by_examples if settings.model.state.of == "none" else run_draws
    with progress_bar("collecting") as collecting, training_bar("training") as training:
        report = experiment(settings, {"collect": collecting, **training})
    print_report(report, console, folder=settings.run, then=f"rpg generate {settings.run} --examples FOLDER --num 16")
    return {"run": settings.run, "figures": f"{settings.run}/evaluation.json", "networks": report.means()}


def tickets(settings: Any, device: str, ignore_memory: bool) -> dict[str, Any]:
    """Lottery tickets: search, training, comparison with all that is trivial on tasks nobody searched one for."""
    from rpg.devices import use_device
    from rpg.labs.tickets.experiment import print_tickets, run_tickets

    use_device(device)
    _guard_memory(settings, ignore_memory)
    with progress_bar("searching tickets") as collecting, progress_bar("training") as training:
        report = run_tickets(settings, progress={"collect": collecting, "train": training})
    print_tickets(report, console)
    console.print(f"figures: {settings.run}/evaluation.json\npicture: {settings.run}/tickets.png")
    return {"run": settings.run, "figures": f"{settings.run}/evaluation.json", **report}


def _guard_memory(settings: Any, ignore: bool) -> None:
    from rpg.planning.collection import collection_need
    from rpg.planning.guard import training_need

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
    console.print(f"{settings.run} learns from the validation split; choices are made by {chosen.run}, which does not")
    _guard_memory(chosen, ignore_memory)
    with progress_bar("collecting") as collecting, training_bar(f"training on {place}") as training:
        if chosen.task is not None:
            collect(chosen, progress=collecting)
        train_or_continue(chosen, progress=training["train"], watch=training["watch"])
    return chosen


def figures(
    settings: Any, split: str | None, judge: Any, device: str, trajectory: str | None, ignore_memory: bool
) -> dict[str, Any]:
    """Networks judged by figures: collect what the task trains, train, score; or score a run alone."""
    from rpg.evaluation.scores.show import means_of, print_scores
    from rpg.evaluation.workers import Workers
    from rpg.experiments.adapters import prepare_adapters
    from rpg.experiments.scores import Judge, evaluate_run_by_scores
    from rpg.generation.sampler import join_processes

    partition, place = join_processes(device)
    if split is None:
        _guard_memory(settings, ignore_memory)
        with progress_bar("collecting") as collecting, training_bar(f"training on {place}") as training:
            prepare_adapters(settings, {"collect": collecting, **training})
    elif settings.model.condition.kind != "none":
        settings = _to_score(settings, split, place, ignore_memory)
    with progress_bar(f"scoring on {place}") as advance:
        workers = Workers(partition, advance)
        result = evaluate_run_by_scores(
            settings.run, Judge(*judge), seed=settings.seed, split=split, workers=workers, trajectory=trajectory
        )
    print_scores(result, console)
    console.print(f"figures:  {settings.run}/evaluation.json\nreport:   {settings.run}/report.html")
    return {"run": settings.run, "figures": f"{settings.run}/evaluation.json", "networks": means_of(result)}


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
) -> dict[str, Any]:
    """Run an experiment on unseen tasks, or score a split of one that was run before."""
    from rpg.evaluation.workers import Workers
    from rpg.experiments.held_out_table import means_of_tasks, print_held_out
    from rpg.experiments.held_out_tasks import evaluate_held_out, run_held_out
    from rpg.experiments.tasks_report import wished_task, write_tasks_report
    from rpg.generation.sampler import join_processes

    partition, place = join_processes(device)
    workers = Workers(partition)
    wish = None if trajectory is None else wished_task(settings, trajectory)
    if split is not None:
        settings = _to_score(settings, split, place, ignore_memory)
        report = evaluate_held_out(settings.run, seed=settings.seed, split=split, workers=workers)
    else:
        _guard_memory(settings, ignore_memory)
        with progress_bar("collecting") as collecting, training_bar(f"training on {place}") as training:
            progress = {"collect": collecting, **training}
            report = run_held_out(settings, progress=progress, seeds=seeds, workers=workers)
    print_held_out(report, console)
    told = {"run": settings.run, "tasks": {name: means_of_tasks(report[name]) for name in ("unseen", "seen")}}
    if split == "validation" or not workers.is_first:  # which writes nothing
        return told
    options = {"--split": split, "--trajectory": trajectory}
    words = [word for name, value in options.items() if value for word in (name, value)]
    write_tasks_report(settings.run, " ".join([f"rpg {command}", *words]), wish)
    console.print(f"figures:  {settings.run}/evaluation.json\nreport:   {settings.run}/report.html")
    console.print(written.format(run=settings.run), end="\n" if written else "")
    return {**told, "figures": f"{settings.run}/evaluation.json", "report": f"{settings.run}/report.html"}
