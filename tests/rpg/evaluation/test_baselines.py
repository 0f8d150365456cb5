from __future__ import annotations

import pytest
import torch
from torch import nn

from rpg.evaluation import baselines
from rpg.evaluation.vectors import VectorSpace
from tokenization.errors import InputError


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_zoo(num: int = 6) -> list[dict[str, torch.Tensor]]:
    """Networks with convolution, batch norm (running statistics, integer counter), tied and frozen tensors."""
    torch.manual_seed(0)
    zoo = []
    frozen = torch.randn(4)
    for index in range(num):
        state = dict(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 5)).state_dict())
        state["1.running_var"] = 0.01 * torch.rand(3)
        state["1.num_batches_tracked"] = torch.tensor(100 + index)
        state["tied"] = state["2.weight"]
        state["frozen"] = frozen.clone()
        state["half"] = torch.randn(8).bfloat16()
        state["scalar"] = torch.tensor(1.0 + index)
        zoo.append(state)
    return zoo


EVERY_BASELINE = {
    "average": lambda zoo: [baselines.average(zoo)],
    "noise": lambda zoo: baselines.add_noise(zoo, 3, 0.1, draws()),
    "relative noise": lambda zoo: baselines.add_noise(zoo, 3, 0.1, draws(), relative=True),
    "average of k": lambda zoo: baselines.average_random(zoo, 3, draws(), k=2),
    "average of 1": lambda zoo: baselines.average_random(zoo, 3, draws(), k=1),
    "interpolation": lambda zoo: baselines.interpolate(zoo, 3, draws()),
    "coordinate gaussian": lambda zoo: baselines.coordinate_gaussian(zoo, 3, draws()),
    "covariance gaussian": lambda zoo: baselines.covariance_gaussian(zoo, 3, draws(), rank=2, shrinkage=0.1),
}


@pytest.mark.parametrize("name", EVERY_BASELINE)
def test_networks_keep_structure_constants_and_ties(name):
    zoo = make_zoo()
    for network in EVERY_BASELINE[name](zoo):
        assert list(network) == list(zoo[0])
        for key, tensor in network.items():
            assert (tensor.dtype, tensor.shape) == (zoo[0][key].dtype, zoo[0][key].shape)
        assert network["1.num_batches_tracked"] == 100
        assert torch.equal(network["frozen"], zoo[0]["frozen"])
        assert network["tied"] is network["2.weight"]
        assert network["1.running_var"].min() >= min(state["1.running_var"].min() for state in zoo)
        assert all(tensor.isfinite().all() for tensor in network.values())


@pytest.mark.parametrize("name", EVERY_BASELINE)
def test_networks_are_honest_copies(name):
    zoo = make_zoo()
    before = [{key: tensor.clone() for key, tensor in state.items()} for state in zoo]
    made = EVERY_BASELINE[name](zoo)
    for tensor in made[0].values():
        tensor.fill_(7)
    for state, copy in zip(zoo, before, strict=True):
        assert all(torch.equal(state[key], copy[key]) for key in copy)
    if len(made) > 1:
        assert not any(tensor.float().eq(7).all() for key, tensor in made[1].items())


@pytest.mark.parametrize("name", [name for name in EVERY_BASELINE if name != "average"])
def test_same_seed_same_networks_and_no_two_alike(name):
    zoo = make_zoo()
    first, second = EVERY_BASELINE[name](zoo), EVERY_BASELINE[name](zoo)
    assert len(first) == 3
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(first[0]["2.weight"], first[1]["2.weight"])


def vectors_of(networks: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([network["w"] for network in networks])


def plain_zoo(num: int, size: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    mixing = torch.randn(size, size, generator=draws(seed))
    return [{"w": row} for row in 3 + torch.randn(num, size, generator=draws(seed + 1)) @ mixing]


def test_average_by_hand():
    zoo = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}]
    assert baselines.average(zoo)["w"].tolist() == [2.0, 4.0]


def test_average_of_all_is_the_average_and_of_one_an_original():
    zoo = plain_zoo(5, 4)
    torch.testing.assert_close(baselines.average_random(zoo, 1, draws(), k=5)[0]["w"], baselines.average(zoo)["w"])
    (single,) = baselines.average_random(zoo, 1, draws(), k=1)
    assert any(torch.equal(single["w"], state["w"]) for state in zoo)


