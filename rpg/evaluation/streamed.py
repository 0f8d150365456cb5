"""The evaluation of networks too large to be held together: each is made, scored, placed and dropped.

Memory is the zoo's mean, one network, the network that scores it and the images, whatever the number of networks. The
zoo is read from its memory maps. Distances are in normalised values (`rpg.evaluation.span`) and hidden units are not
matched. n checkpoints, M networks of a kind.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rpg.evaluation.combinations import AFFORDABLE, MANY_VALUES, NAMES, Recipe, cook, recipes
from rpg.evaluation.config import EvaluateConfig
from rpg.evaluation.evaluate import score_networks, summarize_originals
from rpg.evaluation.metrics import accuracy
from rpg.evaluation.novelty_curve import score_novelty
from rpg.evaluation.results import (
    AverageScore,
    EvaluationResult,
    GeneratedScores,
    NoiseScores,
    NoveltyReport,
    Span,
    Spread,
    TwoSample,
)
from rpg.evaluation.span import Places, ZooSpan, measure_span
from rpg.evaluation.two_sample import two_sample
from rpg.evaluation.vectors import StateDict
from rpg.tasks.base import Classifier, LogitTask
from rpg.tasks.images.images import answers
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError


@dataclass(frozen=True)
class Answers:
    """What networks compute.

    Attributes:
        predictions: ``[M, images]``.
        probabilities: ``[M, images, classes]``; None of a task that gives none.
    """

    predictions: Tensor
    probabilities: Tensor | None


@dataclass(frozen=True)
class Scored(Answers):
    """What remains of networks once they are dropped: also ``places``, where they lie in the zoo."""

    places: Places


def ask(task: Classifier, networks: Iterable[StateDict], split: str) -> Answers:
    """What networks compute, one at a time."""
    if not isinstance(task, LogitTask):
        return Answers(torch.stack([task.predict([each], split)[0] for each in networks]), None)
    pairs = [(answers(logits), logits.float().softmax(-1)) for logits in task.logits(networks, split)]
    return Answers(*(torch.stack(column) for column in zip(*pairs, strict=True)))


def score(task: Classifier, networks: Iterable[StateDict], split: str, zoo: ZooSpan) -> Scored:
    """What networks compute and where they lie, one at a time."""
    placed: list[Places] = []

    def place(network: StateDict) -> StateDict:
        placed.append(zoo.place([network]))
        return network

    asked = ask(task, map(place, networks), split)  # unlike a loop, map holds no network while the next is made
    return Scored(asked.predictions, asked.probabilities, Places.join(placed))


def evaluate_streamed(
    task: Classifier,
    zoo: ZooSpan,
    generated: Iterable[StateDict],
    config: EvaluateConfig,
    *,
    asked: Sequence[int] = (),
    held_out: Sequence[Checkpoint] = (),
    seed: int = 0,
) -> EvaluationResult:
    """What `rpg.evaluation.evaluate.evaluate` measures, of networks that are not held together.

    Args:
        task: predicts and knows the labels.
        zoo: the checkpoints that the generator learned from.
        generated: makes the networks, one at a time.
        config: images, baselines and distances.
        asked: the checkpoint that each generated network was asked to be, if any was.
        held_out: checkpoints that nothing was learned from.
        seed: decides the baselines' draws and the bootstrap.

    Raises:
        InputError: a baseline that there is none of, or baselines that were to be trained.
    """
    if config.control is not None:
        raise InputError("evaluate.control trains baselines side by side, which networks this large do not allow.")
    labels, split = task.labels(config.split), config.split
    clock = Stopwatch(generated)
    made = {"generated": score(task, clock, split, zoo)}
    originals = ask(task, map(load, zoo.checkpoints), split)
    num = min(config.num_baseline, len(made["generated"].predictions))
    distance = zoo.distances(made["generated"].places).amin(1).nanmedian().item()
    for name, batch in baseline_recipes(zoo, config, num, distance, seed).items():
        made[name] = _score_recipes(task, zoo, batch, split)
    scores = {n: score_networks(each.predictions, originals.predictions, labels, seed) for n, each in made.items()}
    novelty = _novelty(zoo, made, originals.predictions, labels, config, seed)
    average, sigmas = scores["average"], {f"noise_{sigma:g}": sigma for sigma in config.noise}
    return EvaluationResult(
        split=split,
        num_images=len(labels),
        seed=seed,
        original=summarize_originals(originals.predictions, labels, seed),
        ensemble=AverageScore(accuracy=average.accuracy.mean, similarity=average.similarity.mean),
        noise=tuple(
            NoiseScores(sigma=sigma, relative=True, **dict(scores[name]))
            for name, sigma in sigmas.items()
            if name in scores
        ),
        baselines={name: each for name, each in scores.items() if name not in (*sigmas, "average", "generated")},
        generated=GeneratedScores(seconds_per_network=clock.mean, **dict(scores["generated"])),
        spread=_spread(zoo, made["generated"], originals.predictions),
        span=measure_span(zoo, made["generated"].places, asked, scores["generated"].accuracy.mean),
        two_sample=_two_sample(task, made, originals, held_out, split),
        novelty=novelty.curve() if novelty else None,
        novelty_details=novelty,
    )


def score_span(
    task: Classifier, zoo: ZooSpan, networks: Iterable[StateDict], asked: Sequence[int], split: str
) -> Span | None:
    """Whether networks, made one at a time, are the checkpoints they were asked to be, and how accurate they are."""
    scored = score(task, networks, split, zoo)
    accurate = accuracy(scored.predictions, task.labels(split)).mean().item()
    return measure_span(zoo, scored.places, asked, accurate)


class Stopwatch:
    """An iterable that takes the time its members take; ``mean`` is that of one, in seconds."""

    def __init__(self, members: Iterable[StateDict]) -> None:
        self.members, self.seconds, self.count = iter(members), 0.0, 0

    def __iter__(self) -> Iterator[StateDict]:
        return self

    def __next__(self) -> StateDict:
        started = time.perf_counter()
        member = next(self.members)
        self.seconds, self.count = self.seconds + time.perf_counter() - started, self.count + 1
        return member

    @property
    def mean(self) -> float:
        """Seconds a member."""
        return self.seconds / self.count


def baseline_recipes(
    zoo: ZooSpan, config: EvaluateConfig, num: int, distance: float, seed: int
) -> dict[str, list[Recipe]]:
    """The average and the baselines that are asked for or affordable, by the name under which they are reported."""
    count = len(zoo.checkpoints)
    made = {"average": [Recipe(torch.zeros(count, dtype=torch.float64))]}
    large = sum(map(len, zoo.means.values())) > MANY_VALUES
    names = config.baselines if config.baselines is not None else AFFORDABLE if large else NAMES
    for name in names if count > 1 and distance == distance else ():
        if name == "noise":
            made |= {f"noise_{sigma:g}": recipes(zoo, name, num, seed, sigma=sigma) for sigma in config.noise}
        else:
            reported = f"average_of_{min(16, count)}" if name == "average_of_k" else name
            made[reported] = recipes(zoo, name, num, seed, distance=distance)
    return made


def _score_recipes(task: Classifier, zoo: ZooSpan, batch: Sequence[Recipe], split: str) -> Scored:
    networks = map(partial(cook, zoo), batch)
    if any(recipe.noise for recipe in batch):
        return score(task, networks, split, zoo)
    asked = ask(task, networks, split)
    places = zoo.place_combinations(torch.stack([recipe.weights for recipe in batch]))
    return Scored(asked.predictions, asked.probabilities, places)


def _spread(zoo: ZooSpan, generated: Scored, original_predictions: Tensor) -> Spread | None:
    unit = zoo.unit()
    distances = zoo.distances(generated.places)
    if not unit > 0 or not bool(distances.isfinite().all()):
        return None
    nearest = distances.min(1)
    return Spread(
        mean_squared_deviation_ratio=generated.places.squares.mean().item() / zoo.mean_square,
        nearest_distance_ratio=nearest.values.median().item() / unit,
        diversity_ratio=None,  # it would need two generated networks at once
        disagreement=(generated.predictions != original_predictions[nearest.indices]).double().mean().item(),
    )


def _novelty(
    zoo: ZooSpan,
    made: dict[str, Scored],
    original_predictions: Tensor,
    labels: Tensor,
    config: EvaluateConfig,
    seed: int,
) -> NoveltyReport | None:
    unit = zoo.unit()
    if not unit > 0:
        return None
    sets = {}
    for name, each in made.items():
        far = zoo.distances(each.places) / unit
        sets[name] = score_novelty(
            far, far, each.predictions, original_predictions, labels, taus=config.taus, seed=seed
        )
    threshold = accuracy(original_predictions, labels).median().item()
    return NoveltyReport(unit=unit, accuracy_threshold=threshold, groups=0, taus=config.taus, sets=sets)


def _two_sample(
    task: Classifier, made: dict[str, Scored], originals: Answers, held_out: Sequence[Checkpoint], split: str
) -> TwoSample | None:
    if originals.probabilities is None or len(held_out) < 2:
        return None
    sets = {name: each.probabilities for name, each in made.items() if each.probabilities is not None}
    others = ask(task, map(load, held_out), split).probabilities
    return two_sample(sets, originals.probabilities, others) if others is not None else None


def load(checkpoint: Checkpoint) -> StateDict:
    """A checkpoint in memory, and no page of its file any longer."""
    state_dict = checkpoint.state_dict()
    for name in checkpoint.tensors:
        checkpoint.release(name)
    return state_dict
