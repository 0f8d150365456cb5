"""Tables for the terminal: facts about anything, and what a plan says."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from rpg.planning.memory import Memory, held_bytes
from rpg.planning.plan import Largest, Plan


def plan_tables(plan: Plan, largest: Largest | None = None) -> list[RenderableType]:
    """Parameters, FLOPs, and memory by component; ``largest`` adds what fits where."""
    config, layout = plan.config, plan.zoo.layout
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
    total, values = sum(plan.parameters.values()), plan.zoo.layout.num_values
    table = facts_table("generator's parameters")
    for component, count in plan.parameters.items():
        table.add_row(component, f"{count:,}")
    table.add_section()
    table.add_row("all", f"{total:,} ({total / values:.3g} times the values it generates)")
    return table


def _work(plan: Plan) -> Table:
    config, flops = plan.config, plan.generation_flops
    table = facts_table("work")
    table.add_row("a training step", f"{format_flops(plan.training_flops)}, {'bf16' if plan.bf16 else 'fp32'}")
    table.add_row(
        "its rows",
        f"{plan.rows_per_step:,} of {plan.zoo.layout.token_size:,} values, {plan.checkpoints_per_step:,} checkpoints",
    )
    cached = "; kept in memory once read" if plan.training.cache else ""
    read = format_bytes(plan.bytes_read_per_step) + cached if plan.bytes_read_per_step else "nothing: all is in memory"
    table.add_row("it reads", read)
    table.add_row("a generated network", f"{format_flops(flops.total)}, {config.generate.steps:,} steps")
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