def test_noise_has_the_asked_strength():
    zoo = [{"w": torch.zeros(20_000), "v": 10 * torch.randn(20_000, generator=draws())}] * 2
    zoo[1] = {"w": torch.full((20_000,), 1e-9), "v": zoo[0]["v"] + 1e-6}
    noisy = baselines.add_noise(zoo, 2, 0.5, draws())
    assert noisy[0]["w"].std().item() == pytest.approx(0.5, rel=0.03)
    assert (noisy[0]["v"] - zoo[0]["v"]).std().item() == pytest.approx(0.5, rel=0.03)
    relative = baselines.add_noise(zoo, 2, 0.5, draws(), relative=True)
    assert (relative[0]["v"] - zoo[0]["v"]).std().item() == pytest.approx(5, rel=0.03)
    assert relative[0]["w"].std().item() < 1e-8


def test_noise_without_strength_gives_every_original_once():
    zoo = plain_zoo(4, 3)
    made = vectors_of(baselines.add_noise(zoo, 4, 0.0, draws()))
    assert torch.equal(made.unique(dim=0), vectors_of(zoo).unique(dim=0))
    assert len(baselines.add_noise(zoo, 9, 0.0, draws())) == 9


def test_interpolations_lie_between_two_originals():
    zoo = plain_zoo(3, 5)
    rows = vectors_of(zoo)
    for network in baselines.interpolate(zoo, 20, draws()):
        distance = torch.cdist(network["w"][None], rows)[0]
        lengths = torch.cdist(rows, rows)
        detours = [distance[a] + distance[b] - lengths[a, b] for a in range(3) for b in range(a)]
        assert min(detours) < 1e-4


def test_coordinate_gaussian_has_the_zoos_moments():
    zoo = plain_zoo(50, 6)
    made, rows = vectors_of(baselines.coordinate_gaussian(zoo, 20_000, draws())), vectors_of(zoo)
    torch.testing.assert_close(made.mean(0), rows.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(made.var(0), rows.var(0), rtol=0.05, atol=0)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_covariance_gaussian_has_the_zoos_shrunk_covariance(shrinkage):
    zoo = plain_zoo(50, 6)
    made, rows = vectors_of(baselines.covariance_gaussian(zoo, 40_000, draws(), shrinkage=shrinkage)), vectors_of(zoo)
    whole = rows.T.cov()
    expected = (1 - shrinkage) * whole + shrinkage * whole.diag().diag()
    torch.testing.assert_close(made.mean(0), rows.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(made.T.cov(), expected, rtol=0, atol=0.03 * whole.diag().max().item())


def test_low_rank_covariance_keeps_the_principal_directions():
    zoo = plain_zoo(30, 8)
    made, rows = vectors_of(baselines.covariance_gaussian(zoo, 40_000, draws(), rank=2)), vectors_of(zoo)
    values, directions = torch.linalg.eigh(rows.T.cov())
    expected = directions[:, -2:] @ values[-2:].diag() @ directions[:, -2:].T
    torch.testing.assert_close(made.T.cov(), expected, rtol=0, atol=0.03 * values[-1].item())


def test_covariance_gaussian_of_many_values_stays_in_the_span_of_the_zoo():
    zoo = plain_zoo(4, 300)
    rows = vectors_of(zoo)
    (network,) = baselines.covariance_gaussian(zoo, 1, draws())
    span = (rows - rows.mean(0)).T
    offset = (network["w"] - rows.mean(0))[:, None]
    assert (offset - span @ torch.linalg.lstsq(span.double(), offset.double()).solution.float()).norm() < 1e-2


def test_a_single_network_can_only_be_copied_or_noised():
    zoo = plain_zoo(1, 4)
    assert torch.equal(baselines.average(zoo)["w"], zoo[0]["w"])
    assert torch.equal(baselines.covariance_gaussian(zoo, 1, draws())[0]["w"], zoo[0]["w"])
    assert not torch.equal(baselines.add_noise(zoo, 1, 0.1, draws())[0]["w"], zoo[0]["w"])
    with pytest.raises(InputError, match="at least 2"):
        baselines.interpolate(zoo, 1, draws())


def test_impossible_requests_are_refused():
    zoo = plain_zoo(3, 4)
    with pytest.raises(InputError, match="k is 4; give 1 to 3"):
        baselines.average_random(zoo, 1, draws(), k=4)
    with pytest.raises(InputError, match="sigma is -1"):
        baselines.add_noise(zoo, 1, -1, draws())
    with pytest.raises(InputError, match="shrinkage is 2"):
        baselines.covariance_gaussian(zoo, 1, draws(), shrinkage=2)
    with pytest.raises(InputError, match="no networks"):
        VectorSpace([])


def test_flatten_and_unflatten_are_inverse():
    zoo = make_zoo()
    space = VectorSpace(zoo)
    again = space.unflatten(space.flatten(zoo[2:3]))[0]
    for slot in space.slots:
        assert torch.equal(again[slot.name], zoo[2][slot.name])
    assert {slot.name for slot in space.slots}.isdisjoint({"1.num_batches_tracked", "tied", "frozen"})
