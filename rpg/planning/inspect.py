"""What a zoo, a checkpoint or a configuration holds and needs, as tables, before anything is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.jupyter import JupyterMixin
from rich.table import Table

from rpg.config import Config
from rpg.console import FiguresTable
from rpg.planning.machine import Memory, held_bytes
from rpg.planning.plan import Largest, Plan, make_plan
from rpg.planning.zoo_summary import ZooSummary, find_zoo_summary
from tokenization.checkpoint.checkpoint import Checkpoint, has_plain_names, is_counter, read_state_dict
from tokenization.checkpoint.pickles import pickled_files
from tokenization.checkpoint.weights import AS_FOUND, Chosen
from tokenization.errors import InputError
from tokenization.layout.verify import verify_round_trip
from tokenization.layouts import Layout, SpectralLayout, fit_layout, layout_without_statistics
from tokenization.zoo.zoo import Zoo


def plan_tables(plan: Plan, largest: Largest | None = None) -> list[RenderableType]:
    """Parameters, FLOPs, and memory by component; ``largest`` adds what fits where."""
    config, layout = plan.estimator.config, plan.estimator.zoo.layout
    tables = [_parameters(plan), _work(plan), _memory("memory to train", plan.training, plan.process)]
    writing = _memory("memory to generate into files", plan.generation, plan.process)
    writing.add_row("a network in memory", f"{format_bytes(held_bytes(layout))} more")
    tables.append(writing)
    if largest is not None:
        table = facts_table("on a GPU")
        table.add_row("this one", f"{format_bytes(plan.on_gpu)}, CUDA's own included")
        fits = f"{largest.num_values:,} values ({largest.num_tokens:,} tokens of {config.tokens.size:,})"
        table.add_row("largest network", fits if largest.num_values else "none fits")
        tables.append(table)
    return [*tables]


def _parameters(plan: Plan) -> Table:
    total, values = sum(plan.parameters.values()), plan.estimator.zoo.layout.num_values
    table = facts_table("generator's parameters")
    for component, count in plan.parameters.items():
        table.add_row(component, f"{count:,}")
    table.add_section()
    table.add_row("all", f"{total:,} ({total / values:.3g} times the values it generates)")
    return table


def _work(plan: Plan) -> Table:
    step, flops = plan.estimator, plan.generation_flops
    table = facts_table("work")
    table.add_row("a training step", f"{format_flops(plan.training_flops)}, {'bf16' if plan.bf16 else 'fp32'}")
    rows = f"{step.rows_per_step:,} of {step.zoo.layout.token_size:,} values"
    table.add_row("its rows", f"{rows}, {step.checkpoints_per_step:,} checkpoints")
    cached = "; kept in memory once read" if plan.training.cache else ""
    read = format_bytes(step.bytes_read_per_step) + cached if step.bytes_read_per_step else "nothing: all is in memory"
    table.add_row("it reads", read)
    table.add_row("a generated network", f"{format_flops(flops.total)}, {step.config.generate.steps:,} steps")
    table.add_row("of which backbone", format_flops(flops.backbone))
    if flops.directions:
        table.add_row("of which directions", format_flops(flops.directions))
    table.add_row("a token and step", format_flops(flops.step))
    return table


def _memory(title: str, memory: Memory, process: int) -> Table:
    table = facts_table(title)
    for component, num_bytes in memory.components().items():
        table.add_row(component, format_bytes(num_bytes))
    table.add_section()
    table.add_row("peak", format_bytes(memory.total))
    table.add_row("resident on a CPU", f"{format_bytes(memory.total + process)}, Python and its libraries included")
    return table


def format_flops(count: float) -> str:
    """FLOPs in the largest fitting unit, such as ``2.10 PFLOP``."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:,.3g} PFLOP"


