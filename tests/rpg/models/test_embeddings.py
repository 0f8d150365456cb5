from __future__ import annotations

import math

import pytest
import torch

from rpg.models.conditioning import sinusoid_1d, sinusoid_2d


def test_origin_is_zero_sines_and_unit_cosines():
    assert sinusoid_1d(torch.zeros(1), 6).tolist() == [[0, 0, 0, 1, 1, 1]]


def test_equals_the_formula_at_large_indices():
    index, width = 1_500_000, 8
    expected = [f(index * 10_000 ** (-i / 4)) for f in (math.sin, math.cos) for i in range(4)]
    torch.testing.assert_close(sinusoid_1d(torch.tensor([index]), width)[0], torch.tensor(expected), rtol=0, atol=1e-6)


def test_products_depend_on_the_distance_alone():
    table = sinusoid_1d(torch.arange(50), 32).double()
    products = table @ table.T
    for distance in range(50):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 7])
def test_odd_width_leaves_the_last_cosine_out(width: int):
    index = torch.arange(9)
    assert torch.equal(sinusoid_1d(index, width), sinusoid_1d(index, width + 1)[:, :width])


@pytest.mark.parametrize("width", [2, 5, 16])
def test_two_axes_lie_side_by_side(width: int):
    positions = torch.tensor([[0, 3], [7, 0], [2, 2]])
    table = sinusoid_2d(positions, width)
    assert table.shape == (3, width) and table.dtype == torch.float32
    assert torch.equal(table[:, : width // 2], sinusoid_1d(positions[:, 0], width // 2))
    assert torch.equal(table[:, width // 2 :], sinusoid_1d(positions[:, 1], width - width // 2))


def test_positions_of_a_large_network_stay_apart():
    layers, tokens = torch.arange(400), torch.arange(600)
    for index in (layers, tokens):
        distances = torch.pdist(sinusoid_1d(index, 64))
        assert distances.min() > 0.1


@pytest.mark.parametrize(
    "call",
    [
        lambda: sinusoid_1d(torch.arange(3), 0),
        lambda: sinusoid_1d(torch.zeros(3, 2), 4),
        lambda: sinusoid_2d(torch.zeros(3, 2), 1),
        lambda: sinusoid_2d(torch.zeros(3, 3), 4),
    ],
)
def test_refuses_impossible_shapes(call):
    with pytest.raises(ValueError, match="must be at least"):
        call()
