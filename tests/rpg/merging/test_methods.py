"""The merge methods against closed forms, and against mergekit where it is installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rpg.merging.methods import COMBINATIONS, DENSITY, METHODS, combination, merge_values, stock_ratio


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EQUAL = torch.tensor([0.5, 0.5])


def slerp(first: Tensor, second: Tensor, place: float) -> Tensor:
    return merge_values("slerp", torch.stack([first, second]), None, torch.tensor([1 - place, place]))


def test_linear_slerp_and_stock_are_their_closed_forms() -> None:
    values, base = torch.randn(3, 7, generator=rng()), torch.randn(7, generator=rng(1))
    weights = torch.tensor([0.5, 0.3, 0.2])
    torch.testing.assert_close(merge_values("linear", values, base, 3 * weights), weights @ values)
    torch.testing.assert_close(merge_values("linear", values, base, 3 * weights, normalize=False), 3 * weights @ values)
    across = slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 1 / 3)
    torch.testing.assert_close(across, 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    torch.testing.assert_close(slerp(values[0], 3 * values[0], 0.25), 1.5 * values[0])
    assert torch.equal(slerp(torch.zeros(3), torch.ones(3), 0.5), torch.full((3,), 0.5))
    assert torch.equal(slerp(values[0], values[1], 0), values[0])
    torch.testing.assert_close(slerp(values[0], values[1], 1), values[1])
    both = merge_values("slerp", values, base, weights)
    torch.testing.assert_close(both, slerp(values[0], values[1], 0.375))  # the two that weigh most
    assert stock_ratio(torch.eye(3)) == 0  # at right angles: nothing is common
    torch.testing.assert_close(stock_ratio(torch.full((3, 3), 4.0)), torch.tensor(1.0))
    corner = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])  # 60 degrees: 2 · ½ / (1 + ½)
    torch.testing.assert_close(stock_ratio(corner @ corner.T), torch.tensor(2 / 3))
    stock = merge_values("model_stock", corner + 1, torch.ones(2), EQUAL)
    torch.testing.assert_close(stock, 1 + corner.mean(0) * 2 / 3)
    apart = torch.tensor([[1.0, 0.0], [-0.9, 0.1], [-0.1, -0.2]])  # cosines around -1/3, near the closed form's pole
    assert stock_ratio(apart @ apart.T) == 0 and stock_ratio(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) == 0
    assert torch.equal(merge_values("model_stock", apart + 1, torch.ones(2), torch.full((3,), 1 / 3)), torch.ones(2))


@pytest.mark.parametrize("method", COMBINATIONS)
def test_combinations_are_weighted_sums(method: str) -> None:
    values, weights = torch.randn(2, 9, generator=rng()).double(), torch.tensor([0.25, 0.75]).double()
    shares = combination(method, values @ values.T, weights)
    torch.testing.assert_close(merge_values(method, values, None, weights), shares @ values)


def test_ties_keeps_the_largest_and_the_sign_of_most() -> None:
    deltas = torch.tensor([[5.0, 0.1, -4.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0.1, 9.0, 2.0] + 7 * [0.1]])
    assert DENSITY["ties"] == 0.2  # two of ten
    merged = merge_values("ties", deltas + 1, torch.ones(10), EQUAL)
    torch.testing.assert_close(merged - 1, torch.tensor([5.0, 9.0, -4.0] + 7 * [0.0]))
    summed = merge_values("ties", deltas + 1, torch.ones(10), torch.tensor([2.0, 1.0]), normalize=False)
    torch.testing.assert_close(summed - 1, torch.tensor([10.0, 9.0, -8.0] + 7 * [0.0]))
    one = merge_values("ties", deltas + 1, torch.ones(10), EQUAL, density=0.1)
    torch.testing.assert_close(one - 1, torch.tensor([5.0, 9.0] + 8 * [0.0]))


@pytest.mark.parametrize("method", METHODS)
def test_equal_networks_merge_to_themselves(method: str) -> None:
    value = torch.randn(40, generator=rng())
    merged = merge_values(method, value.repeat(3, 1), value, torch.full((3,), 1 / 3), rng())
    torch.testing.assert_close(merged, value)


def test_dare_is_right_on_average() -> None:
    values, base = torch.randn(2, 5, generator=rng()), torch.randn(5, generator=rng(1))
    draws = rng(2)
    made = torch.stack([merge_values("dare_linear", values, base, EQUAL, draws) for _ in range(4000)])
    torch.testing.assert_close(made.mean(0), values.mean(0), atol=0.1, rtol=0)
    one = merge_values("dare_ties", values.abs(), torch.zeros(5), EQUAL, rng(3))
    kept = [{0.0, *(round(float(v) / 0.5, 4) for v in column)} for column in values.abs().T]
    both = [round(sum(column.tolist()), 4) for column in values.abs().T]  # the mean of two that were doubled
    assert all(round(float(v), 4) in {*few, pair} for v, few, pair in zip(one, kept, both, strict=True))
    whole = merge_values("dare_linear", values, base, torch.ones(2), rng(), density=1.0, normalize=False)
    torch.testing.assert_close(whole, values.sum(0) - base)  # task arithmetic


def test_as_mergekit() -> None:
    magnitude = pytest.importorskip("mergekit.sparsify").magnitude
    get_mask = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic").get_mask
    theirs = pytest.importorskip("mergekit.merge_methods.slerp").slerp
    values, base = torch.randn(4, 50, generator=rng()), torch.randn(50, generator=rng(1))
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    weighted = torch.stack([magnitude(each - base, DENSITY["ties"]) for each in values]) * weights[:, None]
    mask = get_mask(weighted, "sum")
    below = (weights[:, None] * mask).sum(0)
    expected = base + (weighted * mask).sum(0) / torch.where(below == 0, 1.0, below)
    torch.testing.assert_close(merge_values("ties", values, base, weights), expected)
    torch.testing.assert_close(slerp(values[0], values[1], 0.3), theirs(torch.tensor([0.3]), *values[:2, None])[0])
