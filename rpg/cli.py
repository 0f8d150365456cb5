"""The command line: a table of commands, each a short function."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenization.condition import ConditionKind
from tokenization.errors import InputError

# Read when torch is first imported. Idle OpenMP threads that spin make everything several times slower as soon as
# another program wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Generate neural-network weights: learn from a zoo of trained checkpoints, write new ones that work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

ConfigFile = Annotated[Path, typer.Argument(help="A YAML configuration, e.g. configs/digits.yaml.", metavar="CONFIG")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder (or a generator folder).", metavar="RUN")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change a field: --set train.steps=100. Can be given several times.", metavar="KEY=VALUE"
    ),
]


@app.command()
def collect(
    config: Annotated[Path | None, typer.Argument(help="A configuration with a task.", metavar="[CONFIG]")] = None,
    overrides: Overrides = None,
    source: Annotated[str | None, typer.Option("--from", help="Your own checkpoints: a folder or a glob.")] = None,
    zoo: Annotated[Path | None, typer.Option(help="With --from: the zoo folder to make.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="With --from: CSV or JSONL with file, run, step, condition of each checkpoint.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="With --from: regular expression on file names with groups run, step, condition.")
    ] = None,
    condition: Annotated[
        str | None,
        typer.Option(help="With --from: binary, class, vector or text; found out from the values if left out."),
    ] = None,
) -> None:
    """Make a zoo: train checkpoints for a task, or adopt your own (safetensors stay where they are)."""
    if source is not None:
        from tokenization.sources import collect_from

        if zoo is None:
            raise InputError("--zoo", "nothing", "the zoo folder to make", "for example --zoo runs/zoos/mine")
        with progress_bar("reading") as advance:
            kind = cast(ConditionKind | None, condition)
            made = collect_from(source, zoo, table=table, pattern=pattern, condition=kind, progress=advance)
    elif config is not None:
        from rpg.workflow import collect as collect_task

        with progress_bar("collecting") as advance:
            made = collect_task(load(config, overrides), progress=advance)
    else:
        raise InputError("collect", "nothing to collect", "a CONFIG with a task, or --from FOLDER")
    console.print(f"{len(made)} checkpoints of {made.num_runs} run(s) in {made.path}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A zoo folder, a checkpoint of any kind, or a configuration.")],
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the whole zoo: digests, finite values, into tokens and back.")
    ] = False,
) -> None:
    """Show layers, tokens, padding, sizes and memory before anything is trained."""
    from rpg.inspection import inspect as describe

    for table in describe(path, overrides or [], verify=verify):
        console.print(table)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run exactly where it was saved.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard the run that is there.")] = False,
) -> None:
    """Train a generator on a zoo (also: accelerate launch scripts/train.py CONFIG …)."""
    from rpg.training import train as run

    with progress_bar("training") as advance:
        folder = run(load(config, overrides), resume=resume, overwrite=overwrite, progress=advance, say=console.print)
    console.print(f"generator in {folder}")


@app.command()
def generate(
    run: RunFolder,
    num: Annotated[int, typer.Option(help="How many networks.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for the files (default: RUN/generated).")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps (default: the configuration's).")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, heun, ddpm, ddim or dpm-solver++.")] = None,
    condition: Annotated[
        str | None, typer.Option(help="Comma-separated values, e.g. 1,0,0,1 for a binary vector.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")] = None,
    state: Annotated[str | None, typer.Option(help="stored or gaussian: which permutation states to draw.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Write new checkpoints as safetensors that plain load_state_dict takes."""
    from rpg.generator import Generator

    generator = Generator.from_pretrained(run, device)
    with progress_bar("generating") as advance:
        paths = generator.generate(
            num,
            seed=seed,
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            state=state,
            condition=parse_condition(condition),
            output=output or run / "generated",
            progress=advance,
        )
    console.print(f"{len(paths)} network(s) in {output or run / 'generated'}")


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A checkpoint, or a run or generator folder to generate one with.", metavar="SOURCE")
    ],
    to: Annotated[str, typer.Option(help="timm, transformers, peft or torch (a pickle).", metavar="FORM")],
    output: Annotated[Path, typer.Option(help="The file (timm, torch) or folder (transformers, peft) to write.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the network's config.json, or (peft) the zoo or adapter with its configuration."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the network, if one is generated.")] = 0,
    condition: Annotated[str | None, typer.Option(help="Its condition: comma-separated values.")] = None,
) -> None:
    """Write weights in the form that timm, transformers or PEFT loads by itself."""
    from rpg.export import export as write

    with progress_bar("generating") as advance:
        path = write(source, to, output, base=base, seed=seed, condition=parse_condition(condition), progress=advance)
    console.print(f"{to}: {path}")


@app.command()
def evaluate(
    run: RunFolder,
    num: Annotated[int | None, typer.Option(help="Networks to generate (default: the configuration's).", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated networks.")] = 0,
) -> None:
    """Score generated networks beside originals and trivial baselines."""
    from rpg.evaluation.report import print_table
    from rpg.workflow import evaluate_run

    print_table(evaluate_run(run, num=num, seed=seed))
    console.print(f"figures: {run / 'evaluation.json'}\npicture: {run / 'scatter.png'}")


@app.command()
def demo(
    config: Annotated[Path | None, typer.Option(help="Configuration (default: configs/digits.yaml).")] = None,
    overrides: Overrides = None,
) -> None:
    """The whole job on real handwritten digits: zoo, training, generation, scores."""
    from rpg.evaluation.report import print_table
    from rpg.workflow import run_all

    settings = load(config or default_config("digits.yaml"), [f"run={Path('runs/demo')}", *(overrides or [])])
    with progress_bar("collecting the zoo") as collecting, progress_bar("training") as training:
        result = run_all(settings, progress={"collect": collecting, "train": training})
    print_table(result)
    console.print(f"run folder: {settings.run}\npicture:    {Path(settings.run) / 'scatter.png'}")


def load(path: Path, overrides: list[str] | None) -> Any:
    """Read a configuration file with its overrides."""
    from rpg.config import Config

    return Config.load(path, overrides)


def default_config(name: str) -> Path:
    """A configuration that comes with the package: beside it in a checkout, inside it when installed."""
    package = Path(__file__).parent
    inside = package / "configs" / name
    return inside if inside.exists() else package.parent / "configs" / name


def parse_condition(text: str | None) -> list[float] | None:
    """Comma-separated values as numbers."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError("--condition", repr(text), "comma-separated numbers", "for example 1,0,0,1") from None


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A progress bar that appears with its first report; yields its callback (done, total, loss=None)."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        redirect_stdout=False,
    )
    tasks: list[Any] = []

    def advance(done: int, total: int, loss: float | None = None) -> None:
        if not tasks:
            bar.start()
            tasks.append(bar.add_task(title, total=total, note=""))
        bar.update(tasks[0], completed=done, total=total, note="" if loss is None else f"loss {loss:.4f}")
        if done >= total:
            bar.stop()

    try:
        yield advance
    finally:
        bar.stop()


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
