"""The evaluation of networks too large to be held together: each is made, scored, placed and dropped.

Memory is the zoo's mean, one network, the network that scores it and the images, whatever the number of networks. The
zoo is read from its memory maps. Distances are in normalised values (`rpg.evaluation.span`) and hidden units are not
matched. n checkpoints, M networks of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rpg.evaluation.asking import Answers, Made, Scored, Stopwatch, ask, ask_checkpoints, score
from rpg.evaluation.combinations import AFFORDABLE, MANY_VALUES, NAMES, Cook, Recipe, cook, recipes
from rpg.evaluation.config import Baseline, EvaluateConfig
from rpg.evaluation.evaluate import score_networks, summarize_originals
from rpg.evaluation.metrics import accuracy
from rpg.evaluation.network_merges import AFFORDABLE_MERGES, Merges
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
from rpg.evaluation.span import ZooSpan, measure_span
from rpg.evaluation.two_sample import two_sample
from rpg.evaluation.workers import Workers
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.base import Classifier
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError


def evaluate_streamed(
    task: Classifier,
    zoo: ZooSpan,
    generated: Made,
    config: EvaluateConfig,
    *,
    held_out: Sequence[Checkpoint] = (),
    seed: int = 0,
    merges: Merges | None = None,
    workers: Workers | None = None,
) -> EvaluationResult:
    """What `rpg.evaluation.evaluate.evaluate` measures, of networks that are not held together.

    Args:
        task: predicts and knows the labels.
        zoo: the checkpoints that the generator learned from.
        generated: makes the networks, one at a time.
        config: images, baselines and distances.
        held_out: checkpoints that nothing was learned from.
        seed: decides the baselines' draws and the bootstrap.
        merges: merges the zoo's networks, if they are to be merged.
        workers: share the work; this process alone when None.

    Raises:
        InputError: a baseline that there is none of, or baselines that were to be trained.
    """
    if config.control is not None:
        raise InputError("evaluate.control trains baselines side by side, which networks this large do not allow.")
    labels, split, workers = task.labels(config.split), config.split, workers or Workers()
    clock, num = Stopwatch(generated.networks), min(config.num_baseline, generated.num)
    workers.expect(len(zoo.checkpoints) + generated.num + len(held_out) + most_baselines(config, num), len(labels))
    made = {"generated": score(task, clock, split, zoo, workers, generated.places, generated.num)}
    originals = ask_checkpoints(task, zoo.checkpoints, split, workers)
    distance = zoo.distances(made["generated"].places).amin(1).nanmedian().item()
    sums, merged = baseline_recipes(zoo, config, num, distance, seed), merge_recipes(zoo, merges, config, num, seed)
    for name, batch in [*sums.items(), *merged.items()]:
        made[name] = _score_recipes(task, zoo, batch, split, workers)
    two_samples = _two_sample(task, made, originals, held_out, split, workers)
    workers.finish()
    scores = {n: score_networks(each.predictions, originals.predictions, labels, seed) for n, each in made.items()}
    novelty = _novelty(zoo, made, originals.predictions, labels, config, seed)
    average, sigmas = scores["average"], {f"noise_{sigma:g}": sigma for sigma in config.noise}
    return EvaluationResult(
        split=split,
        num_images=len(labels),
        seed=seed,
        original=summarize_originals(originals.predictions, labels, seed),
        ensemble=AverageScore(accuracy=average.accuracy.mean, similarity=average.similarity.mean),
        noise=tuple(NoiseScores(sigma=s, relative=True, **dict(scores[n])) for n, s in sigmas.items() if n in scores),
        baselines={name: each for name, each in scores.items() if name not in (*sigmas, "average", "generated")},
        generated=GeneratedScores(seconds_per_network=clock.mean if clock.count else None, **dict(scores["generated"])),
        spread=_spread(zoo, made["generated"], originals.predictions),
        span=measure_span(zoo, made["generated"].places, generated.asked, scores["generated"].accuracy.mean),
        two_sample=two_samples,
        novelty=novelty.curve() if novelty else None,
        novelty_details=novelty,
    )


def score_span(task: Classifier, zoo: ZooSpan, made: Made, split: str, workers: Workers | None = None) -> Span | None:
    """Whether networks, made one at a time, are the checkpoints they were asked to be, and how accurate they are."""
    scored = score(task, made.networks, split, zoo, workers or Workers(), made.places, made.num)
    accurate = accuracy(scored.predictions, task.labels(split)).mean().item()
    return measure_span(zoo, scored.places, made.asked, accurate)


def baseline_recipes(
    zoo: ZooSpan, config: EvaluateConfig, num: int, distance: float, seed: int
) -> dict[str, list[Recipe]]:
    """The average and the baselines that are asked for or affordable, by the name under which they are reported."""
    count = len(zoo.checkpoints)
    made = {"average": [Recipe(torch.zeros(count, dtype=torch.float64))]}
    names = without_merges(config.baselines) if config.baselines is not None else AFFORDABLE if is_large(zoo) else NAMES
    for name in names if count > 1 and distance == distance else ():
        if name == "noise":
            made |= {f"noise_{sigma:g}": recipes(zoo, name, num, seed, sigma=sigma) for sigma in config.noise}
        else:
            reported = f"average_of_{min(16, count)}" if name == "average_of_k" else name
            made[reported] = recipes(zoo, name, num, seed, distance=distance)
    return made


def merge_recipes(
    zoo: ZooSpan, merges: Merges | None, config: EvaluateConfig, num: int, seed: int, shares: Tensor | None = None
) -> dict[str, Sequence[Recipe | Cook]]:
    """Merged networks that are asked for or affordable, by method, of the networks with the largest ``shares``.

    Without shares ``[num, n]`` they are drawn at random.
    """
    if merges is None or len(zoo.checkpoints) < 2:
        return {}
    default = (*AFFORDABLE_MERGES, "peft_svd") if is_large(zoo) else merges.methods
    wanted = [name for name in merges.methods if name in (default if config.baselines is None else config.baselines)]
    rows = merges.draw(num, make_rng(seed, "merged")) if shares is None else shares
    return {
        name: [partial(merges.merge, name, row, derive_seed(seed, name, number)) for number, row in enumerate(rows)]
        for name in wanted
    }


def is_large(zoo: ZooSpan) -> bool:
    """Whether each network takes minutes."""
    return sum(map(len, zoo.means.values())) > MANY_VALUES


def without_merges(names: Sequence[Baseline]) -> tuple[Baseline, ...]:
    """The kinds of baselines that are recipes."""
    return tuple(each for each in names if not each.startswith(("merge_", "peft_")))


def most_baselines(config: EvaluateConfig, num: int) -> int:
    """About how many baselines there will be: only progress is told by it."""
    return 1 + num * (len(config.baselines) if config.baselines is not None else len(NAMES) - 1 + len(config.noise))


def _score_recipes(
    task: Classifier, zoo: ZooSpan, batch: Sequence[Recipe | Cook], split: str, workers: Workers
) -> Scored:
    places = workers.places(len(batch))
    made = (batch[place] for place in places)
    networks = (cook(zoo, each) if isinstance(each, Recipe) else each() for each in made)
    combined = [each.weights for each in batch if isinstance(each, Recipe) and not each.noise]
    if len(combined) < len(batch):
        return score(task, networks, split, zoo, workers, places, len(batch))
    asked = ask(task, networks, split, workers, places, len(batch))
    return Scored(asked.predictions, asked.probabilities, zoo.place_combinations(torch.stack(combined)))


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
    task: Classifier,
    made: dict[str, Scored],
    originals: Answers,
    held_out: Sequence[Checkpoint],
    split: str,
    workers: Workers,
) -> TwoSample | None:
    if originals.probabilities is None or len(held_out) < 2:
        return None
    sets = {name: each.probabilities for name, each in made.items() if each.probabilities is not None}
    others = ask_checkpoints(task, held_out, split, workers).probabilities
    return two_sample(sets, originals.probabilities, others) if others is not None else None
