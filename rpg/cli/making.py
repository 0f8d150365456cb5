"""Commands that make something: zoos, plans, generators, networks, files; and how they read and show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rpg.cli import parameters as o
from rpg.console import INTERRUPTED, console, progress_bar, say
from tokenization.errors import InputError

if TYPE_CHECKING:  # imports torch
    from tokenization.zoo.condition import ConditionKind

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


def collect(
    config: o.CollectedConfig = None, overrides: o.Overrides = None, source: o.Source = None, zoo: o.NewZoo = None,
    table: o.Table = None, pattern: o.Pattern = None, find_runs: o.FindRuns = True, condition: o.Kind = None,
    key: o.Key = None, strip: o.Strip = None, skip_bad: o.SkipBad = False, base: o.AdapterBase = None,
    ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:  # fmt: skip
    """Make a zoo: train checkpoints for a task, or import your own (safetensors files stay where they are)."""
    notices: list[str] = []
    if source:
        from tokenization.checkpoint.weights import Chosen
        from tokenization.zoo.importing import collect_from

        if zoo is None:
            raise InputError("Name the zoo folder to make, for example --zoo runs/zoos/mine.")
        kind = cast("ConditionKind | None", condition)
        made = collect_from(
            [*source, *(config or [])], zoo, table=table, pattern=pattern, condition=kind, find_runs=find_runs,
            base=base, chosen=Chosen(key, strip or ""), skip_bad=skip_bad, say=notices.append,
        )  # fmt: skip
        say(*notices)
    elif config:
        from rpg.experiments.single import collect as collect_task
        from rpg.planning.collection import collection_need
        from rpg.planning.plan import guard

        if len(config) > 1:
            raise InputError(f"collect takes one CONFIG, and {config[1]} is a second; put --from before checkpoints")
        settings = load(Path(config[0]), overrides)
        guard(lambda: collection_need(settings), ignore_memory)
        with progress_bar("collecting") as advance:
            made = collect_task(settings, progress=advance)
    else:
        raise InputError("Nothing to collect: give a CONFIG with a task, or --from FOLDER.")
    return {**_told(made), "notices": notices}


def _told(zoo: Any) -> dict[str, Any]:
    """Say what zoo was made."""
    console.print(f"{len(zoo)} checkpoints of {zoo.num_runs} run(s) in {zoo.path}")
    return {"zoo": str(zoo.path), "checkpoints": len(zoo), "runs": zoo.num_runs, "digest": zoo.digest()}


def align(zoo: o.ZooFolder, output: o.AlignedZoo) -> dict[str, Any]:
    """Put the hidden units of all runs into one order (Git Re-Basin) without changing what a network computes."""
    from rpg.evaluation.matching import align_zoo
    from rpg.tasks import task_of
    from tokenization.zoo.zoo import Zoo

    source = Zoo.open(zoo)
    return _told(align_zoo(source, task_of(source), output))


def inspect(
    path: o.Inspected, overrides: o.Overrides = None, verify: o.Verify = False, write_config: o.WriteConfig = None,
    key: o.Key = None, strip: o.Strip = None,
) -> dict[str, Any]:  # fmt: skip
    """Show layers, tokens, padding, sizes and memory before training; propose a configuration for a zoo."""
    from rpg.planning.inspect import facts_of
    from rpg.planning.inspect import inspect as describe
    from rpg.planning.proposal import write_config as write
    from tokenization.checkpoint.weights import Chosen

    changes = overrides or []
    written = write(path, write_config, changes) if write_config is not None else None
    if written is not None:  # what is described is the zoo, which looks at tokens alone
        changes = [change for change in changes if change.startswith("tokens.")]
        form = written.tree["tokens"].get("lora_canonical")
        changes += [f"tokens.lora_canonical={form}"] if form else []
    console.print(*describe(path, changes, verify=verify, chosen=Chosen(key, strip or "")))
    if written is not None:
        say(f"{write_config}: {' '.join(written.reasons)}")
        commands = written.commands.format(file=write_config)
        say(f"next: {commands}")
    config = {} if written is None else {"config": str(write_config), "run": written.tree["run"]}
    return {**facts_of(path, changes), **config}


def plan(
    config: o.ConfigFile, overrides: o.Overrides = None, memory: o.Memory = None, network: o.TimmName = None,
    checkpoints: o.Checkpoints = None, condition_size: o.ConditionSize = None, processes: o.Processes = 1,
) -> dict[str, Any]:  # fmt: skip
    """Estimate parameters, FLOPs and peak memory of training and generation; trains nothing."""
    from rpg.planning.collection import collection_table, plan_collection
    from rpg.planning.inspect import plan_tables
    from rpg.planning.plan import largest_network, make_plan, parse_memory
    from rpg.planning.zoo_summary import find_zoo_summary

    settings = load(config, overrides)
    room = parse_memory(memory) if memory else None
    zoo = find_zoo_summary(settings, network=network, num_checkpoints=checkpoints, condition_size=condition_size)
    made = make_plan(settings, zoo, num_processes=processes)
    largest = largest_network(settings, zoo, room) if room else None
    layout = zoo.layout
    console.print(f"{layout.num_values:,} values in {layout.num_tokens:,} tokens of {layout.token_size:,}")
    collecting = plan_collection(settings) if network is None else None
    for table in [*plan_tables(made, largest), *([collection_table(collecting)] if collecting else [])]:
        console.print(table)
    return {
        "values": layout.num_values, "tokens": layout.num_tokens, "token_size": layout.token_size,
        "parameters": made.parameters, "training_flops": made.training_flops,
        "generation_flops": made.generation_flops.total, "training_bytes": made.training.total,
        "generation_bytes": made.generation.total, "process_bytes": made.process,
    }  # fmt: skip


def train(
    config: o.ConfigFile, overrides: o.Overrides = None, resume: o.Resume = False, overwrite: o.Overwrite = False,
    compare: o.Compare = False, device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:  # fmt: skip
    """Train a generator on a zoo (also: accelerate launch -m rpg train CONFIG …)."""
    from rpg.devices import device_of_run
    from rpg.planning.plan import guard, training_need

    settings, comparison, place = load(config, overrides), None, device_of_run(device)
    guard(lambda: training_need(settings), ignore_memory)
    last = (0, 0)
    with training_bar(f"training on {place}") as bar:

        def advance(done: int, total: int, loss: float) -> None:
            nonlocal last
            last = (done, total)
            bar["train"](done, total, loss)

        how: Any = {"resume": resume, "overwrite": overwrite, "progress": advance, "watch": bar["watch"]}
        how["say"] = console.print
        if compare:  # imports all of evaluation, which training alone need not
            from rpg.experiments.comparison import train_and_compare

            folder, comparison = train_and_compare(settings, **how)
        else:
            from rpg.training.loop import train as run

            folder = run(settings, **how)
    console.print(f"generator in {folder}")
    if comparison is not None:
        say(comparison.line())
    told = {"run": settings.run, "generator": str(folder), "steps": last[0], "of": last[1]}
    compared = {} if comparison is None else {"comparison": comparison.model_dump(mode="json")}
    return {**told, **compared, "exit_code": 0 if last[0] == last[1] else INTERRUPTED}


def generate(
    run: o.RunFolder, num: o.Num = 1, seed: o.Seed = 0, output: o.OutputFolder = None, steps: o.Steps = None,
    sampler: o.Sampler = None, condition: o.Condition = None, classes: o.Classes = None, prompt: o.Prompt = None,
    prompt_model: o.PromptModel = None, metric: o.Metric = None, setting: o.Setting = None,
    examples: o.Examples = None, start: o.Start = None,
    guidance_scale: o.Guidance = None, state: o.State = None, temperature: o.Temperature = None,
    sparsity: o.Sparsity = None, choose_by: o.ChooseBy = None, ensemble: o.Ensemble = False,
    overwrite: o.OverwriteNetworks = False, device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:  # fmt: skip
    """Write new checkpoints: plain safetensors state dicts, or adapters as PEFT folders.

    On several devices: accelerate launch -m rpg generate RUN -n NUM
    """
    from rpg.devices import join_processes
    from rpg.experiments.single import copies_notice
    from rpg.generation.conditions import choose_condition
    from rpg.generation.examples import example_task, favoured, load_draws, read_examples, save_ensemble
    from rpg.generation.folders import shipped_folder, which_generator
    from rpg.generation.generator import Generator
    from rpg.planning.plan import generation_need, guard

    partition, place = join_processes(device)
    guard(lambda: generation_need(run), ignore_memory)
    if (own := which_generator(run)) is not None:
        say(own)
    generator = Generator.from_pretrained(run, place)
    vector = choose_condition(generator, condition, classes, prompt, prompt_model, metric, examples, setting)
    judge = None if choose_by is None else read_examples(choose_by, generator.condition, "--choose-by")
    if generator.known is not None and (distance := generator.distance(vector)) is not None and not partition.rank:
        style = "yellow" if distance.error is None else ""
        console.print(str(distance), highlight=False, soft_wrap=True, style=style)
    # There is no folder of what lies on the hub, or in the package.
    output = output or (run if run.is_dir() and shipped_folder(run) is None else Path()) / "generated"
    with progress_bar(f"generating on {place}") as advance:
        paths = generator.generate(
            num, seed=seed, steps=steps, sampler=sampler, guidance_scale=guidance_scale, state=state,
            temperature=temperature, condition=vector, initial=start, sparsity=sparsity, output=output,
            overwrite=overwrite, progress=advance, partition=partition,
        )  # fmt: skip
    console.print(f"{len(paths)} network(s) in {output}")
    told: dict[str, Any] = {"folder": str(output), "networks": [str(path) for path in paths]}
    if partition.rank:
        return told
    if (notice := copies_notice(generator, cast(list[Path], paths), state)) is not None:
        say(notice)
        told["notice"] = notice
    if judge is None and not ensemble:
        return told
    draws = load_draws(cast(list[Path], paths))
    if judge is not None:
        order, scores = favoured(example_task(generator.config.task), draws, judge)
        best, loss = paths[order[0]], -scores[order[0]].item()
        say(f"best by {len(judge)} example(s): {best} (loss {loss:.3f})")
        told |= {"best": str(best), "order": order, "log_likelihoods": scores.tolist()}
    if ensemble:
        told["ensemble"] = str(save_ensemble(draws, output))
        say(f"all draws in one file: {told['ensemble']}")
    return told


def export(
    source: o.Exported, to: o.Form, output: o.Written = None, base: o.Base = None, seed: o.Seed = 0,
    condition: o.Condition = None, classes: o.Classes = None, prompt: o.Prompt = None,
    prompt_model: o.PromptModel = None, metric: o.Metric = None, examples: o.Examples = None, start: o.Start = None,
) -> dict[str, Any]:  # fmt: skip
    """Write weights in the format of timm, transformers, PEFT or Lightning, after checking that they fit."""
    from rpg.generation.conditions import choose_condition
    from rpg.generation.export import export as write

    asked = (condition, classes, prompt, prompt_model, metric, examples)
    if any(asked) and Path(source).is_file():
        raise InputError(f"{source} is a checkpoint, which takes no condition; leave it out")
    with progress_bar("generating") as advance:
        path = write(
            source, to, output, base=base, seed=seed, initial=start, progress=advance,
            condition=lambda generator: choose_condition(generator, *asked), say=console.print,
        )  # fmt: skip
    say(f"{to}: {path}")
    return {"form": to, "path": str(path)}


def merge(
    files: o.Merged, method: o.Method, output: o.MergedOutput, base: o.MergeBase = None,
    weights: o.MergeWeights = None, normalize: o.Normalize = None, density: o.Density = None, t: o.MergePlace = None,
    seed: o.Seed = 0, key: o.Key = None, strip: o.Strip = None, function: o.Function = None,
) -> dict[str, Any]:  # fmt: skip
    """Merge checkpoints of one network, one tensor at a time; adapters into one whose rank is the sum of theirs.

    Methods and options are mergekit's. The files, their digests and the settings stand in the metadata under rpg.merge.
    """
    from rpg.merging.adapters import merge_adapters
    from rpg.merging.files import merge_files
    from rpg.merging.methods import Merge
    from tokenization.checkpoint.weights import AS_FOUND, Chosen
    from tokenization.lora.adapter import is_adapter

    adapters = [is_adapter(file) for file in files]
    if any(adapters) and not all(adapters):
        one, other = files[adapters.index(True)], files[adapters.index(False)]
        raise InputError(
            f"{one} is an adapter and {other} is not; merge networks with networks, or adapters with adapters"
        )
    chosen = Chosen(key, strip or "")
    how = Merge(method, _numbers(weights), normalize, density, t, seed)
    if all(adapters):
        if chosen != AS_FOUND:
            raise InputError("--key and --strip are for networks, and these are adapters; leave them out")
        merge_adapters(files, how, output, base=base)
    else:
        with progress_bar("merging") as advance:
            begun = None if base is None else Path(base)
            merge_files(files, how, output, base=begun, chosen=chosen, progress=advance)
    say(f"{method} of {len(files)}: {output}")
    if function is None:
        return {"path": str(output), "method": method}
    from rpg.evaluation.page.page import print_checkpoints
    from rpg.experiments.score_files import score_checkpoints

    scores = score_checkpoints(files, function, None, "test", chosen=chosen)
    scores |= score_checkpoints([output], function, None, "test")
    print_checkpoints(scores, console)
    return {"path": str(output), "method": method, "checkpoints": scores}


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--weights {text} is not a list of numbers; write them with commas, e.g. 0.7,0.3") from error
