from __future__ import annotations

import pytest
import torch

from rpg.evaluation.novelty import distances
from rpg.evaluation.two_sample import (
    coverage,
    measure_two_sample,
    minimum_matching_distance,
    nearest_neighbour_accuracy,
    trivial_samples,
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
    assert result.num == 5 and list(result.sets) == ["originals", "generated", "copies", "average"]
    assert result.sets["copies"].nearest_training == 0 == result.sets["originals"].nearest_training
    by_hand = torch.cdist(held_out.flatten(1), originals.flatten(1)).amin(1).median() / 6**0.5
    assert result.held_out_nearest_training == pytest.approx(by_hand.item(), rel=1e-5)
    assert result.sets["average"].coverage == pytest.approx(1 / 5)  # one and the same network reaches one original
    assert result.sets["average"].nearest_neighbour_accuracy >= 0.5  # copies of one another are their own neighbours
    assert two_sample(made, originals, held_out[:1]) is None


def network(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value, 2 * value, -value])}


def test_baselines_are_of_the_condition():
    originals = [network(float(value)) for value in (1, 2, 3, 100, 101)]
    conditions = ["small"] * 3 + ["large"] * 2
    made = trivial_samples(originals, conditions, ["small", "large", "small", "small", "unknown"], seed=0)
    assert all(len(networks) == 5 for networks in made.values())
    for networks in made.values():
        assert networks[1]["w"][0] > 50 and all(abs(networks[i]["w"][0]) < 20 for i in (0, 2, 3))
    assert sorted(made["originals"][i]["w"][0].item() for i in (0, 2, 3)) == [1, 2, 3]  # without repetition
    assert torch.allclose(made["average"][0]["w"], network(2.0)["w"])
    assert made["midpoint"][1]["w"][0] == 100.5
    assert torch.allclose(made["average"][4]["w"], network(41.4)["w"])  # of a condition that nobody has: of all


class LinearTask:
    """Two classes, whose logits are the first two values of a network."""

    def logits(self, state_dicts, split):
        return (each["w"][None, :2].expand(4, -1) for each in state_dicts)


def test_networks_drawn_like_the_held_out_ones_pass_and_one_network_does_not():
    stream = torch.Generator().manual_seed(0)
    originals, held_out, alike = ([{"w": torch.randn(3, generator=stream)} for _ in range(40)] for _ in range(3))
    result = measure_two_sample(LinearTask(), originals, alike, held_out, "test", 0)
    assert 0.3 < result.sets["generated"].nearest_neighbour_accuracy < 0.7
    assert result.sets["average"].nearest_neighbour_accuracy > 0.7
    assert result.sets["originals"].nearest_training == 0 < result.sets["generated"].nearest_training
    assert measure_two_sample(LinearTask(), originals, alike, [], "test", 0) is None
    assert measure_two_sample(object(), originals, alike, held_out, "test", 0) is None
