from __future__ import annotations

import pytest
import torch

from rpg.evaluation.two_sample import (
    coverage,
    distances,
    minimum_matching_distance,
    nearest_neighbour_accuracy,
    two_sample,
)


def draws(num: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(num, 5, generator=torch.Generator().manual_seed(seed)) + shift


def accuracy_of(first: torch.Tensor, second: torch.Tensor) -> float:
    return nearest_neighbour_accuracy(distances(first, first), distances(second, second), distances(first, second))


def slow_accuracy(first: torch.Tensor, second: torch.Tensor) -> float:
    """Every network, beside every set of the other kind with one left out."""
    hits = []
    for own, other in ((first, second), (second, first)):
        for i, point in enumerate(own):
            near = min(float((point - each).norm()) for j, each in enumerate(own) if j != i)
            for left_out in range(len(other)):
                far = min(float((point - each).norm()) for j, each in enumerate(other) if j != left_out)
                hits.append(1.0 if near < far else 0.5 if near == far else 0.0)
    return sum(hits) / len(hits)


@pytest.mark.parametrize("num", [2, 3, 7])
def test_accuracy_is_that_of_counting(num):
    first, second = draws(num, 0), draws(num, 1, 0.5)
    assert accuracy_of(first, second) == pytest.approx(slow_accuracy(first, second))


@pytest.mark.parametrize("num", [2, 4, 30])
def test_two_samples_of_one_kind_have_one_half_however_small_they_are(num):
    repeats = 6000 // num**2 + 20
    found = [accuracy_of(draws(num, 2 * seed), draws(num, 2 * seed + 1)) for seed in range(repeats)]
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.03)


def test_two_kinds_apart_are_told_apart_and_copies_are_nearer_than_chance():
    first = draws(10, 0)
    assert accuracy_of(first, draws(10, 1, 100.0)) == 1.0
    assert accuracy_of(first, first.clone()) < 0.2


def test_coverage_and_matching_distance_by_hand():
    between = torch.tensor([[1.0, 5.0, 9.0], [2.0, 4.0, 9.0], [3.0, 9.0, 8.0]])  # all made are nearest to the first
    assert coverage(between) == pytest.approx(1 / 3)
    assert minimum_matching_distance(between) == pytest.approx((1 + 4 + 8) / 3)


def probabilities(num: int, seed: int) -> torch.Tensor:
    return torch.randn(num, 6, 3, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_kinds_are_brought_to_one_number():
    originals, held_out = probabilities(9, 0), probabilities(5, 1)
    made = {"generated": probabilities(6, 2), "copies": originals, "average": probabilities(1, 3)}
    result = two_sample(made, originals, held_out)
    assert list(result) == ["original", "generated", "copies", "average", "held_out"]
    assert result["copies"]["nearest_training"] == 0 == result["original"]["nearest_training"]
    by_hand = torch.cdist(held_out.flatten(1), originals.flatten(1)).amin(1).median() / 6**0.5
    assert result["held_out"]["nearest_training"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert result["average"]["coverage"] == pytest.approx(1 / 5)  # one and the same network reaches one original
    assert result["average"]["one_nna"] >= 0.5  # copies of one another are their own neighbours
    assert two_sample(made, originals, held_out[:1]) is None
