"""Commands that judge networks, and what several commands read from their arguments."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rpg.cli import parameters as o
from rpg.console import console, progress_bar
from tokenization.errors import InputError

NUM_WATCHED = 4
"""Networks that are scored now and then while a generator is trained."""


def load(path: Path | None, overrides: list[str] | None, default: str = "") -> Any:
    """Read a configuration file with its overrides; the package's own ``default`` where none is named."""
    from rpg.config import Config
    from rpg.section import default_config

    return Config.load(path or default_config(default), overrides)


@contextlib.contextmanager
def training_bar(title: str) -> Iterator[dict[str, Callable[..., None]]]:
    """A progress bar of training with the accuracy on validation data now and then: ``train`` and ``watch``."""
    validation: Any = None
    told = ""
    with progress_bar(title) as bar:

        def watch(generator: Any) -> None:
            nonlocal validation, told
            if validation is None:
                from rpg.experiments.comparison import Validation
                from tokenization.zoo.zoo import Zoo

                validation = Validation(generator.config, Zoo.open(generator.config.zoo), NUM_WATCHED)
            told = validation.told(generator)

        def advance(done: int, total: int, loss: float) -> None:
            bar(done, total, loss, told)

        yield {"train": advance, "watch": watch}


def guard(find: Callable[[], Any], ignore: bool) -> None:
    """Stop, before anything begins, where more memory is needed than is free.

    Args:
        find: what is needed, as `rpg.planning.plan` finds it.
        ignore: whether the user said to begin all the same; then nothing is found out.
    """
    if ignore:
        return
    from rpg.planning.plan import require_memory

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever is to be warned of, the command warns of
            need = find()
    except InputError:  # the command itself says it, or does without what is missing
        return
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        console.print(f"the memory needed could not be estimated ({reason}); starting without the check", markup=False)
        return
    if need is not None:
        require_memory(need)


def evaluate(
    run: o.Evaluated,
    num: o.NumScored = None,
    seed: o.Seed = 0,
    function: o.Function = None,
    lower: o.Lower = None,
    higher: o.Higher = None,
    overrides: o.Overrides = None,
    output: o.ResultFolder = None,
    path_condition: o.DenoisingPath = None,
    device: o.Device = "auto",
    ignore_memory: o.IgnoreMemory = False,
    full: o.Full = False,
) -> dict[str, Any]:
    """Compare generated networks with originals and simple baselines; for a zoo, only originals and baselines.

    With neither a task nor a function that scores, networks are compared by their weights alone.
    On several devices: accelerate launch -m rpg evaluate RUN
    """
    from rpg.evaluation.table import print_report
    from rpg.evaluation.workers import Workers
    from rpg.experiments.driver import Experiment
    from rpg.experiments.evaluating import Judge, evaluate_run, evaluate_zoo
    from rpg.generation.folders import find_folder, load_config
    from rpg.generation.sampler import join_processes
    from rpg.planning.plan import evaluation_need

    partition, place = join_processes(device)
    judge, is_zoo = Judge(function, lower or (), higher or ()), (run / "zoo.json").is_file()
    if is_zoo and num is not None:
        raise InputError(f"{run} is a zoo, of which nothing is generated; leave --num out")
    if is_zoo and path_condition is not None:
        raise InputError("--denoising-path is for generators with conditions; a zoo generates nothing")
    if not is_zoo and function is None and (own := experiment_of_sensors(run)) is not None:
        given = {"--num": num, "--lower": lower, "--higher": higher, "--set": overrides, "--output": output}
        if refused := [name for name, value in {**given, "--denoising-path": path_condition}.items() if value]:
            raise InputError(
                f"{refused[0]} is not for runs of sensors, which are judged in a way of their own; leave it out"
            )
        report = own.evaluate(run, seed=seed)
        print_report(report, console, folder=run, full=full, then=own.next(load_config(find_folder(run)), run))
        return told_of(report, run, run)
    if not is_zoo:
        guard(lambda: evaluation_need(run), ignore_memory)
    with progress_bar(f"scoring on {place}") as advance:
        workers = Workers(partition, advance)
        if is_zoo:
            from rpg.config import Config

            config = Config.defaults([*(overrides or []), f"seed={seed}"])
            report = evaluate_zoo(run, judge, config, output=output, workers=workers)
        else:
            report = evaluate_run(
                run, judge, num=num, seed=seed, output=output, workers=workers, path_condition=path_condition,
                changes=overrides or (),
            )  # fmt: skip
    folder = output or run
    then = f"rpg inspect {run} --write-config mine.yaml"
    if not is_zoo:
        then = Experiment("networks", evaluate_run).next(load_config(find_folder(run)), run)
    print_report(report, console, folder=folder, full=full, then=then)
    return told_of(report, run, folder)


def experiment_of_sensors(run: Path) -> Any:
    """What judges a run of sensors: by settings, words or examples, or draws; None for other runs."""
    from rpg.experiments.driver import experiment_of
    from rpg.generation.folders import find_folder, load_config, require_files

    require_files(folder := find_folder(run))
    config = load_config(folder)
    return experiment_of(config) if config.task is not None and config.task.name == "sensors" else None


def told_of(report: Any, run: Any, folder: Any) -> dict[str, Any]:
    """What a command that evaluates tells a machine."""
    return {
        "run": str(run),
        "figures": f"{folder}/evaluation.json",
        "report": f"{folder}/report.html",
        "verdict": report.verdict,
        "networks": report.means(),
    }


def score(
    files: o.Scored,
    function: o.Function = None,
    overrides: o.Overrides = None,
    split: o.RowSplit = "test",
    key: o.Key = None,
    strip: o.Strip = None,
    device: o.Device = "auto",
) -> dict[str, Any]:
    """Score single checkpoints with a task or with your own function."""
    from rpg.evaluation.table import print_checkpoints
    from rpg.evaluation.workers import Workers
    from rpg.experiments.score_files import score_checkpoints
    from rpg.generation.sampler import join_processes
    from tokenization.checkpoint.weights import Chosen

    partition, place = join_processes(device)
    configs = [file for file in files if file.suffix in (".yaml", ".yml")]
    checkpoints = [file for file in files if file not in configs]
    if len(configs) > 1 or not checkpoints:
        found = f"{len(configs)} configurations and {len(checkpoints)} checkpoints"
        raise InputError(f"rpg score takes checkpoints and at most one CONFIG, but here are {found}")
    config = load(configs[0], overrides) if configs else None
    with progress_bar(f"scoring on {place}") as advance:
        workers = Workers(partition, advance)
        scores = score_checkpoints(checkpoints, function, config, split, workers, Chosen(key, strip or ""))
    print_checkpoints(scores, console)
    return {"checkpoints": scores}
