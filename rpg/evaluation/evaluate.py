"""One evaluation: originals, trivial baselines and generated networks, scored on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from rpg.evaluation import baselines
from rpg.evaluation.candidates import AT_DISTANCE, STARTS, at_distance, symmetries, trivial_networks
from rpg.evaluation.control import ControlConfig, finetuned_baselines
from rpg.evaluation.metrics import Summary, accuracy, summarize
from rpg.evaluation.novelty import TAUS, Spread, measure_spread, weight_vectors
from rpg.evaluation.novelty_curve import Distances, NoveltyReport, measure_novelty
from rpg.evaluation.plots import plot_accuracy_similarity
from rpg.evaluation.similarity import max_similarity, max_similarity_among
from rpg.evaluation.vectors import StateDict
from rpg.section import Section
from rpg.seeding import generator
from rpg.tasks import Task
from tokenization.errors import InputError
from tokenization.files import publish_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class NetworkScores(Section):
    """Scores of several networks: summaries, then the figures of each. Accuracies and similarities are in 0 … 1."""

    count: int
    accuracy: Summary
    similarity: Summary = Field(description="each network's greatest error IoU with any (other) original")
    accuracies: tuple[float, ...]
    similarities: tuple[float, ...]


class GeneratedScores(NetworkScores):
    """Scores of the generated networks, and what one took to generate."""

    seconds_per_network: float | None


class NoiseScores(NetworkScores):
    """Scores of originals with noise of one strength."""

    sigma: float
    relative: bool = Field(description="sigma is in units of each layer's standard deviation")


class AverageScore(Section):
    """Score of the average of all originals, a single network."""

    accuracy: float
    similarity: float


class EvaluationResult(Section):
    """Everything an evaluation measured; ``evaluation.json`` holds its fields.

    ``ensemble`` is p-diff's word for the average of all weights. ``baselines`` are networks that no generator is
    needed for; those named ``…_at_distance`` lie as far from the zoo as the generated ones. ``spread`` compares the
    generated networks' spread in weight space with the zoo's, and is None where the zoo has none. ``novelty`` is the
    share of networks that are new and good by kind, ``novelty_details`` what is behind it.
    """

    split: str
    num_images: int
    seed: int
    original: NetworkScores
    ensemble: AverageScore
    noise: tuple[NoiseScores, ...]
    baselines: dict[str, NetworkScores]
    generated: GeneratedScores
    spread: Spread | None
    novelty: dict[str, list[float]] | None = None
    novelty_details: NoveltyReport | None = None

    def save(self, path: Path | str) -> None:
        """Write the result as JSON, atomically. Raises InputError if the file cannot be written."""
        publish_text(path, self.model_dump_json(indent=1) + "\n")


def evaluate(
    task: Task,
    originals: Sequence[StateDict],
    networks: Sequence[StateDict],
    *,
    folder: Path | str | None = None,
    seed: int = 0,
    seconds_per_network: float | None = None,
    noise: Sequence[float] = (0.01, 0.05, 0.15),
    relative: bool = True,
    num_baseline: int = 50,
    split: str = "test",
    runs: Sequence[int] | None = None,
    taus: Sequence[float] = TAUS,
    control: ControlConfig | None = None,
) -> EvaluationResult:
    """Score generated networks beside the originals and the trivial baselines.

    Args:
        task: predicts and knows the labels.
        originals: the zoo's networks that the generator learned from.
        networks: the generated ones.
        folder: where to write ``evaluation.json`` and ``scatter.png``; nothing is written without.
        seed: decides the baselines' draws and the bootstrap.
        seconds_per_network: what generating one took, to be reported.
        noise: strengths of the noise-added baseline.
        relative: they are in units of each layer's standard deviation, else of the weights.
        num_baseline: networks made for each baseline.
        split: images to score on.
        runs: which training run each original is of; all of one when None.
        taus: distances of the novelty curve, in units of the zoo's median nearest-neighbour distance.
        control: how baselines at the generated networks' distance are trained as a control; none when None.

    Raises:
        InputError: there are no originals or no generated networks, they do not fit the task, or the folder cannot
            be written.
    """
    for name, given in (("originals", originals), ("generated networks", networks)):
        if not given:
            raise InputError(name, "none", "at least one")
    labels = task.labels(split)
    original_predictions = task.predict(originals, split)
    predictions = task.predict(networks, split)

    runs = [0] * len(originals) if runs is None else list(runs)
    measure = Distances(originals, runs, symmetries(task))
    noisy = {
        f"noise_{sigma:g}": baselines.add_noise(
            originals, num_baseline, sigma, generator(seed, "noise", index), relative=relative
        )
        for index, sigma in enumerate(noise)
    }
    trivial = trivial_networks(originals, runs, num_baseline, seed)
    near = at_distance(measure, networks, num_baseline, seed)
    trivial |= near
    if control is not None:
        trivial |= finetuned_baselines(task, {name: near[name] for name in STARTS if name in near}, control, seed)
    sets = {"generated": networks, **noisy, "average": [baselines.average(originals)], **trivial}
    answers = {name: predictions if name == "generated" else task.predict(each, split) for name, each in sets.items()}
    scores = {name: _scores(each, original_predictions, labels, seed) for name, each in answers.items()}
    novelty = measure_novelty(sets, answers, original_predictions, labels, measure, taus=taus, seed=seed)
    own = max_similarity_among(original_predictions, labels)
    average = scores["average"]
    result = EvaluationResult(
        split=split,
        num_images=len(labels),
        seed=seed,
        original=_summarized(accuracy(original_predictions, labels), own, seed),
        ensemble=AverageScore(accuracy=average.accuracy.mean, similarity=average.similarity.mean),
        noise=tuple(NoiseScores(sigma=sigma, relative=relative, **dict(scores[f"noise_{sigma:g}"])) for sigma in noise),
        baselines={name: scores[name] for name in trivial},
        generated=GeneratedScores(seconds_per_network=seconds_per_network, **dict(scores["generated"])),
        spread=measure_spread(*weight_vectors(originals, networks), original_predictions, predictions),
        novelty=novelty.curve() if novelty else None,
        novelty_details=novelty,
    )
    if folder is not None:
        folder = Path(folder)
        result.save(folder / "evaluation.json")
        plot_accuracy_similarity(result, folder / "scatter.png")
    return result


def _scores(predictions: Tensor, originals: Tensor, labels: Tensor, seed: int) -> NetworkScores:
    return _summarized(accuracy(predictions, labels), max_similarity(predictions, originals, labels), seed)


def _summarized(accuracies: Tensor, similarities: Tensor, seed: int) -> NetworkScores:
    return NetworkScores(
        count=len(accuracies),
        accuracy=summarize(accuracies, seed),
        similarity=summarize(similarities, seed),
        accuracies=tuple(accuracies.tolist()),
        similarities=tuple(similarities.tolist()),
    )


def print_table(result: EvaluationResult, console: Console | None = None) -> None:
    """Print the comparison, one row a kind of network.

    Args:
        result: what ``evaluate`` measured.
        console: where to print; standard output when None.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"accuracy (%) on {result.num_images} {result.split} images")
    table.add_column("networks", no_wrap=True)
    for name in ("count", "mean", "best", "min", "IoU", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, scores: NetworkScores, seconds: str = "", style: str = "") -> None:
        figures = (scores.accuracy.mean, scores.accuracy.max, scores.accuracy.min)
        percent = [f"{100 * figure:.1f}" for figure in figures]
        table.add_row(name, str(scores.count), *percent, f"{scores.similarity.mean:.2f}", seconds, style=style)

    row("original", result.original)
    average = f"{100 * result.ensemble.accuracy:.1f}"
    table.add_row('weight average ("ensemble")', "1", average, "", "", f"{result.ensemble.similarity:.2f}", "")
    for noise in result.noise:
        row(f"noise added, σ {noise.sigma:g}" + (" relative" if noise.relative else ""), noise)
    for name, scores in result.baselines.items():
        if not name.endswith(AT_DISTANCE):
            row(name.replace("_", " "), scores)
    seconds = result.generated.seconds_per_network
    row("generated", result.generated, "" if seconds is None else f"{seconds:.4f}", style="bold")
    console = console or Console()
    console.print(table)
    console.print("IoU: similarity of wrong predictions to the most similar (other) original's, mean over the networks")
    if (spread := result.spread) is not None:
        ratios = (
            ("squared deviation from the zoo's average", spread.mean_squared_deviation_ratio),
            ("distance to the nearest original", spread.nearest_distance_ratio),
            ("distance to the nearest of its own kind", spread.diversity_ratio),
        )
        shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios if ratio is not None)
        console.print(f"generated over original: {shown}", highlight=False)
    if result.novelty_details is not None:
        console.print(_novelty_table(result.novelty_details))


