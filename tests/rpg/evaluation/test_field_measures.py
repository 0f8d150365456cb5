"""Measures of generated fields, against closed forms and their meaning at the ends."""

from __future__ import annotations

import pytest
import torch

from rpg.evaluation.field_measures import (
    frechet_distance,
    measure_samples,
    overlap_distances,
)
from rpg.labs.fields.experiment import trivial_weights


def draws(num: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_frechet_distance_of_diagonal_normals():
    first = draws(200, 0)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, first + 2) == pytest.approx(16)
    assert frechet_distance(first, 3 * first) == pytest.approx(  # |(1 - 3) mean|² + (1 - 3)² tr Σ
        4 * float(first.mean(0).square().sum()) + 4 * float(first.T.cov().trace()), rel=1e-5
    )


def test_more_of_the_same_cannot_be_told_apart_and_copies_are_seen():
    training, held_out = draws(150, 1), draws(150, 2)
    same = measure_samples([draws(150, 3), draws(150, 4)], held_out, training, lambda x: x)
    assert same["one_nna"] == pytest.approx(0.5, abs=0.06)
    assert same["precision"] > 0.6 and same["recall"] > 0.6 and same["nearest"] > 0.3
    assert measure_samples([training], held_out, training, lambda x: x)["nearest"] == 0
    far = measure_samples([draws(150, 3, 20.0)], held_out, training, lambda x: x)
    assert far["one_nna"] == 1 and far["precision"] == far["recall"] == 0 and far["frechet"] > 1000


def test_trivial_weights_are_of_the_wanted_class():
    weights, labels = torch.cat([draws(60, 0, -9), draws(60, 1, 9)]), torch.arange(120) // 60
    wanted = torch.tensor([1, 0, 1])
    made = trivial_weights(weights, labels, wanted, torch.Generator().manual_seed(0))
    assert set(made) == {
        "average",
        "midpoint",
        "coordinate_gaussian",
        "covariance_gaussian",
        "mixture",
        "neighbourhood",
    }
    for rows in made.values():
        assert ((rows.mean(1) > 0).long() == wanted).all()
    assert torch.allclose(made["average"][1], weights[:60].mean(0))


def test_a_mixture_keeps_to_the_clusters_of_a_class():
    # Eight clusters, far apart and narrow, on a line: a Gaussian falls between them, the mixture never does.
    centres = 100.0 * torch.arange(8).repeat_interleave(20)
    weights = centres[:, None] + torch.randn(160, 3, generator=torch.Generator().manual_seed(0))
    labels, wanted = torch.zeros(160), torch.zeros(200)
    made = trivial_weights(weights, labels, wanted, torch.Generator().manual_seed(0))

    def off(name: str) -> torch.Tensor:
        return (made[name].mean(1) / 100 - (made[name].mean(1) / 100).round()).abs()

    assert off("mixture").max() < 0.05 and len((made["mixture"].mean(1) / 100).round().unique()) == 8
    assert off("covariance_gaussian").max() > 0.3


def test_overlaps_of_solid_shapes():
    shapes = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).float()
    expected = torch.tensor([[0, 2 / 3, 1, 1], [2 / 3, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]])
    assert torch.allclose(overlap_distances(shapes, shapes), expected)
    found = measure_samples([shapes], shapes, shapes, None, overlap_distances)
    assert found["nearest"] == 0 and "frechet" not in found
