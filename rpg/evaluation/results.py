"""What an evaluation measured: the contents of ``evaluation.json``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rpg.evaluation.metrics import Summary
from rpg.section import Section
from tokenization.files import write_text

AT_DISTANCE = "_at_distance"
"""Ends the names of baselines that lie as far from the zoo as the generated networks."""

TRAINED_FROM = "_steps_from_"
"""Lies within the names of baselines that were trained on images: ``<steps>_steps_from_<baseline>``."""

ENSEMBLE = 'weight average ("ensemble")'
"""What tables and pictures call the average of all originals."""


class Spread(Section):
    """Generated networks against the zoo's own spread; 1 means alike.

    Attributes:
        mean_squared_deviation_ratio: mean squared distance from the zoo's average, generated over original. Far
            below 1 the generator has collapsed to the average; with high accuracy above 1 it may be noise around it.
        nearest_distance_ratio: median distance to the nearest original, generated over original (an original's
            nearest is another one). Near 0 the generator copies.
        diversity_ratio: median distance to the nearest other network of the same set, generated over original. Near
            0 the generated networks are copies of each other. None for fewer than two.
        disagreement: share of images that a generated network and its nearest original (in weights) answer
            differently, mean over the generated.

    A ratio is None where a generated network has values that are not finite.
    """

    mean_squared_deviation_ratio: float | None
    nearest_distance_ratio: float | None
    diversity_ratio: float | None
    disagreement: float


class Span(Section):
    """Generated networks beside the training checkpoints that they were asked to be (stored permutation states).

    Values are in units of each layer's root mean square deviation from the zoo's mean.
    """

    cosine: float = Field(description="of the deviation from the zoo's mean with the asked checkpoint's, mean")
    spread: float = Field(description="mean squared deviation from the zoo's mean, generated over asked")
    accuracy: float | None = Field(None, description="mean accuracy; None where it was not asked for")
    num: int = Field(description="networks that were measured")


class TwoSampleScores(Section):
    """One kind of networks beside as many held-out originals; distances are between class probabilities."""

    nearest_neighbour_accuracy: float = Field(
        description="share of networks whose nearest neighbour is of their own kind; 0.5 where the kinds are alike"
    )
    coverage: float = Field(description="share of held-out originals that are the nearest of at least one network")
    minimum_matching_distance: float = Field(description="mean distance of a held-out original to the nearest network")
    nearest_training: float = Field(description="median distance to the nearest training original")


class TwoSample(Section):
    """Networks beside originals that nothing was learned from, in what they compute.

    The distance of two networks is the root mean square, over the images, of that of their class probabilities.
    """

    num: int = Field(description="networks of each kind")
    held_out_nearest_training: float = Field(description="median distance of the held-out originals to the training's")
    sets: dict[str, TwoSampleScores]


class SetNovelty(Section):
    """How new one kind of networks is; distances are in units of the zoo's median nearest-neighbour distance."""

    plain_distance: Summary = Field(description="to the nearest original")
    matched_distance: Summary = Field(description="the same after matching hidden units")
    plain_distances: tuple[float, ...]
    matched_distances: tuple[float, ...]
    novel_and_performant: tuple[float, ...] = Field(description="share, for each τ")
    ci95: tuple[tuple[float, float], ...] = Field(description="95 % bootstrap interval over the networks, for each τ")
    disagreement: float = Field(description="share of images answered unlike the nearest original, mean")
    coverage: float = Field(description="share of originals that are the nearest of at least one network")


class NoveltyReport(Section):
    """Everything behind the novelty curve."""

    unit: float = Field(description="the originals' median distance to their nearest neighbour, layers normalised")
    accuracy_threshold: float = Field(description="the originals' median accuracy")
    groups: int = Field(description="groups of hidden units that could be matched; 0 where none are known")
    taus: tuple[float, ...]
    sets: dict[str, SetNovelty]

    def curve(self) -> dict[str, list[float]]:
        """``{"tau": […], "<networks>": […], …}``."""
        shares = {name: list(each.novel_and_performant) for name, each in self.sets.items()}
        return {"tau": list(self.taus), **shares}


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

    @property
    def label(self) -> str:
        """What tables and pictures call them."""
        return f"noise added, σ {self.sigma:g}" + (" relative" if self.relative else "")


class AverageScore(Section):
    """Score of the average of all originals, a single network."""

    accuracy: float
    similarity: float


class EvaluationResult(Section):
    """Everything an evaluation measured; ``evaluation.json`` holds its fields.

    ``ensemble`` is p-diff's word for the average of all weights. ``baselines`` are networks that no generator is
    needed for; those named ``…_at_distance`` lie as far from the zoo as the generated ones. ``spread`` compares the
    generated networks' spread in weight space with the zoo's, and is None where the zoo has none. ``span`` says whether
    they are the checkpoints that they were asked to be; it is None where none was. ``two_sample`` compares with
    originals held out of the training, where there are any. ``novelty`` is the share of networks that are new and good
    by kind, ``novelty_details`` what is behind it.
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
    span: Span | None = None
    two_sample: TwoSample | None = None
    novelty: dict[str, list[float]] | None = None
    novelty_details: NoveltyReport | None = None

    def kinds(self) -> list[tuple[str, NetworkScores]]:
        """What tables and pictures compare, with its name: originals, noise, baselines, generated networks."""
        own = [(name.replace("_", " "), each) for name, each in self.baselines.items() if AT_DISTANCE not in name]
        noise = [(each.label, each) for each in self.noise]
        return [("original", self.original), *noise, *own, ("generated", self.generated)]

    def save(self, path: Path | str) -> None:
        """Write the result as JSON, atomically. Raises InputError if the file cannot be written."""
        write_text(path, self.model_dump_json(indent=1) + "\n")