def _novelty_table(novelty: NoveltyReport) -> Table:
    """The novelty curves, those of the baselines at the generated networks' distance first."""
    from rich.table import Table

    shown = [1, 2, 3, 4, 6, 12]
    columns = [index for index, tau in enumerate(novelty.taus) if tau in shown] or list(range(len(novelty.taus)))
    table = Table(title=f"new and good (%): accuracy at least {100 * novelty.accuracy_threshold:.1f} and distance over")
    table.add_column("networks", no_wrap=True)
    for index in columns:
        table.add_column(f"{novelty.taus[index]:g}", justify="right", no_wrap=True)
    table.add_column("median", justify="right", no_wrap=True)
    for name in sorted(novelty.sets, key=lambda name: (name != "generated", not name.endswith(AT_DISTANCE))):
        each = novelty.sets[name]
        shares = [f"{100 * each.novel_and_performant[index]:.0f}" for index in columns]
        distance = f"{torch.tensor(each.matched_distances).median():.1f}"
        label = name.removesuffix(AT_DISTANCE) + (" *" if name.endswith(AT_DISTANCE) else "")
        style = "bold" if name == "generated" else ""
        table.add_row(label.replace("_", " "), *shares, distance, style=style)
    table.caption = "distances in the zoo's median nearest-neighbour distances; * at the generated networks' distance"
    return table
