"""The comparison of an evaluation in the terminal."""

from __future__ import annotations

import torch
from rich.console import Console

from rpg.console import FiguresTable
from rpg.evaluation.results import (
    AT_DISTANCE,
    ENSEMBLE,
    EvaluationResult,
    NoveltyReport,
    Spread,
    TwoSample,
)

TAUS_SHOWN = (1, 2, 3, 4, 6, 12)


def print_table(result: EvaluationResult, console: Console | None = None) -> None:
    """Print the comparison, one row a kind of network, then spread and novelty.

    Args:
        result: what ``evaluate`` measured.
        console: where to print; standard output when None.
    """
    console = console or Console()
    console.print(_accuracy_table(result))
    console.print("IoU: similarity of wrong predictions to the most similar (other) original's, mean over the networks")
    if result.spread is not None:
        console.print(f"generated over original: {_spread_line(result.spread)}", highlight=False)
    if (span := result.span) is not None:
        line = f"cosine {span.cosine:.2f}, squared deviation {span.spread:.2f} of theirs, {span.num} networks"
        if span.accuracy is not None:
            line += f", accuracy {100 * span.accuracy:.1f} %"
        console.print(f"generated beside the checkpoints that they were asked to be: {line}", highlight=False)
    if result.two_sample is not None:
        console.print(_two_sample_table(result.two_sample))
    if result.novelty_details is not None:
        console.print(_novelty_table(result.novelty_details))


def means_of(result: EvaluationResult) -> dict[str, dict[str, float]]:
    """Mean accuracy, and similarity to the originals, of every kind of networks."""
    found = {name: {"accuracy": s.accuracy.mean, "similarity": s.similarity.mean} for name, s in result.kinds()}
    return {**found, ENSEMBLE: {"accuracy": result.ensemble.accuracy, "similarity": result.ensemble.similarity}}


def _accuracy_table(result: EvaluationResult) -> FiguresTable:
    rows = []
    original, *baselines, generated = result.kinds()
    average = f"{100 * result.ensemble.accuracy:.1f}"
    for name, scores in (original, *baselines, generated):
        figures = (scores.accuracy.mean, scores.accuracy.max, scores.accuracy.min)
        percent = [f"{100 * figure:.1f}" for figure in figures]
        rows.append([name, str(scores.count), *percent, f"{scores.similarity.mean:.2f}", ""])
    seconds = result.generated.seconds_per_network
    rows[-1][-1] = "" if seconds is None else f"{seconds:.4f}"
    rows.insert(1, [ENSEMBLE, "1", average, "", "", f"{result.ensemble.similarity:.2f}", ""])
    title = f"accuracy (%) on {result.num_images} {result.split} images"
    return FiguresTable(("networks", "count", "mean", "best", "min", "IoU", "seconds"), rows, title)


def _spread_line(spread: Spread) -> str:
    ratios = (
        ("squared deviation from the zoo's average", spread.mean_squared_deviation_ratio),
        ("distance to the nearest original", spread.nearest_distance_ratio),
        ("distance to the nearest of its own kind", spread.diversity_ratio),
    )
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios if ratio is not None)


def _two_sample_table(result: TwoSample) -> FiguresTable:
    """Every kind beside as many held-out originals."""
    rows = []
    for name, each in result.sets.items():
        figures = (
            each.nearest_neighbour_accuracy,
            each.coverage,
            each.minimum_matching_distance,
            each.nearest_training,
        )
        rows.append([name.replace("_", " "), *(f"{figure:.3f}" for figure in figures)])
    title = f"beside {result.num} originals held out of the training, in class probabilities"
    caption = (
        "1-NNA: nearest neighbour of the same kind, 0.5 where kinds cannot be told apart; nearest training original of "
        f"the held-out ones: {result.held_out_nearest_training:.3f}"
    )
    return FiguresTable(
        ("networks", "1-NNA", "coverage", "matching distance", "nearest training"), rows, title, caption
    )


def _novelty_table(novelty: NoveltyReport) -> FiguresTable:
    """The novelty curves, those of the baselines at the generated networks' distance first."""
    columns = [i for i, tau in enumerate(novelty.taus) if tau in TAUS_SHOWN] or list(range(len(novelty.taus)))
    rows = []
    for name in sorted(novelty.sets, key=lambda name: (name != "generated", not name.endswith(AT_DISTANCE))):
        each = novelty.sets[name]
        shares = [f"{100 * each.novel_and_performant[index]:.0f}" for index in columns]
        distance = f"{torch.tensor(each.matched_distances).median():.1f}"
        label = name.removesuffix(AT_DISTANCE) + (" *" if name.endswith(AT_DISTANCE) else "")
        rows.append([label.replace("_", " "), *shares, distance])
    return FiguresTable(
        ("networks", *(f"{novelty.taus[index]:g}" for index in columns), "median"),
        rows,
        f"new and good (%): accuracy at least {100 * novelty.accuracy_threshold:.1f} and distance over",
        "distances in the zoo's median nearest-neighbour distances; * at the generated networks' distance",
    )
