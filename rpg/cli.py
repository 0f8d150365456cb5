"""The command line: a table of commands, each a short function.

What a command needs is imported when it runs: torch and what builds on it load for seconds, ``rpg --help`` must not.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from rpg import options as o
from rpg.console import console, progress_bar, run_command
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
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def collect(
    config: o.OtherConfig = None, overrides: o.Overrides = None, source: o.Source = None, zoo: o.NewZoo = None,
    table: o.Table = None, pattern: o.Pattern = None, condition: o.Kind = None,
) -> None:  # fmt: skip
    """Make a zoo: train checkpoints for a task, or adopt your own (safetensors stay where they are)."""
    if source is not None:
        from tokenization.zoo.importing import collect_from

        if zoo is None:
            raise InputError("Name the zoo folder to make, for example --zoo runs/zoos/mine.")
        with progress_bar("reading") as advance:
            kind = cast(ConditionKind | None, condition)
            made = collect_from(source, zoo, table=table, pattern=pattern, condition=kind, progress=advance)
    elif config is not None:
        from rpg.experiments.single import collect as collect_task

        with progress_bar("collecting") as advance:
            made = collect_task(load(config, overrides), progress=advance)
    else:
        raise InputError("There is nothing to collect: give a CONFIG with a task, or --from FOLDER.")
    console.print(f"{len(made)} checkpoints of {made.num_runs} run(s) in {made.path}")


@app.command()
def align(zoo: o.ZooFolder, output: Annotated[Path, o.argument("The zoo to write.")]) -> None:
    """Put the hidden units of all runs into one order (Git Re-Basin); every network computes what it did."""
    from rpg.evaluation.alignment import align_zoo
    from rpg.tasks.registry import task_of
    from tokenization.zoo.zoo import Zoo

    source = Zoo.open(zoo)
    made = align_zoo(source, task_of(source), output)
    console.print(f"{len(made)} checkpoints of {made.num_runs} run(s) in {made.path}")


@app.command()
def inspect(path: o.Inspected, overrides: o.Overrides = None, verify: o.Verify = False) -> None:
    """Show layers, tokens, padding, sizes and memory before anything is trained."""
    from rpg.planning.inspect import inspect as describe

    console.print(*describe(path, overrides or [], verify=verify))


@app.command()
def plan(
    config: o.ConfigFile, overrides: o.Overrides = None, memory: o.Memory = None, network: o.TimmName = None,
    checkpoints: o.Checkpoints = None, condition_size: o.ConditionSize = None, processes: o.Processes = 1,
) -> None:  # fmt: skip
    """Estimate parameters, FLOPs and peak memory of training and generation, by component; computes nothing."""
    from rpg.planning.plan import largest_network, make_plan, parse_memory
    from rpg.planning.tables import plan_tables
    from rpg.planning.zoo_summary import find_zoo_summary

    settings = load(config, overrides)
    room = parse_memory(memory) if memory else None
    zoo = find_zoo_summary(settings, network=network, num_checkpoints=checkpoints, condition_size=condition_size)
    made = make_plan(settings, zoo, num_processes=processes)
    largest = largest_network(settings, zoo, room) if room else None
    layout = zoo.layout
    console.print(f"{layout.num_values:,} values in {layout.num_tokens:,} tokens of {layout.token_size:,}")
    for table in plan_tables(made, largest):
        console.print(table)


@app.command()
def train(
    config: o.ConfigFile, overrides: o.Overrides = None, resume: o.Resume = False, overwrite: o.Overwrite = False,
    compare: o.Compare = False,
) -> None:  # fmt: skip
    """Train a generator on a zoo (also: accelerate launch scripts/train.py CONFIG …)."""
    settings, comparison = load(config, overrides), None
    with progress_bar("training") as advance:
        how: Any = {"resume": resume, "overwrite": overwrite, "progress": advance, "say": console.print}
        if compare:  # imports all of evaluation, which training alone need not
            from rpg.experiments.comparison import train_and_compare

            folder, comparison = train_and_compare(settings, **how)
        else:
            from rpg.training.loop import train as run

            folder = run(settings, **how)
    console.print(f"generator in {folder}")
    if comparison is not None:
        console.print(comparison.line(), highlight=False, soft_wrap=True)


@app.command()
def generate(
    run: o.RunFolder, num: o.Num = 1, seed: o.Seed = 0, output: o.OutputFolder = None, steps: o.Steps = None,
    sampler: o.Sampler = None, condition: o.Condition = None, classes: o.Classes = None, prompt: o.Prompt = None,
    prompt_model: o.PromptModel = None, metric: o.Metric = None, start: o.Start = None,
    guidance_scale: o.Guidance = None, state: o.State = None, temperature: o.Temperature = None,
    device: o.Device = None,
) -> None:  # fmt: skip
    """Write new checkpoints: safetensors that plain load_state_dict takes, or adapters as PEFT folders.

    On several devices: accelerate launch scripts/generate.py RUN -n NUM
    """
    from rpg.generation.conditions import choose_condition
    from rpg.generation.generator import Generator
    from rpg.generation.partition import join_processes

    partition, own_device = join_processes()
    generator = Generator.from_pretrained(run, device or own_device)
    vector = choose_condition(generator, condition, classes, prompt, prompt_model, metric)
    with progress_bar("generating") as advance:
        paths = generator.generate(
            num, seed=seed, steps=steps, sampler=sampler, guidance_scale=guidance_scale, state=state,
            temperature=temperature, condition=vector, start=start, output=output or run / "generated",
            progress=advance, partition=partition,
        )  # fmt: skip
    console.print(f"{len(paths)} network(s) in {output or run / 'generated'}")


@app.command()
def export(
    source: o.Exported,
    to: o.Form,
    output: o.Written,
    base: o.Base = None,
    seed: o.Seed = 0,
    condition: o.Condition = None,
) -> None:
    """Write weights in the form that timm, transformers or PEFT loads by itself."""
    from rpg.generation.conditions import parse_condition
    from rpg.generation.export import export as write

    with progress_bar("generating") as advance:
        path = write(source, to, output, base=base, seed=seed, condition=parse_condition(condition), progress=advance)
    console.print(f"{to}: {path}")


@app.command()
def evaluate(run: o.RunFolder, num: o.NumScored = None, seed: o.Seed = 0) -> None:
    """Score generated networks beside originals and trivial baselines."""
    from rpg.evaluation.tables import print_table
    from rpg.experiments.single import evaluate_run

    print_table(evaluate_run(run, num=num, seed=seed))
    for kind, name in (("figures", "evaluation.json"), ("picture", "scatter.png"), ("report", "report.html")):
        console.print(f"{kind + ':':<8} {run / name}")


@app.command()
def sweep(file: o.SweepFile, jobs: o.Jobs = 1, only: o.Only = None) -> None:
    """Run a list or a matrix of overrides (resumable, in parallel) and write one table."""
    from rpg.experiments.sweep import run_sweep

    table = run_sweep(file, jobs=jobs, only=only or (), say=console.print)
    console.print(table.read_text(), markup=False, soft_wrap=True)
    console.print(f"table: {table}")


@app.command()
def unseen(
    config: o.OtherConfig = None, overrides: o.Overrides = None, seeds: o.NumSeeds = 1, split: o.ScoredSplit = None
) -> None:
    """Networks for tasks nobody trained: zoo of 1,022 tasks, training, comparison with all that is trivial."""
    settings = load(config or o.default_config("digits_unseen.yaml"), overrides)
    held_out(settings, split, seeds, "figures:  {run}/evaluation.json\npictures: {run}/distance.png, parameters.png")


@app.command()
def lora(config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None) -> None:
    """LoRA adapters for tasks nobody trained: zoo, training, comparison with all that is trivial."""
    held_out(load(config or o.default_config("lora/tiny.yaml"), overrides), split, 1, "figures:  {run}/evaluation.json")


@app.command()
def fields(config: o.OtherConfig = None, overrides: o.Overrides = None, split: o.ScoredSplit = None) -> None:
    """Neural fields of images: zoo, training, comparison in function space, pictures."""
    from rpg.experiments.fields import evaluate_fields, print_fields, run_fields

    settings = load(config or o.default_config("fields.yaml"), overrides)
    if split is not None:
        scored = "validation" if split == "validation" else "unseen"
        print_fields(evaluate_fields(settings.run, split=scored, seed=settings.seed), console)
        return
    with progress_bar("fitting fields") as collecting:
        print_fields(run_fields(settings, progress=collecting), console)
    console.print(f"figures: {settings.run}/evaluation.json\npictures: classes, fine, nearest, path.png beside it")


@app.command()
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


@app.command()
def render(
    files: o.Fields, size: o.Resolution = 64, output: o.PictureFolder = None, config: o.FieldsConfig = None
) -> None:
    """Draw neural fields as PNG files, at any resolution."""
    from rpg.experiments.field_pictures import render_files

    console.print(*render_files(files, size, output, load(config, None) if config else None), sep="\n")


@app.command()
def score(
    config: o.ConfigFile, adapters: o.Adapters, overrides: o.Overrides = None, split: o.RowSplit = "test"
) -> None:
    """Score LoRA or DoRA adapters on the held-out rows of every task of a configuration."""
    from rpg.experiments.adapters import print_scores, score_folders

    print_scores(score_folders(load(config, overrides), adapters, split), console)


@app.command()
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


def held_out(settings: Any, split: str | None, seeds: int, written: str) -> None:
    """Run an experiment on unseen tasks, or score a split of one that was run before."""
    from rpg.experiments import held_out_table as table
    from rpg.experiments import held_out_tasks as tasks

    if split is not None:
        table.print_held_out(tasks.evaluate_held_out(settings.run, seed=settings.seed, split=split), console)
        return
    with progress_bar("collecting") as collecting, progress_bar("training") as training:
        report = tasks.run_held_out(settings, progress={"collect": collecting, "train": training}, seeds=seeds)
    table.print_held_out(report, console)
    console.print(written.format(run=settings.run))


def load(path: Path, overrides: list[str] | None) -> Any:
    """Read a configuration file with its overrides."""
    from rpg.config import Config

    return Config.load(path, overrides)


def main() -> None:
    """Run the command line; every mistake is one line on standard error and exit code 2."""
    run_command(lambda: app(sys.argv[1:] or ["--help"], prog_name="rpg", standalone_mode=False))


if __name__ == "__main__":
    main()
