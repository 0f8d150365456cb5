"""The picture of networks of a wished loss: asked against got, one step beside training, recursive prompting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rpg.evaluation.page.drawing import COLORS, STYLE, save_png

LINES = {"generated": 0, "adam": 1, "sgd": 3}
"""Colours by optimizer."""


def plot_wishes(report: Mapping[str, Any], asked: Tensor, got: Tensor, path: Path | str) -> None:
    """Draw three panels as a PNG.

    Args:
        report: of `rpg.labs.training_runs.experiment.evaluate_metric`.
        asked, got: losses ``[T]`` of generated networks on training images.
        path: the file to write.

    Raises:
        InputError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), dpi=150, layout="constrained")
        panels: Any = figure.subplots(1, 3)
        _asked_and_got(panels[0], report, asked, got)
        _one_step(panels[1], report["one_step"])
        _recursive(panels[2], report["recursive"])
        save_png(figure, path)


def _asked_and_got(axes: Any, report: Mapping[str, Any], asked: Tensor, got: Tensor) -> None:
    means = report["generated"]["by_asked"]
    ends = [min(means["asked"]), max(means["asked"])]
    axes.plot(ends, ends, color=COLORS[2], linewidth=0.8, linestyle="--", label="as asked")
    axes.scatter(asked, got, s=4, color=COLORS[0], alpha=0.25, linewidths=0, label="a network, training images")
    axes.plot(means["asked"], means["test_loss"], color=COLORS[1], linewidth=1.5, label="mean, test images")
    axes.set(xscale="log", xlabel="asked loss", ylabel="got loss")
    _logarithmic(axes)
    correlation = report["generated"]["spearman"]
    axes.set_title(f"asked and got: rank correlation {correlation:.3f}", loc="left", fontsize=9)
    axes.legend(frameon=False)


def _one_step(axes: Any, step: Mapping[str, Any]) -> None:
    for name in ("adam", "sgd"):
        counts = [int(each) for each in step[name]]
        losses = [each["test_loss"] for each in step[name].values()]
        label = "Adam" if name == "adam" else "gradient descent with momentum"
        axes.plot(counts, losses, color=COLORS[LINES[name]], marker="o", markersize=3, linewidth=1.5, label=label)
    loss = step["generated"]["test_loss"]
    axes.axhline(loss, color=COLORS[0], linewidth=0.8, linestyle="--")
    axes.plot([1], [loss], color=COLORS[0], marker="D", markersize=7, linestyle="", label="one generated step")
    axes.set(xscale="log", xlabel="steps", ylabel="loss on test images")
    _logarithmic(axes)
    axes.set_title("from held-out first weights", loc="left", fontsize=9)
    axes.legend(frameon=False)


def _recursive(axes: Any, recursive: Mapping[str, Any]) -> None:
    labels = {"same": "asked for the same again", "stairs": "asked for less every time"}
    for number, (name, label) in enumerate(labels.items()):
        for key, style in (("test_loss", "-"), ("loss", ":")):
            where = "test" if key == "test_loss" else "training"
            losses = recursive[name][key]
            axes.plot(
                range(len(losses)), losses, color=COLORS[number], linestyle=style, marker="o", markersize=3,
                linewidth=1.5, label=f"{label}, {where}",
            )  # fmt: skip
    axes.set(xlabel="generated steps", ylabel="loss")
    _logarithmic(axes, room=4.0)
    axes.set_title("a generated network as the next start", loc="left", fontsize=9)
    axes.legend(frameon=False)


def _logarithmic(axes: Any, room: float = 1.5) -> None:
    """A logarithmic y axis with plain numbers, and room for the legend above the curves by that factor."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * room)
    ticks = [each for each in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if low <= each <= high]
    axes.set_yticks(ticks, [f"{each:g}" for each in ticks])
    axes.minorticks_off()
