from __future__ import annotations

import torch

from rpg.evaluation import two_sample
from rpg.evaluation.two_sample import distances


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
    monkeypatch.setattr(two_sample, "LARGE", 1000)
    monkeypatch.setattr(two_sample, "CHUNK", 700)
    found = distances(others, zoo)
    torch.testing.assert_close(found, expected)
    assert found[0, 0] == found[1, 1] == 0
