"""The commands that run whole experiments."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Annotated, Any

from rpg.cli import parameters as o
from rpg.cli.reading import guard, load, training_bar
from rpg.console import console, progress_bar


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
    full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """Networks for tasks nobody trained: zoo of 1,022 tasks, training, comparison with simple baselines.

    On several devices: accelerate launch -m rpg unseen CONFIG
    """
    from rpg.experiments.held_out_tasks import task_family

    settings = load(config or o.default_config("digits_unseen.yaml"), overrides)
    task_family(settings)
    how: Any = {"device": device, "ignore_memory": ignore_memory, "full": full}
    return experiment(settings, "unseen", split=split, seeds=seeds, trajectory=trajectory, **how)


def lora(
    config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None,
    function: o.Function = None, lower: o.Lower = None, higher: o.Higher = None, trajectory: o.Trajectory = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False, full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """LoRA adapters: zoo, training, comparison with simple baselines, for unseen tasks where there are any.

    Conditions may be of any kind, or none; without a task or a function that scores, adapters are compared by distance.
    On several devices: accelerate launch -m rpg lora CONFIG
    """
    from rpg.experiments.driver import require_adapters

    settings = load(config or o.default_config("lora/tiny.yaml"), overrides)
    require_adapters(settings)
    judge = (function, lower or (), higher or ())
    how: Any = {"device": device, "ignore_memory": ignore_memory, "full": full}
    return experiment(settings, "lora", judge, split=split, trajectory=trajectory, **how)


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
    ignore_memory: o.IgnoreMemory = False, full: o.Full = False,
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
    print_report(report, console, folder=settings.run, full=full, then=then)
    return {"run": settings.run, "figures": f"{settings.run}/evaluation.json", "networks": report.means()}


def run(
    config: o.ConfigFile, overrides: o.Overrides = None, device: o.Device = "auto",
    ignore_memory: o.IgnoreMemory = False, full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """All that a configuration describes, in a row: zoo, training, generation, scores beside originals and baselines.

    Its task says which experiment that is: on networks, on unseen tasks, on fields, target losses or lottery tickets.
    """
    settings = load(config, overrides)
    kind = settings.task.name if settings.task is not None else ""
    how: Any = {"device": device, "ignore_memory": ignore_memory}
    if kind in ("fields", "trajectories"):
        return {"fields": fields, "trajectories": metric}[kind](config, overrides, **how)
    if kind == "tickets":
        return tickets(settings, **how)
    if kind == "sensors" and settings.model.condition.kind == "examples":
        return examples(settings, **how)
    if kind == "sensors":
        return demo(config, overrides, full=full, **how)
    return experiment(settings, "run", full=full, **how)


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
    said = f"{settings.run} learns from the validation split; choices are made by {chosen.run}, which does not"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    _guard_memory(chosen, ignore_memory)
    with progress_bar("collecting") as collecting, training_bar(f"training on {place}") as training:
        if chosen.task is not None:
            collect(chosen, progress=collecting)
        train_or_continue(chosen, progress=training["train"], watch=training["watch"])
    return chosen


def experiment(
    settings: Any, command: str, judge: Any = (None, (), ()), *, device: str, ignore_memory: bool, full: bool,
    split: str | None = None, seeds: int = 1, trajectory: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run an experiment, or judge a split of one that was run before."""
    from rpg.cli.scoring import told_of
    from rpg.evaluation.table import print_report
    from rpg.evaluation.workers import Workers
    from rpg.experiments.driver import Judge, experiment_of, run_experiment
    from rpg.generation.folders import find_folder, require_files
    from rpg.generation.sampler import join_processes
    from tokenization.zoo.locks import locked

    partition, place = join_processes(device)
    words = [f"rpg {command}", *(f"{n} {v}" for n, v in {"--split": split, "--trajectory": trajectory}.items() if v)]
    if split == "test":
        require_files(find_folder(settings.run))
    with locked(settings.run) if split is None else contextlib.nullcontext():
        chosen = experiment_of(settings, Judge(*judge), trajectory=trajectory, command=" ".join(words))
        if split is not None and (chosen.name != "networks" or settings.model.condition.kind != "none"):
            settings = _to_score(settings, split, place, ignore_memory)
        if split is None:
            _guard_memory(settings, ignore_memory)
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
    print_report(report, console, folder=settings.run, full=full, then=f"rpg generate {settings.run} --num 10")
    return told_of(report, settings.run, settings.run)
