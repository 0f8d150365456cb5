"""Draws of a density over codes have the zoo's spread, and lie where its checkpoints do."""

import math

import pytest
import torch

from rpg.models.code_prior import CodeDensity, left_out_likelihood


def whitened(codes: torch.Tensor) -> torch.Tensor:
    codes = codes - codes.mean(0)
    return codes / codes.std(0, correction=0)


def test_two_runs_have_kernels_along_the_direction_that_parts_them():
    rng = torch.Generator().manual_seed(0)
    apart = torch.tensor([-1.0, 1.0]).repeat(10)[:, None] + 0.1 * torch.randn(20, 1, generator=rng)
    codes = whitened(torch.cat([apart, torch.randn(20, 2, generator=rng)], 1))
    density = CodeDensity.fit(codes, whitened=True)
    assert density.leading == 1 and density.bandwidth < 0.1
    places = (torch.arange(512) + 0.5) / 512
    drawn = density.draw(places, torch.randn(512, 3, generator=rng))
    assert drawn[:, 0].abs().min() > 0.6 and drawn[:, 0].abs().max() < 1.5  # none between the runs, none beyond
    torch.testing.assert_close(drawn.square().mean(0), torch.ones(3), atol=0.15, rtol=0)
    still = density.draw(places[:1], torch.zeros(1, 3))  # around the first checkpoint of the sorted ones, shrunk
    assert still[0, 0] == pytest.approx((1 - density.bandwidth**2) ** 0.5 * codes[:, 0].min().item())


def test_a_single_bell_is_as_likely_by_a_gaussian_and_keeps_its_spread():
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(400, 3, generator=rng) @ torch.tensor([[3.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0.1, 0]])
    density = CodeDensity.fit(table, whitened=False)
    assert density.leading == 0 or density.bandwidth > 0.3
    assert density.directions.shape == (3, 4)  # four values a state, which vary in three directions
    drawn = density.draw(torch.rand(20_000, generator=rng), torch.randn(20_000, 3, generator=rng))
    torch.testing.assert_close(drawn.T.cov(), table.T.cov(correction=0), atol=0.25, rtol=0.05)


def test_likelihood_of_two_codes():
    # each is judged by the other's kernel alone: N(±1; ∓0.8, 0.6²), without the constant
    expected = -(1.8**2) / (2 * 0.6**2) - math.log(0.6)
    products = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert left_out_likelihood(products, 1, 0.6) == pytest.approx(expected)