def format_bytes(num_bytes: float) -> str:
    """Bytes in the largest fitting binary unit, such as ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def facts_table(title: str) -> Table:
    """An empty table of names and texts."""
    table = Table(title=title, title_justify="left", show_header=False, min_width=32)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    return table


MOST_NAMES = 6
"""Names that are listed one by one; more are only counted."""


class Description(list[RenderableType], JupyterMixin):
    """What is known of something, piece by piece; notebooks show it."""

    def __rich_console__(self, *_: Any) -> Iterator[RenderableType]:
        yield from self


def inspect(
    path: Zoo | Path | str, overrides: Sequence[str] = (), *, verify: bool = False, chosen: Chosen = AS_FOUND
) -> Description:
    """Describe a zoo folder, a checkpoint of any kind, or a configuration with its zoo and its generator.

    Args:
        path: a zoo or its folder; a YAML configuration or a run or generator folder, which hold one; anything else is
            opened as a checkpoint.
        overrides: ``section.field=value`` over the configuration, or over the defaults (``tokens.size=8192``).
        verify: read the whole zoo: digests, finite values, and the way into tokens and back.
        chosen: which weights of a checkpoint that holds several, and the prefix to cut off their names.

    Raises:
        InputError: there is nothing of the kind, it is broken, or the configuration does not fit it.
    """
    path = path.path if isinstance(path, Zoo) else Path(path)
    return Description(_described(path, overrides, verify, chosen))


def _described(path: Path, overrides: Sequence[str], verify: bool, chosen: Chosen) -> list[RenderableType]:
    if file := _config_file(path):
        return _inspect_config(Config.load(file, list(overrides)), verify)
    config = Config.defaults(list(overrides))
    if (path / "zoo.json").is_file():
        zoo = Zoo.open(path)
        layout = layout_without_statistics(zoo.checkpoint(0), config.tokens, len(zoo))
        return [zoo_table(zoo), *layout_tables(layout), *(_verified(zoo, config) if verify else [])]
    if verify:
        raise InputError(f"--verify reads a zoo, and {path} is a checkpoint; name a zoo or the configuration of one")
    checkpoint = None if pickled_files(path) else Checkpoint.open(path)
    if checkpoint is None or not has_plain_names(checkpoint, chosen):
        checkpoint = Checkpoint.without_values(read_state_dict(path, chosen), path)
    return [checkpoint_table(checkpoint), *layout_tables(layout_without_statistics(checkpoint, config.tokens, 50))]


def facts_of(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same in few figures, for a machine; of a checkpoint that is not a zoo only where it is."""
    path = Path(path)
    file = _config_file(path)
    config = Config.load(file, list(overrides)) if file else Config.defaults(list(overrides))
    folder = Path(config.zoo) if file else path
    if not (folder / "zoo.json").is_file():
        return {"path": str(path)}
    zoo = Zoo.open(folder)
    layout = layout_without_statistics(zoo.checkpoint(0), config.tokens, len(zoo))
    condition = None if zoo.condition is None else {"kind": zoo.condition.kind, "size": zoo.condition.size}
    facts = {"zoo": str(folder), "checkpoints": len(zoo), "runs": zoo.num_runs, "condition": condition}
    tokens = {"values": layout.num_values, "tokens": layout.num_tokens, "token_size": layout.token_size}
    return {"path": str(path), **facts, **tokens, "splits": dict(Counter(entry.split for entry in zoo.entries))}


def _config_file(path: Path) -> Path | None:
    if path.suffix in (".yaml", ".yml"):
        return path
    inside = path / "config.yaml"
    return inside if inside.is_file() and not (path / "zoo.json").exists() else None


def _inspect_config(config: Config, verify: bool) -> list[RenderableType]:
    if (Path(config.zoo) / "zoo.json").exists() or verify or config.task is None:
        zoo = Zoo.open(config.zoo)
        summary = ZooSummary.of(zoo, config)
        first: RenderableType = zoo_table(zoo)
        checks = _verified(zoo, config) if verify else []
    else:
        summary, checks = find_zoo_summary(config), []
        first = f"{config.zoo}: no zoo yet; {summary.num_checkpoints:,} checkpoints of the task's network are assumed"
    return [first, *layout_tables(summary.layout), *checks, *plan_tables(make_plan(config, summary))]


def zoo_table(zoo: Zoo) -> Table:
    """What the checkpoints are, how many and how large. Raises InputError if the zoo is empty."""
    checkpoint = zoo.checkpoint(0)
    num_bytes = sum(entry.size or sum(zoo.checkpoint(i).sizes.values()) for i, entry in enumerate(zoo.entries))
    splits = Counter(entry.split for entry in zoo.entries)
    steps = [entry.step for entry in zoo.entries]
    outside = sum(entry.external for entry in zoo.entries)
    table = facts_table("zoo")
    table.add_row("folder", str(zoo.path))
    table.add_row("checkpoints", f"{len(zoo):,}" + (f" ({outside:,} of them outside the folder)" if outside else ""))
    table.add_row("on disk", format_bytes(num_bytes))
    table.add_row("task", _task(zoo))
    table.add_row("runs", f"{zoo.num_runs:,}" + (f": {_names(zoo.runs)}" if zoo.runs else ""))
    table.add_row("steps", f"{min(steps)} to {max(steps)}")
    table.add_row("splits", ", ".join(f"{name} {count:,}" for name, count in splits.items()))
    table.add_row("condition", _condition(zoo))
    for name in sorted({name for entry in zoo.entries for name in entry.metrics}):
        values = [entry.metrics[name] for entry in zoo.entries if name in entry.metrics]
        table.add_row(name, f"mean {sum(values) / len(values):.4g}, best {max(values):.4g}, least {min(values):.4g}")
    return _with_tensors(table, checkpoint)


