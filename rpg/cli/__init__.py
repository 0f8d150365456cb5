"""The command line: a table of commands, each a short function; here those that judge networks.

What a command needs is imported when it runs: torch and what builds on it load for seconds, ``rpg --help`` must not.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import rpg
from rpg.cli import experiments, making, sharing
from rpg.cli import parameters as o
from rpg.console import Voice, console, progress_bar, run_command, voice_of
from tokenization.checkpoint.progress import listen
from tokenization.errors import InputError

# Read when torch is first imported. Idle OpenMP threads that spin make everything several times slower as soon as
# another program wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# These two warn as soon as another library imports them, whether or not they are used.
for name in ("DeepSpeed", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)


def say_version(asked: bool) -> None:
    """Print the version and end, if that was asked."""
    if asked:
        print(f"rpg {rpg.__version__}")
        raise typer.Exit


Version = Annotated[bool, o.flag("Print the version.", "--version", callback=say_version, is_eager=True)]

app = typer.Typer(
    help="Generate neural-network weights: learn from a zoo of trained checkpoints and write new ones that work.",
    pretty_exceptions_enable=False,
)


@app.callback()
def options(version: Version = False, quiet: o.Quiet = False, as_json: o.AsJson = False) -> None:
    """Generate neural-network weights: learn from a zoo of trained checkpoints and write new ones that work."""


def evaluate(
    run: o.Evaluated, num: o.NumScored = None, seed: o.Seed = 0, function: o.Function = None, lower: o.Lower = None,
    higher: o.Higher = None, overrides: o.Overrides = None, output: o.ResultFolder = None,
    path_condition: o.DenoisingPath = None, device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
    full: o.Full = False,
) -> dict[str, Any]:  # fmt: skip
    """Compare generated networks with originals and simple baselines; for a zoo, only originals and baselines.

    With neither a task nor a function that scores, networks are compared by their weights alone.
    On several devices: accelerate launch -m rpg evaluate RUN
    """
    from rpg.devices import join_processes
    from rpg.evaluation.engine import Workers
    from rpg.evaluation.page.page import print_report
    from rpg.experiments.driver import evaluate as judge
    from rpg.experiments.driver import next_command
    from rpg.planning.plan import evaluation_need, guard

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
    return report.told(run, folder)


def score(
    files: o.Scored, function: o.Function = None, overrides: o.Overrides = None, split: o.RowSplit = "test",
    key: o.Key = None, strip: o.Strip = None, device: o.Device = "auto",
) -> dict[str, Any]:  # fmt: skip
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
    config = making.load(configs[0], overrides) if configs else None
    with progress_bar(f"scoring on {place}") as advance:
        workers = Workers(partition, advance)
        scores = score_checkpoints(checkpoints, function, config, split, workers, Chosen(key, strip or ""))
    print_checkpoints(scores, console)
    return {"checkpoints": scores}


COMMANDS: dict[str, tuple[Callable[..., Any], ...]] = {
    "Start": (experiments.demo, experiments.run, sharing.app, sharing.doctor),
    "Your checkpoints": (
        making.collect, making.inspect, making.plan, making.train, making.generate, evaluate, score, making.export,
        making.merge, making.align,
    ),
    "Experiments": (
        experiments.unseen, experiments.lora, experiments.fields, experiments.metric, experiments.sweep,
        experiments.render,
    ),
    "Share": (sharing.push, sharing.pull),
}  # fmt: skip
"""All commands in the order of ``rpg --help``, by panel."""

for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)

RESUMED = {
    "train": "continue with --resume",
    "collect": "run it again to continue where it stopped",
    "sweep": "run it again to continue where it stopped",
    "generate": "the files written so far are complete",
    **dict.fromkeys(
        ("unseen", "lora", "fields", "metric", "demo", "run"), "collected checkpoints are kept; run it again"
    ),
}
"""What an interrupted command leaves, and how to continue."""


def main() -> None:
    """Run the command line; every mistake is one line on standard error and exit code 2 (`rpg.console.run_command`)."""
    words, voice = voice_of(sys.argv[1:])
    listen(progress_bar)
    if words and "--help" not in words and sys.stderr.isatty() and voice == Voice():
        print(f"rpg {words[0]}: loading …", file=sys.stderr, flush=True)  # torch alone takes seconds
    resumed = next((RESUMED[word] for word in words if word in RESUMED), "")
    run_command(lambda: app(words or ["--help"], prog_name="rpg", standalone_mode=False), voice, resumed)
