from __future__ import annotations

import pytest
import torch

from rpg.merging.methods import MERGES, NUM_MERGED, NetworkMerges, chosen_of, draw_shares
from tests.rpg.evaluation.test_combinations import make_networks
from tokenization.zoo.zoo import Zoo


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
