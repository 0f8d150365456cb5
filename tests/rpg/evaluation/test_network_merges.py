from __future__ import annotations

import math

import pytest
import torch

from rpg.evaluation.network_merges import (
    DENSITY,
    MERGES,
    NUM_MERGED,
    NetworkMerges,
    chosen_of,
    draw_shares,
    merge_values,
    slerp,
    stock_ratio,
)
from tests.rpg.evaluation.test_combinations import make_networks
from tokenization.zoo.zoo import Zoo


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EQUAL = torch.tensor([0.5, 0.5])


def test_linear_slerp_and_stock_are_their_closed_forms() -> None:
    values, base = torch.randn(3, 7, generator=rng()), torch.randn(7, generator=rng(1))
    weights = torch.tensor([0.5, 0.3, 0.2])
    torch.testing.assert_close(merge_values("merge_linear", values, base, weights, rng()), weights @ values)
    across = slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 1 / 3)
    torch.testing.assert_close(across, 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    torch.testing.assert_close(slerp(values[0], 3 * values[0], 0.25), 1.5 * values[0])
    assert torch.equal(slerp(torch.zeros(3), torch.ones(3), 0.5), torch.full((3,), 0.5))
    both = merge_values("merge_slerp", values, base, weights, rng())
    torch.testing.assert_close(both, slerp(values[0], values[1], 0.375))  # the two that weigh most
    assert stock_ratio(torch.eye(3)) == 0  # at right angles: nothing is common
    torch.testing.assert_close(stock_ratio(values[:1].repeat(3, 1)), torch.tensor(1.0))
    corner = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])  # 60 degrees: 2 · ½ / (1 + ½)
    torch.testing.assert_close(stock_ratio(corner), torch.tensor(2 / 3))
    apart = torch.tensor(
        [[1.0, 0.0], [-0.9, 0.1], [-0.1, -0.2]]
    )  # cosines around -1/3: the closed form has a pole near
    assert stock_ratio(apart) == 0 and stock_ratio(-values[:1] * torch.tensor([[1.0], [-1.0]])) == 0
    assert torch.equal(merge_values("merge_model_stock", apart + 1, torch.ones(2), torch.full((3,), 1 / 3), rng()),
                       torch.ones(2))  # fmt: skip
    stock = merge_values("merge_model_stock", corner + 1, torch.ones(2), EQUAL, rng())
    torch.testing.assert_close(stock, 1 + corner.mean(0) * 2 / 3)


def test_ties_keeps_the_largest_and_the_sign_of_most() -> None:
    deltas = torch.tensor([[5.0, 0.1, -4.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0.1, 9.0, 2.0] + 7 * [0.1]])
    assert DENSITY["ties"] == 0.2  # two of ten
    merged = merge_values("merge_ties", deltas + 1, torch.ones(10), EQUAL, rng())
    torch.testing.assert_close(merged - 1, torch.tensor([5.0, 9.0, -4.0] + 7 * [0.0]))


@pytest.mark.parametrize("method", MERGES)
def test_equal_networks_merge_to_themselves(method: str) -> None:
    value = torch.randn(40, generator=rng())
    merged = merge_values(method, value.repeat(3, 1), value, torch.full((3,), 1 / 3), rng())
    torch.testing.assert_close(merged, value)


def test_dare_is_right_on_average() -> None:
    values, base = torch.randn(2, 5, generator=rng()), torch.randn(5, generator=rng(1))
    draws = rng(2)
    made = torch.stack([merge_values("merge_dare_linear", values, base, EQUAL, draws) for _ in range(4000)])
    torch.testing.assert_close(made.mean(0), values.mean(0), atol=0.1, rtol=0)
    one = merge_values("merge_dare_ties", values.abs(), torch.zeros(5), EQUAL, rng(3))
    kept = [{0.0, *(round(float(v) / 0.5, 4) for v in column)} for column in values.abs().T]
    both = [round(sum(column.tolist()), 4) for column in values.abs().T]  # the mean of two that were doubled
    assert all(round(float(v), 4) in {*few, pair} for v, few, pair in zip(one, kept, both, strict=True))


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
    torch.testing.assert_close(merge_values("merge_ties", values, base, weights, rng()), expected)
    torch.testing.assert_close(slerp(values[0], values[1], 0.3), theirs(torch.tensor([0.3]), *values[:2, None])[0])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    made = Zoo.create(tmp_path_factory.mktemp("merges") / "zoo")
    for number, network in enumerate(make_networks(8)):
        made.append(network, run=number // 4, step=number % 4)
    return made


@pytest.mark.parametrize("method", MERGES)
def test_merges_keep_structure_and_repeat(zoo: Zoo, method: str) -> None:
    originals, runs = [zoo.state_dict(0)], [entry.run for entry in zoo.entries]
    merges = NetworkMerges([zoo.checkpoint(index) for index in range(8)], runs)
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1, 0, 0, 0, -0.1])
    made = merges.merge(method, shares, 5)
    again = merges.merge(method, shares, 5)
    assert list(made) == list(originals[0]) and made["tied"] is made["2.weight"]
    for name, like in originals[0].items():
        assert (made[name].dtype, made[name].shape) == (like.dtype, like.shape) and made[name].isfinite().all()
        assert torch.equal(made[name], again[name])
    assert made["1.num_batches_tracked"] == 100 and made["1.running_var"].min() > 0


def test_drawn_networks_are_of_one_run_and_a_base_is_heeded(zoo: Zoo) -> None:
    shares = draw_shares([0, 0, 0, 0, 0, 1, 1, 2], 20, rng())
    assert {tuple(sorted(set((row > 0).nonzero().flatten().tolist()) & {5, 6})) for row in shares} == {(), (5, 6)}
    assert all(row[7] == 0 for row in shares) and torch.allclose(shares.sum(1), torch.ones(20).double())
    assert (draw_shares(range(6), 1, rng()) > 0).sum() == NUM_MERGED  # each alone in its run
    assert len(chosen_of(torch.tensor([-1.0, -2.0]))[0]) == 2  # nothing is near: all alike
    merges = NetworkMerges([zoo.checkpoint(index) for index in range(3)])
    zeros = {name: torch.zeros_like(value) for name, value in zoo.state_dict(0).items()}
    plain, based = (merges.merge("merge_model_stock", torch.ones(3) / 3, 0, base) for base in (None, zeros))
    assert not torch.allclose(plain["2.weight"], based["2.weight"])
    assert NetworkMerges([zoo.checkpoint(0)]).methods == () and merges.methods == MERGES


def test_a_merge_lets_go_of_what_it_read_alone(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    released = []
    checkpoints = [zoo.checkpoint(index) for index in range(8)]
    for index, checkpoint in enumerate(checkpoints):
        monkeypatch.setattr(checkpoint, "release", lambda name, index=index: released.append(index))
    shares, base = torch.tensor([0, 0, 0.5, 0, 0, 0.5, 0, 0]), zoo.state_dict(0)
    NetworkMerges(checkpoints).merge("merge_ties", shares, 0, base)
    assert set(released) == {0, 2, 5}  # the first gives names and what is no number
    released.clear()
    NetworkMerges(checkpoints, [0] * 4 + [1] * 4).merge("merge_ties", shares)
    assert set(released) == {0, 1, 2, 3, 5}  # and the run of the first, for its mean
