"""The command line: a table of commands, each a short function."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from rpg.console import console, progress_bar
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionKind

# Read when torch is first imported. Idle OpenMP threads that spin make everything several times slower as soon as
# another program wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# These two warn as soon as another library imports them, whether or not they are used.
for name in ("DeepSpeed", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)

app = typer.Typer(
    help="Generate neural-network weights: learn from a zoo of trained checkpoints, write new ones that work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
        Path | None,
        typer.Option(
            "--table",
            "--conditions",
            help="With --from: CSV or JSONL with file, run, step, condition of each checkpoint.",
        ),
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
        from tokenization.zoo.importing import collect_from

        if zoo is None:
            raise InputError("--zoo", "nothing", "the zoo folder to make", "for example --zoo runs/zoos/mine")
        with progress_bar("reading") as advance:
            kind = cast(ConditionKind | None, condition)
            made = collect_from(source, zoo, table=table, pattern=pattern, condition=kind, progress=advance)
    elif config is not None:
        from rpg.experiments.single import collect as collect_task

        with progress_bar("collecting") as advance:
            made = collect_task(load(config, overrides), progress=advance)
    else:
        raise InputError("collect", "nothing to collect", "a CONFIG with a task, or --from FOLDER")
    console.print(f"{len(made)} checkpoints of {made.num_runs} run(s) in {made.path}")


@app.command()
def align(
    zoo: Annotated[Path, typer.Argument(help="A zoo of several runs.")],
    output: Annotated[Path, typer.Argument(help="The zoo to write.")],
) -> None:
    """Put the hidden units of all runs into one order (Git Re-Basin); every network computes what it did."""
    from rpg.evaluation.alignment import align_zoo

    made = align_zoo(zoo, output)
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
    from rpg.planning.inspect import inspect as describe

    for table in describe(path, overrides or [], verify=verify):
        console.print(table)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    memory: Annotated[
        str | None, typer.Option(help="Of a GPU: 24GB or a100; shows the largest target network that fits.")
    ] = None,
    network: Annotated[str | None, typer.Option(help="The target network, by timm's name; needs no zoo.")] = None,
    checkpoints: Annotated[int | None, typer.Option(help="In a zoo that is not there yet (default: 50).")] = None,
    condition_size: Annotated[int | None, typer.Option(help="Values of a condition, if no zoo tells.")] = None,
    processes: Annotated[int, typer.Option(help="Processes that share a training step.", min=1)] = 1,
) -> None:
    """Estimate parameters, FLOPs and peak memory of training and generation, by component; computes nothing."""
    from rpg.planning.plan import find_subject, largest_network, make_plan, parse_memory
    from rpg.planning.tables import plan_tables

    settings = load(config, overrides)
    subject = find_subject(settings, network=network, num_checkpoints=checkpoints, condition_size=condition_size)
    made = make_plan(settings, subject, num_processes=processes)
    largest = largest_network(settings, subject, parse_memory(memory)) if memory else None
    layout = subject.layout
    console.print(f"{layout.num_values:,} values in {layout.num_tokens:,} tokens of {layout.token_size:,}")
    for table in plan_tables(made, largest):
        console.print(table)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run exactly where it was saved.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard the run that is there.")] = False,
) -> None:
    """Train a generator on a zoo (also: accelerate launch scripts/train.py CONFIG …)."""
    from rpg.training.loop import train as run

    with progress_bar("training") as advance:
        folder = run(load(config, overrides), resume=resume, overwrite=overwrite, progress=advance, say=console.print)
    console.print(f"generator in {folder}")


@app.command()
def generate(
    run: RunFolder,
    num: Annotated[int, typer.Option("--num", "-n", help="How many networks.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for the files (default: RUN/generated).")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps (default: the configuration's).")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, heun, ddpm, ddim or dpm-solver++.")] = None,
    condition: Annotated[
        str | None, typer.Option(help="Comma-separated values, e.g. 1,0,0,1 for a binary vector.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="The task's positive classes by name or number, e.g. 1,3,5 or cat,dog.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The task in words: any text, or class names where the condition is binary.")
    ] = None,
    prompt_model: Annotated[
        str | None,
        typer.Option(
            help="Language model or sentence encoder for --prompt: a name or a local path (of a generator that takes "
            "texts: where its own encoder is)."
        ),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")] = None,
    state: Annotated[str | None, typer.Option(help="stored or gaussian: which permutation states to draw.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default), cuda, …; of a launched process its own.")] = None,
) -> None:
    """Write new checkpoints: safetensors that plain load_state_dict takes, or adapters as PEFT folders.

    On several devices: accelerate launch scripts/generate.py RUN -n NUM
    """
    from rpg.generation.conditions import choose_condition
    from rpg.generation.generator import Generator
    from rpg.generation.partition import join_processes

    partition, own_device = join_processes()
    generator = Generator.from_pretrained(run, device or own_device)
    vector = choose_condition(generator, condition, classes, prompt, prompt_model)
    with progress_bar("generating") as advance:
        paths = generator.generate(
            num,
            seed=seed,
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            state=state,
            condition=vector,
            output=output or run / "generated",
            progress=advance,
            partition=partition,
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
    from rpg.generation.conditions import parse_condition
    from rpg.generation.export import export as write

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
    from rpg.evaluation.tables import print_table
    from rpg.experiments.single import evaluate_run

    print_table(evaluate_run(run, num=num, seed=seed))
    for kind, name in (("figures", "evaluation.json"), ("picture", "scatter.png"), ("report", "report.html")):
        console.print(f"{kind + ':':<8} {run / name}")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep file, e.g. configs/sweeps/noise.yaml.", metavar="SWEEP")],
    jobs: Annotated[int, typer.Option(help="Experiments at a time.", min=1)] = 1,
) -> None:
    """Run a list of overrides (resumable, in parallel) and write one table."""
    from rpg.experiments.sweep import run_sweep

    table = run_sweep(file, jobs=jobs, say=console.print)
    console.print(table.read_text(), markup=False, soft_wrap=True)
    console.print(f"table: {table}")


@app.command()
def unseen(
    config: Annotated[Path | None, typer.Argument(help="Default: configs/digits_unseen.yaml.")] = None,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="Generators to train, by seed.", min=1)] = 1,
    split: Annotated[
        str | None, typer.Option(help="Only score a run: test, or validation (tasks and images) to make choices by.")
    ] = None,
) -> None:
    """Networks for tasks nobody trained: zoo of 1,022 tasks, training, comparison with all that is trivial."""
    from rpg.experiments.held_out_tasks import evaluate_unseen, print_unseen, run_unseen

    settings = load(config or default_config("digits_unseen.yaml"), overrides)
    if split is not None:
        print_unseen(evaluate_unseen(settings.run, seed=settings.seed, image_split=split), console)
        return
    with progress_bar("collecting") as collecting, progress_bar("training") as training:
        report = run_unseen(settings, progress={"collect": collecting, "train": training}, seeds=seeds)
    print_unseen(report, console)
    console.print(f"figures:  {settings.run}/evaluation.json\npictures: {settings.run}/distance.png, parameters.png")


@app.command()
def lora(
    config: Annotated[Path | None, typer.Argument(help="Default: configs/lora/tiny.yaml.")] = None,
    overrides: Overrides = None,
    split: Annotated[
        str | None, typer.Option(help="Only score a run: test, or validation (tasks and rows) to make choices by.")
    ] = None,
) -> None:
    """LoRA adapters for tasks nobody trained: zoo, training, comparison with all that is trivial."""
    from rpg.experiments.lora import evaluate_lora, print_lora, run_lora

    settings = load(config or default_config("lora/tiny.yaml"), overrides)
    if split is not None:
        print_lora(evaluate_lora(settings.run, seed=settings.seed, split=split), console)
        return
    with progress_bar("training adapters") as collecting, progress_bar("training") as training:
        report = run_lora(settings, progress={"collect": collecting, "train": training})
    print_lora(report, console)
    console.print(f"figures:  {settings.run}/evaluation.json")


@app.command()
def score(
    config: ConfigFile,
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders.", metavar="ADAPTER…")],
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="Rows of every task's file: test or validation.")] = "test",
) -> None:
    """Score LoRA or DoRA adapters on the held-out rows of every task of a configuration."""
    from rpg.experiments.lora import print_scores, score_folders

    print_scores(score_folders(load(config, overrides), adapters, split), console)


@app.command()
def demo(
    config: Annotated[Path | None, typer.Option(help="Configuration (default: configs/digits.yaml).")] = None,
    overrides: Overrides = None,
) -> None:
    """The whole job on real handwritten digits: zoo, training, generation, scores."""
    from rpg.evaluation.tables import print_table
    from rpg.experiments.single import run_all

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


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
