"""The comparison on unseen tasks as a table on the screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from rpg.console import FiguresTable


def print_held_out(report: dict[str, Any], console: Console) -> None:
    """Print the comparison, one row a method."""
    first = next(iter(report["unseen"]["generated"]))
    exact = "exact_match" in report["unseen"]["generated"]
    columns = ("mean", "95 % interval", "min", *(("exact",) if exact else ()))
    heads = ["networks", *(f"{split} {column}" for split in ("unseen", "seen") for column in columns)]
    rows = []
    for name in report["unseen"]:
        cells = []
        for figures in (report[split][name] for split in ("unseen", "seen")):
            low, high = figures[first]["ci95"]
            cells += [f"{100 * figures[first]['mean']:.2f}", f"{100 * low:.2f}–{100 * high:.2f}"]
            cells += [f"{100 * figures[first]['min']:.1f}"]
            cells += [f"{100 * figures['exact_match']['mean']:.1f}"] if exact else []
        rows.append([name.replace("_", " "), *cells])
    console.print(FiguresTable(heads, rows, f"{first.replace('_', ' ')} (%), over tasks"))
    shown = {"": headline(report)} | {f"seed {each['seed']}, ": each for each in report.get("seeds", [])}
    for seed, each in shown.items():
        console.print(
            f"{seed}generated for unseen tasks: mean {each['mean']:.2%}, worst {each['min']:.1%}, better than kernel "
            f"ridge on {each['beats_kernel_ridge']:.0%} of them, trained in {each['train_seconds']:.0f} s",
            highlight=False,
        )
    if per_task := report.get("per_task"):
        for name, each in per_task["methods"].items():
            alike, told = each["error_iou"], each["nearest_neighbour_accuracy"]
            line = f"{per_task['networks_per_task']} for one task: {name.replace('_', ' ')}, error IoU {alike:.2f}"
            console.print(line + ("" if told is None else f", 1-NNA {told:.2f}"), highlight=False)
    console.print(f"that is {report['share_of_originals']:.1%} of the originals' mean", highlight=False)


def means_of_tasks(methods: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The mean of every figure over tasks, of every method."""
    figures = {name: {key: value for key, value in each.items() if "mean" in value} for name, each in methods.items()}
    return {name: {key: value["mean"] for key, value in each.items()} for name, each in figures.items()}


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The figures that seeds are told apart by."""
    summary = next(iter(report["unseen"]["generated"].values()))
    return {
        "seed": report["seed"],
        "mean": summary["mean"],
        "min": summary["min"],
        "beats_kernel_ridge": report["unseen_tasks"]["beats_kernel_ridge"],
        "train_seconds": report["train_seconds"],
    }