def checkpoint_table(checkpoint: Checkpoint) -> Table:
    """What one checkpoint holds."""
    table = facts_table("checkpoint")
    table.add_row("path", str(checkpoint.path))
    if checkpoint.sizes:
        table.add_row("on disk", format_bytes(sum(checkpoint.sizes.values())))
    for key, text in sorted(checkpoint.metadata.items()):
        table.add_row(key, text if len(text) <= 200 else f"{text[:200]}…")
    return _with_tensors(table, checkpoint)


def layout_tables(layout: Layout) -> list[RenderableType]:
    """The tokens by kind of layer, and what is outside them."""
    rows = [
        [group.kind, *(f"{n:,}" for n in (group.tensors, group.values, group.tokens)), f"{group.padding_share:.1%}"]
        for group in layout.describe()
    ]
    totals = (len(layout.layers), layout.num_values, layout.num_tokens)
    rows.append(["all", *(f"{total:,}" for total in totals), f"{layout.padding_share:.1%}"])
    title = f"{layout.num_tokens:,} tokens of {layout.token_size:,} values"
    table = FiguresTable(("layers", "tensors", "values", "tokens", "padding"), rows, title, section=True)
    outside = facts_table("outside the tokens")
    constants = [name for name in layout.names if name in layout.constant_specs]
    outside.add_row("constants", _counted(constants))
    specs = {name: layout.spec(name) for name in constants}
    counters = {
        name.rpartition(".")[2] for name, (dtype, shape) in specs.items() if is_counter(name, dtype, math.prod(shape))
    }
    if counters:
        outside.add_row("counters", f"{', '.join(sorted(counters))}: those of the first checkpoint")
    ties = [f"{alias} = {name}" for alias, name in layout.ties.items()]
    outside.add_row("ties", _counted(ties))
    return [table, outside]


def _verified(zoo: Zoo, config: Config) -> list[RenderableType]:
    zoo.verify()
    layout = fit_layout(zoo, config.tokens)
    trip = verify_round_trip(zoo, layout.cut if isinstance(layout, SpectralLayout) else layout)
    table = facts_table("verified")
    table.add_row("digests, structure, finite values", f"{trip.num_checkpoints:,} checkpoints")
    if layout.canonical is not None:
        count = len(layout.canonical.pairs)
        table.add_row("LoRA pairs", f"{count:,} in canonical form ({layout.canonical.form}), their products the same")
    if layout.compressed is not None:
        zeros, kinds = layout.compressed.zoo_sparsity, sorted({part.kind for part in layout.compressed.parts})
        share = "" if zeros is None else f", {zeros:.2%} of their values zero"
        table.add_row("compressed weights", f"{len(layout.compressed.parts):,} ({', '.join(kinds)}){share}")
    exact = "all the same bits"
    if trip.num_exact != trip.num_values:
        exact = f"{trip.num_exact:,} the same bits, the rest within the rounding of the dtype or the centre"
    table.add_row(f"into tokens ({config.tokens.normalization}) and back", f"{trip.num_values:,} values, {exact}")
    table.add_row("outside the tokens", f"{trip.num_constants:,} values, the same in all checkpoints")
    if layout.copied_note:
        table.add_row("in no token", layout.copied_note)
    return [table, *(directions_tables(layout) if isinstance(layout, SpectralLayout) else [])]


def directions_tables(layout: SpectralLayout) -> list[RenderableType]:
    """What the zoo's directions hold, in all and in the layers that lose most."""
    facts = facts_table("directions")
    facts.add_row("of", f"every {layout.basis.kind}" if layout.basis.kind == "token" else "the whole network")
    facts.add_row("rank", f"{layout.token_size:,}")
    facts.add_row("variance kept", f"{layout.basis.share:.2%}")
    lost = sorted(layout.shares(), key=lambda row: row[1] * (row[2] - 1))[:MOST_NAMES]
    rows = [[name, f"{part:.2%}", f"{kept:.2%}"] for name, part, kept in lost]
    heads = ("layer", "part of the variance", "kept")
    return [facts, FiguresTable(heads, rows, "layers that lose most of the zoo's variance")]


def _with_tensors(table: Table, checkpoint: Checkpoint) -> Table:
    infos = checkpoint.tensors.values()
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    table.add_row("tensors", f"{len(infos):,} ({', '.join(f'{count:,} {name}' for name, count in dtypes.items())})")
    table.add_row("values", f"{sum(info.num_values for info in infos):,}")
    return table


def _task(zoo: Zoo) -> str:
    if zoo.task is None:
        return "none"
    arguments = ", ".join(f"{key} {value}" for key, value in zoo.task.items() if key != "name")
    return f"{zoo.task.get('name')}" + (f" ({arguments})" if arguments else "")


def _condition(zoo: Zoo) -> str:
    if zoo.condition is None:
        return "none"
    names = f": {_names(zoo.condition.names)}" if zoo.condition.names else ""
    return f"{zoo.condition.kind} of {zoo.condition.size}{names}"


def _counted(names: Sequence[str]) -> str:
    return f"{len(names):,}" + (f": {_names(names)}" if names else "")


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES:,} more"
