from __future__ import annotations

import pytest
import torch

from rpg.evaluation import novelty
from rpg.evaluation.novelty import (
    disagreement,
    distances,
    gram,
    measure_spread,
    nearest,
    nearest_within,
    weight_vectors,
)


def random_networks(num: int, seed: int, scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"w": scale * torch.randn(6, 5, generator=generator), "count": torch.tensor(3)} for _ in range(num)]


def answers(num: int, seed: int) -> torch.Tensor:
    return torch.randint(10, (num, 40), generator=torch.Generator().manual_seed(seed))


def test_planted_copies_have_distance_zero_and_are_found():
    zoo = random_networks(5, 0)
    planted = [{name: tensor.clone() for name, tensor in zoo[index].items()} for index in (3, 1)]
    vectors, candidates = weight_vectors(zoo, [*planted, *random_networks(1, 9)])
    distance, index = nearest(candidates, vectors)
    assert distance[:2].tolist() == [0.0, 0.0] and index[:2].tolist() == [3, 1]
    assert distance[2] > 1


def test_small_distances_between_large_vectors_are_exact():
    zoo = 100 + torch.zeros(30, 2000)
    others = zoo.clone()
    others[:, 0] += 1e-3
    torch.testing.assert_close(distances(others, zoo), torch.full((30, 30), 1e-3), rtol=0.01, atol=0)


def test_distances_of_large_networks_are_those_of_small_ones(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    zoo = 100 + torch.randn(7, 5000, generator=rng)
    others = torch.cat([zoo[:2], zoo[:3] + 1e-3 * torch.randn(3, 5000, generator=rng)])
    expected = distances(others, zoo)
    monkeypatch.setattr(novelty, "LARGE", 1000)
    monkeypatch.setattr(novelty, "CHUNK", 700)
    found = distances(others, zoo)
    torch.testing.assert_close(found, expected)
    assert found[0, 0] == found[1, 1] == 0
    torch.testing.assert_close(gram(zoo), zoo.double() @ zoo.double().T)


def test_nearest_neighbours_by_hand():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])
    assert nearest_within(vectors).tolist() == [5.0, 1.0, 1.0]
    assert nearest_within(vectors[:1]).tolist() == [float("inf")]
    distance, index = nearest(torch.tensor([[3.0, 7.0]]), vectors)
    assert (distance.tolist(), index.tolist()) == ([2.0], [2])


def test_normalised_distances_weigh_layers_alike():
    generator = torch.Generator().manual_seed(0)
    zoo = [
        {"small": 0.01 * torch.randn(50, generator=generator), "large": 100 * torch.randn(50, generator=generator)}
        for _ in range(4)
    ]
    vectors, _ = weight_vectors(zoo, zoo)
    assert vectors[:, :50].std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert vectors[:, 50:].std(correction=0).item() == pytest.approx(1, rel=1e-5)
    raw, _ = weight_vectors(zoo, zoo, normalize=False)
    assert torch.equal(raw[0], torch.cat([zoo[0]["small"], zoo[0]["large"]]))


def test_disagreement_by_hand():
    first, second = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2], [1, 2, 3, 0]])
    assert disagreement(first, second).tolist() == [[0.0, 0.5, 1.0]]
    assert disagreement(first[:0], second).shape == (0, 3)


def spread_of(zoo, generated, zoo_seed: int = 1, seed: int = 2):
    return measure_spread(*weight_vectors(zoo, generated), answers(len(zoo), zoo_seed), answers(len(generated), seed))


def test_copies_are_called_memorised():
    zoo = random_networks(8, 0)
    spread = measure_spread(*weight_vectors(zoo, zoo), answers(8, 1), answers(8, 1))
    assert spread is not None
    assert spread.mean_squared_deviation_ratio == pytest.approx(1)
    assert (spread.nearest_distance_ratio, spread.diversity_ratio, spread.disagreement) == (0, 1, 0)


def test_the_average_is_called_collapsed():
    zoo = random_networks(8, 0)
    average = {"w": torch.stack([state["w"] for state in zoo]).mean(0), "count": torch.tensor(3)}
    spread = spread_of(zoo, [average, dict(average)])
    assert spread is not None
    assert spread.mean_squared_deviation_ratio == pytest.approx(0, abs=1e-10)
    assert spread.diversity_ratio == 0 and spread.nearest_distance_ratio > 0.3


def test_fresh_draws_of_the_same_distribution_are_called_new():
    spread = spread_of(random_networks(60, 0), random_networks(60, 5))
    assert spread is not None
    assert spread.mean_squared_deviation_ratio == pytest.approx(1, abs=0.15)
    assert spread.nearest_distance_ratio == pytest.approx(1, abs=0.1)
    assert spread.diversity_ratio == pytest.approx(1, abs=0.1)
    assert spread.disagreement == pytest.approx(0.9, abs=0.03)


def test_deviation_ratio_is_a_ratio_of_squares():
    zoo = random_networks(200, 0)
    spread = spread_of(zoo, random_networks(200, 6, scale=2))
    assert spread is not None and spread.mean_squared_deviation_ratio == pytest.approx(4, rel=0.1)


def test_without_a_spread_there_is_nothing_to_compare():
    zoo = random_networks(1, 0)
    assert spread_of(zoo, random_networks(2, 1)) is None
    assert spread_of([zoo[0], dict(zoo[0])], random_networks(2, 1)) is None


def test_broken_and_single_networks_have_no_ratio():
    zoo = random_networks(4, 0)
    broken = {"w": torch.full((6, 5), float("nan")), "count": torch.tensor(3)}
    spread = spread_of(zoo, [broken])
    assert spread is not None
    assert (spread.mean_squared_deviation_ratio, spread.nearest_distance_ratio, spread.diversity_ratio) == (None,) * 3
