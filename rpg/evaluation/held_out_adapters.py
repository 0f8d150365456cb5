"""Adapters for tasks nobody trained, beside everything that is trivial: several figures of each.

T tasks, C condition values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from rpg.evaluation.metrics import Summary, summarize
from rpg.section import Section
from rpg.tasks.class_splits import hamming_to_nearest
from rpg.tasks.side_by_side import Stacked

METRICS = ("symbol_accuracy", "exact_match", "perplexity")


class ScoringTask(Protocol):
    """What scores stacked adapters at their tasks."""

    def scores(self, weights: Stacked, conditions: Tensor, split: str) -> Mapping[str, Tensor]:
        """Figures by name, ``[T]`` each."""


class AdapterMethod(Section):
    """One method's figures over tasks, and each task's in the order of the tasks."""

    symbol_accuracy: Summary
    exact_match: Summary
    perplexity: Summary
    each: dict[str, tuple[float, ...]]


class AdapterSplit(Section):
    """All methods on the tasks of one split."""

    tasks: tuple[tuple[int, ...], ...]
    hamming_to_seen: tuple[int, ...]
    methods: dict[str, AdapterMethod]
    better_than: dict[str, float]


def score_adapter_split(
    task: ScoringTask, adapters: Mapping[str, Stacked], bits: Tensor, seen: Tensor, split: str, seed: int
) -> AdapterSplit:
    """Score every method on the tasks ``bits`` ``[T, C]``.

    ``better_than`` is the share of the tasks on which the generated adapter has the higher symbol accuracy.

    Args:
        task: scores.
        adapters: stacked weights by method; ``generated`` among them.
        bits: the tasks.
        seen: bits of the seen tasks, for the distance to the nearest.
        split: rows.
        seed: of the bootstrap.
    """
    scores = {name: task.scores(weights, bits, split) for name, weights in adapters.items()}
    generated = scores["generated"]["symbol_accuracy"]
    return AdapterSplit(
        tasks=tuple(tuple(row) for row in bits.tolist()),
        hamming_to_seen=tuple(hamming_to_nearest(bits, seen)[0].tolist()),
        methods={name: summarize_method(found, seed) for name, found in scores.items()},
        better_than={
            name: (generated > found["symbol_accuracy"]).double().mean().item()
            for name, found in scores.items()
            if name != "generated"
        },
    )


def summarize_method(scores: Mapping[str, Tensor], seed: int = 0) -> AdapterMethod:
    """Summaries of figures ``[T]`` by name."""
    summaries = {name: summarize(scores[name], seed) for name in METRICS}
    return AdapterMethod(**summaries, each={name: tuple(scores[name].tolist()) for name in METRICS})
