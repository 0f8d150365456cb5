"""One evaluation: originals, trivial baselines and generated networks, scored on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rpg.evaluation import baselines
from rpg.evaluation.baseline_sets import baselines_at_distance, baselines_of_several, noisy_baselines
from rpg.evaluation.config import EvaluateConfig
from rpg.evaluation.metrics import accuracy, summarize
from rpg.evaluation.network_merges import MERGES, merged_networks
from rpg.evaluation.novelty import measure_spread
from rpg.evaluation.novelty_curve import Distances, measure_novelty
from rpg.evaluation.page.drawing import accuracy_by_similarity, save_points
from rpg.evaluation.permutations import symmetries
from rpg.evaluation.results import (
    TRAINED_FROM,
    AverageScore,
    EvaluationResult,
    GeneratedScores,
    NetworkScores,
    NoiseScores,
)
from rpg.evaluation.similarity import max_similarity, max_similarity_among
from rpg.evaluation.trained_baselines import START_NAMES, finetuned_baselines
from rpg.evaluation.vectors import StateDict
from rpg.evaluation.workers import Workers
from rpg.tasks.base import Classifier
from tokenization.errors import InputError


def evaluate(
    task: Classifier,
    originals: Sequence[StateDict],
    networks: Sequence[StateDict],
    config: EvaluateConfig | None = None,
    *,
    runs: Sequence[int] | None = None,
    seed: int = 0,
    seconds_per_network: float | None = None,
    workers: Workers | None = None,
    finish: Callable[[StateDict], StateDict] | None = None,
) -> EvaluationResult:
    """Score generated networks beside the originals and the trivial baselines.

    Args:
        task: predicts and knows the labels.
        originals: the zoo's networks that the generator learned from.
        networks: the generated ones.
        config: images, baselines and distances; the defaults when None.
        runs: which training run each original is of; all of one when None.
        seed: decides the baselines' draws and the bootstrap.
        seconds_per_network: what generating one took, to be reported.
        workers: the processes that share the scoring.
        finish: makes every baseline what the zoo's networks are: pruned, or quantised.

    Raises:
        InputError: there are no originals or no generated networks, or they do not fit the task.
    """
    if not originals or not networks:
        raise InputError(f"there are no {'generated networks' if originals else 'originals'}; give at least one")
    config, workers = config or EvaluateConfig(), workers or Workers()
    labels = task.labels(config.split)
    measure = Distances(originals, [0] * len(originals) if runs is None else runs, symmetries(task))
    sigmas = config.noise if _wanted(config, "noise") else ()
    noisy = noisy_baselines(originals, sigmas, config.num_baseline, seed)
    trivial = _trivial(task, measure, networks, config, seed)
    made = {**noisy, "average": [baselines.average(originals)], **trivial}
    sets = {"generated": networks, **{name: [*map(finish or dict, each)] for name, each in made.items()}}
    workers.expect(len(originals) + sum(map(len, sets.values())), len(labels))
    original_predictions = predict(task, originals, config.split, workers)
    answers = {name: predict(task, each, config.split, workers) for name, each in sets.items()}
    scores = {name: score_networks(each, original_predictions, labels, seed) for name, each in answers.items()}
    novelty = measure_novelty(sets, answers, original_predictions, labels, measure, taus=config.taus, seed=seed)
    average = scores["average"]
    return EvaluationResult(
        split=config.split,
        num_images=len(labels),
        seed=seed,
        original=summarize_originals(original_predictions, labels, seed),
        ensemble=AverageScore(accuracy=average.accuracy.mean, similarity=average.similarity.mean),
        noise=tuple(
            NoiseScores(sigma=sigma, relative=True, **dict(scores[name]))
            for sigma, name in zip(sigmas, noisy, strict=True)
        ),
        baselines={name: scores[name] for name in trivial},
        generated=GeneratedScores(seconds_per_network=seconds_per_network, **dict(scores["generated"])),
        spread=measure_spread(measure.zoo, measure.vectors(networks), original_predictions, answers["generated"]),
        novelty=novelty.curve() if novelty else None,
        novelty_details=novelty,
    )


def predict(task: Classifier, networks: Sequence[StateDict], split: str, workers: Workers) -> Tensor:
    """Predicted classes of each network, int64 ``[num, images]``, some by each of several processes."""
    if workers.partition.size == 1 and workers.report is None:
        return task.predict(networks, split)
    return torch.stack(workers.map_some(lambda some: task.predict(some, split), networks))


def save_evaluation(result: EvaluationResult, folder: Path | str) -> None:
    """Write ``evaluation.json`` and ``scatter.png``. Raises InputError if the folder cannot be written."""
    result.save(Path(folder) / "evaluation.json")
    save_points(*accuracy_by_similarity(result), Path(folder) / "scatter.png")


def _wanted(config: EvaluateConfig, name: str) -> bool:
    """Whether a baseline is to be made; trained ones are decided by ``evaluate.control``."""
    kind = "average_of_k" if name.startswith("average_of_") else name
    return config.baselines is None or kind in config.baselines or TRAINED_FROM in name


def _trivial(
    task: Classifier, measure: Distances, networks: Sequence[StateDict], config: EvaluateConfig, seed: int
) -> Mapping[str, Sequence[StateDict]]:
    """All baselines but noise and the average, by name; those of the control among them."""
    made = baselines_of_several(measure.originals, measure.runs.tolist(), config.num_baseline, seed)
    methods = [name for name in MERGES if _wanted(config, name)] if len(measure.originals) > 1 else []
    made |= merged_networks(measure.originals, measure.runs.tolist(), config.num_baseline, seed, methods)
    near = baselines_at_distance(measure, networks, config.num_baseline, seed)
    made |= near
    if config.control is not None:
        starts = {name: near[name] for name in START_NAMES if name in near}
        made |= finetuned_baselines(task, starts, config.control, seed)
    return {name: each for name, each in made.items() if _wanted(config, name)}


def summarize_originals(predictions: Tensor, labels: Tensor, seed: int) -> NetworkScores:
    """Scores of the originals, each beside the others: ``[K, images]``, ``[images]``."""
    return _summarized(accuracy(predictions, labels), max_similarity_among(predictions, labels), seed)


def score_networks(predictions: Tensor, originals: Tensor, labels: Tensor, seed: int) -> NetworkScores:
    """Scores of networks beside the originals: ``[num, images]``, ``[K, images]``, ``[images]``."""
    return _summarized(accuracy(predictions, labels), max_similarity(predictions, originals, labels), seed)


def _summarized(accuracies: Tensor, similarities: Tensor, seed: int) -> NetworkScores:
    return NetworkScores(
        count=len(accuracies),
        accuracy=summarize(accuracies, seed),
        similarity=summarize(similarities, seed),
        accuracies=tuple(accuracies.tolist()),
        similarities=tuple(similarities.tolist()),
    )
