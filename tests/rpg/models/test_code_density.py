"""Draws of a density over codes have the zoo's spread, and lie where its checkpoints do."""

import math

import pytest
import torch

from rpg.models.states import DRAWN_IN, CodeDensity, Neighbourhoods, left_out_likelihood


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


def test_neighbourhoods_follow_a_bent_class_where_its_gaussian_does_not():
    rng = torch.Generator().manual_seed(0)
    angles = 2 * math.pi * torch.rand(400, generator=rng)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    classes = torch.arange(400) % 2
    codes = circle + 10.0 * classes[:, None]  # two circles of one radius
    density = Neighbourhoods(codes, classes, 20)
    wanted = torch.ones(2000, dtype=torch.long)
    drawn = density.draw(wanted, torch.rand(2000, generator=rng), torch.randn(2000, 20, generator=rng)) - 10
    assert (drawn.norm(dim=1) - 1).abs().mean() < 0.1  # by the class's Gaussian 0.4
    torch.testing.assert_close(drawn.T.cov(), 0.5 * torch.eye(2), atol=0.05, rtol=0)  # as wide as the class
    nearest = torch.cdist(drawn, codes[classes == 1] - 10).amin(1)
    assert nearest.median() > 0.01  # no copies: a neighbour lies 0.03 away


def test_a_draw_without_noise_lies_between_a_code_and_its_neighbours():
    codes, classes = torch.tensor([[0.0], [2.0], [100.0], [1.0]]), torch.tensor([0, 0, 0, 1])
    drawn = Neighbourhoods(codes, classes, 2).draw(
        torch.zeros(2, dtype=torch.long), torch.tensor([0.0, 0.5]), torch.zeros(2, 2)
    )
    expected = 1 + (1 - DRAWN_IN**2) ** 0.5 * torch.tensor([[-1.0], [1.0]])  # the mean of 0 and 2, and on from there
    torch.testing.assert_close(drawn, expected)
