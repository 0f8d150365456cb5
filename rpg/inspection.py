"""What a zoo, a checkpoint or a configuration holds and needs, as tables, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

from rpg import estimate
from rpg.config import Config
from rpg.tasks import build_task
from tokenization.checkpoint import Checkpoint, read_state_dict
from tokenization.errors import InputError
from tokenization.headers import TensorInfo
from tokenization.layout import TokenLayout
from tokenization.pickled import pickled_files
from tokenization.verification import verify_round_trip
from tokenization.zoo import Zoo

MOST_NAMES = 6
"""Names that are listed one by one; more are only counted."""


def inspect(path: Path | str, overrides: Sequence[str] = (), *, verify: bool = False) -> list[RenderableType]:
    """Describe a zoo folder, a checkpoint of any kind, or a configuration with its zoo and its generator.

    Args:
        path: a folder with ``zoo.json``; a YAML configuration or a run or generator folder, which hold one; anything
            else is opened as a checkpoint.
        overrides: ``section.field=value`` over the configuration, or over the defaults (``tokens.size=8192``).
        verify: read the whole zoo: digests, finite values, and the way into tokens and back.

    Raises:
        InputError: there is nothing of the kind, it is broken, or the configuration does not fit it.
    """
    path = Path(path)
    if file := _config_file(path):
        return _inspect_config(Config.load(file, list(overrides)), verify)
    config = Config.defaults(list(overrides))
    if (path / "zoo.json").is_file():
        zoo = Zoo.open(path)
        layout = TokenLayout.plan(zoo.checkpoint(0), config.tokens)
        return [zoo_table(zoo), *layout_tables(layout), *(_verified(zoo, config) if verify else [])]
    if verify:
        raise InputError(f"--verify: {path}", "a checkpoint", "a zoo, or the configuration of one")
    checkpoint = outline(read_state_dict(path), path) if pickled_files(path) else Checkpoint.open(path)
    return [checkpoint_table(checkpoint), *layout_tables(TokenLayout.plan(checkpoint, config.tokens))]


def _config_file(path: Path) -> Path | None:
    if path.suffix in (".yaml", ".yml"):
        return path
    inside = path / "config.yaml"
    return inside if inside.is_file() and not (path / "zoo.json").exists() else None


def _inspect_config(config: Config, verify: bool) -> list[RenderableType]:
    if config.task is not None and not (Path(config.zoo) / "zoo.json").exists() and not verify:
        # Nothing is collected yet; the layers are those of the network that will be.
        checkpoint = outline(build_task(config.task).build().state_dict(), Path(config.zoo))
        subject = estimate.Subject(TokenLayout.plan(checkpoint, config.tokens))
        first: RenderableType = f"{config.zoo}: no zoo yet; one run of the task's network is assumed"
        checks: list[RenderableType] = []
    else:
        zoo = Zoo.open(config.zoo)
        subject = estimate.Subject.of(zoo, config)
        first = zoo_table(zoo)
        checks = _verified(zoo, config) if verify else []
    return [first, *layout_tables(subject.layout), *checks, *generator_tables(config, subject)]


def outline(state_dict: Mapping[str, Tensor], path: Path) -> Checkpoint:
    """A checkpoint's names, dtypes and shapes without values; ``path`` names it in errors.

    The tensors may be on the meta device.
    """
    tensors: dict[str, TensorInfo] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_dict.items():
        # As `find_ties` does, but by storage: on the meta device no tensor has an address.
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if key in first and tensor.numel():
            ties[name] = first[key]
        else:
            first[key] = name
            tensors[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, 0)
    return Checkpoint(path, tensors, ties, list(state_dict), True, {}, {})


def zoo_table(zoo: Zoo) -> Table:
    """What the checkpoints are, how many and how large. Raises InputError if the zoo is empty."""
    checkpoint = zoo.checkpoint(0)
    num_bytes = sum(entry.size or sum(zoo.checkpoint(i).sizes.values()) for i, entry in enumerate(zoo.entries))
    splits = Counter(entry.split for entry in zoo.entries)
    steps = [entry.step for entry in zoo.entries]
    outside = sum(entry.external for entry in zoo.entries)
    table = _facts("zoo")
    table.add_row("folder", str(zoo.path))
    table.add_row("checkpoints", f"{len(zoo):,}" + (f" ({outside:,} of them outside the folder)" if outside else ""))
    table.add_row("on disk", format_bytes(num_bytes))
    table.add_row("task", _task(zoo))
    table.add_row("runs", f"{zoo.num_runs:,}" + (f": {_names(zoo.runs)}" if zoo.runs else ""))
    table.add_row("steps", f"{min(steps)} … {max(steps)}")
    table.add_row("splits", ", ".join(f"{name} {count:,}" for name, count in splits.items()))
    table.add_row("condition", _condition(zoo))
    for name in sorted({name for entry in zoo.entries for name in entry.metrics}):
        values = [entry.metrics[name] for entry in zoo.entries if name in entry.metrics]
        table.add_row(name, f"mean {sum(values) / len(values):.4g}, best {max(values):.4g}, least {min(values):.4g}")
    return _with_tensors(table, checkpoint)


def checkpoint_table(checkpoint: Checkpoint) -> Table:
    """What one checkpoint holds."""
    table = _facts("checkpoint")
    table.add_row("path", str(checkpoint.path))
    if checkpoint.sizes:
        table.add_row("on disk", format_bytes(sum(checkpoint.sizes.values())))
    for key, text in sorted(checkpoint.metadata.items()):
        table.add_row(key, text if len(text) <= 200 else f"{text[:200]}…")
    return _with_tensors(table, checkpoint)


def layout_tables(layout: TokenLayout) -> list[RenderableType]:
    """The tokens by kind of layer, and what is outside them."""
    table = Table(title=f"{layout.num_tokens:,} tokens of {layout.token_size:,} values", title_justify="left")
    for column in ("layers", "tensors", "values", "tokens", "padding"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for group in layout.describe():
        counts = (group.tensors, group.values, group.tokens)
        table.add_row(group.kind, *(f"{count:,}" for count in counts), f"{group.padding_share:.1%}")
    table.add_section()
    totals = (len(layout.layers), layout.num_values, layout.num_tokens)
    table.add_row("all", *(f"{total:,}" for total in totals), f"{layout.padding_share:.1%}")
    outside = _facts("outside the tokens")
    constants = [name for name in layout.names if name in layout.constant_specs]
    outside.add_row("constants", f"{len(constants):,}" + (f": {_names(constants)}" if constants else ""))
    ties = [f"{alias} = {name}" for alias, name in layout.ties.items()]
    outside.add_row("ties", f"{len(ties):,}" + (f": {_names(ties)}" if ties else ""))
    return [table, outside]


def generator_tables(config: Config, subject: estimate.Subject) -> list[RenderableType]:
    """Parameters of the generator, what a training step reads, and the memory of training and generation."""
    from rpg.runtime import mixed_precision

    network = estimate.meta_network(config, subject)
    counts = estimate.parameters(network)
    total = sum(counts.values())
    values = subject.layout.num_values
    parameters = _facts("generator's parameters")
    for component, count in counts.items():
        parameters.add_row(component, f"{count:,}")
    parameters.add_section()
    parameters.add_row("all", f"{total:,} ({total / values:.3g} times the values it generates)")
    bf16 = mixed_precision(config.train.precision) == "bf16"
    training = estimate.training_memory(config, subject, bf16=bf16)
    rows, cached = estimate.rows_per_step(config, subject), "; kept in memory once read" if training.cache else ""
    step = _facts("training step")
    step.add_row("rows", f"{rows:,} of {subject.layout.token_size:,} values, {config.train.batch_size:,} checkpoints")
    step.add_row("read", f"{format_bytes(estimate.bytes_read_per_step(config, subject))}{cached}")
    step.add_row("precision", "bf16" if bf16 else "fp32")
    generation = estimate.generation_memory(config, subject)
    writing = _memory("memory to generate into files", generation)
    writing.add_row("a network in memory", f"{format_bytes(estimate.held_bytes(subject.layout))} more")
    return [parameters, step, _memory("memory to train", training), writing]


def format_bytes(num_bytes: float) -> str:
    """Bytes in the largest fitting binary unit, such as ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"


def _verified(zoo: Zoo, config: Config) -> list[RenderableType]:
    zoo.verify()
    trip = verify_round_trip(zoo, TokenLayout.fit(zoo, config.tokens))
    table = _facts("verified")
    table.add_row("digests, structure, finite values", f"{trip.num_checkpoints:,} checkpoints")
    exact = "all the same bits" if trip.num_exact == trip.num_values else f"{trip.num_exact:,} the same bits, the rest"
    exact += "" if trip.num_exact == trip.num_values else " within one unit in the last place"
    table.add_row(f"into tokens ({config.tokens.normalization}) and back", f"{trip.num_values:,} values, {exact}")
    return [table]


def _memory(title: str, memory: estimate.Memory) -> Table:
    table = _facts(title)
    for component, num_bytes in memory.components().items():
        table.add_row(component, format_bytes(num_bytes))
    table.add_section()
    table.add_row("peak", format_bytes(memory.total))
    return table


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


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown}, … ({len(names) - MOST_NAMES:,} more)"


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, min_width=32)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
