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
    from rpg.devices import join_processes
    from rpg.evaluation.engine import Workers
    from rpg.evaluation.page.page import print_report
    from rpg.experiments.driver import evaluate as judge
    from rpg.experiments.driver import next_command
    from rpg.planning.plan import evaluation_need

    partition, place = join_processes(device)
    if not (run / "zoo.json").is_file():
        guard(lambda: evaluation_need(run), ignore_memory)
    with progress_bar(f"scoring on {place}") as advance:
        report = judge(
            run, function, num=num, seed=seed, lower=lower or (), higher=higher or (), changes=overrides or (),
            output=output, path_condition=path_condition, workers=Workers(partition, advance),
        )  # fmt: skip
    folder = output or run
    print_report(report, console, folder=folder, full=full, then=next_command(run))
    return told_of(report, run, folder)


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
    from rpg.devices import join_processes
    from rpg.evaluation.engine import Workers
    from rpg.evaluation.page.page import print_checkpoints
    from rpg.experiments.score_files import score_checkpoints
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
