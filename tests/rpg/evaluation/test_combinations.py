"""Baselines as weighted sums of checkpoints and noise, against what they are by definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rpg.config import EvaluateConfig
from rpg.evaluation.combinations import AFFORDABLE, NAMES, Combination, combinations, combine, make_baselines
from rpg.evaluation.report import AT_DISTANCE
from rpg.evaluation.span import ZooSpan
from tests.rpg.evaluation.test_span import slow_vectors, span_of
from tokenization.zoo.zoo import Zoo


def make_networks(num: int = 6) -> list[dict[str, torch.Tensor]]:
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
        zoo.append(state)
    return zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Six checkpoints of two runs."""
    made = Zoo.create(tmp_path_factory.mktemp("combinations") / "zoo")
    for number, network in enumerate(make_networks()):
        made.append(network, run=number // 3, step=number % 3)
    return made


@pytest.fixture(scope="module")
def span(zoo: Zoo) -> ZooSpan:
    names = [name for name, tensor in zoo.state_dict(0).items() if tensor.is_floating_point() and name != "tied"]
    return ZooSpan([zoo.checkpoint(i) for i in range(6)], names, [entry.run for entry in zoo.entries])


@pytest.fixture(scope="module", params=["held", "streamed"])
def either(request: pytest.FixtureRequest, span: ZooSpan) -> ZooSpan:
    """The same zoo in memory and from its files."""
    if request.param == "held":
        return span
    streamed = ZooSpan.__new__(ZooSpan)
    streamed.__dict__.update({**vars(span), "held": {}})
    return streamed


@pytest.mark.parametrize("name", NAMES)
def test_networks_keep_structure_constants_and_ties_and_share_no_memory(zoo: Zoo, either: ZooSpan, name: str) -> None:
    originals = [zoo.state_dict(i) for i in range(6)]
    made = [combine(either, each) for each in combinations(either, name, 2, 0, 30.0, sigma=0.1)]
    again = [combine(either, each) for each in combinations(either, name, 2, 0, 30.0, sigma=0.1)]
    assert len(made) == 2
    for network, other in zip(made, again, strict=True):
        assert list(network) == list(originals[0])
        for key, tensor in network.items():
            assert (tensor.dtype, tensor.shape) == (originals[0][key].dtype, originals[0][key].shape)
            assert tensor.isfinite().all() and torch.equal(tensor, other[key])
        assert network["1.num_batches_tracked"] == 100 and network["tied"] is network["2.weight"]
        assert torch.equal(network["frozen"], originals[0]["frozen"])
        assert network["1.running_var"].min() >= min(state["1.running_var"].min() for state in originals)
    made[0]["2.weight"].fill_(7)
    assert not made[1]["2.weight"].eq(7).any() and not zoo.state_dict(0)["2.weight"].eq(7).any()


def test_a_combination_is_the_sum_that_it_says(zoo: Zoo, either: ZooSpan) -> None:
    weights = torch.tensor([0.5, -0.2, 0.0, 0.7, 0.1, 0.3], dtype=torch.float64)
    made = combine(either, Combination(weights))
    originals = [zoo.state_dict(index) for index in range(6)]
    for name in ("0.weight", "2.weight", "2.bias"):
        stacked = torch.stack([each[name] for each in originals]).double()
        mean = stacked.mean(0)
        expected = mean + torch.einsum("n,n...->...", weights, stacked - mean)
        torch.testing.assert_close(made[name], expected.float())
    one = combine(either, Combination(torch.eye(6, dtype=torch.float64)[4]))
    torch.testing.assert_close(one["2.weight"], originals[4]["2.weight"])


def test_averages_are_those_of_all_and_of_each_run(zoo: Zoo, span: ZooSpan) -> None:
    made, notes = make_baselines(span, EvaluateConfig(), 4, None, 0)
    values = torch.stack([zoo.state_dict(i)["2.weight"] for i in range(6)])
    (mean,) = made["average"]
    torch.testing.assert_close(combine(span, mean)["2.weight"], values.mean(0))
    runs = [combine(span, each)["2.weight"] for each in made["run_average"]]
    for run, found in enumerate(runs):
        torch.testing.assert_close(found, values[3 * run : 3 * run + 3].mean(0))
    assert len(made["average_of_6"]) == 4 and notes == []
    torch.testing.assert_close(combine(span, made["average_of_6"][0])["2.weight"], values.mean(0))
    plain = {name for name in NAMES if not name.endswith(AT_DISTANCE)} - {"noise", "average_of_k"}
    assert set(made) == {"average", "average_of_6", *plain, *(f"noise_{s:g}" for s in EvaluateConfig().noise)}


def test_interpolations_lie_between_two_originals(span: ZooSpan) -> None:
    for each in combinations(span, "interpolation", 20, 0):
        assert ((each.weights > 0).sum(), each.weights.sum()) == (2, pytest.approx(1))


def test_noise_has_the_asked_strength_and_takes_every_original_once(tmp_path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    for step in range(4):
        torch.manual_seed(step)
        zoo.append({"w": 10 * torch.randn(20_000), "v": torch.randn(20_000)}, run=0, step=step)
    span = span_of(zoo)
    made = combinations(span, "noise", 4, 0, sigma=0.5)
    assert sorted(int(each.weights.argmax()) for each in made) == [0, 1, 2, 3]
    for name, scale in (("w", 10), ("v", 1)):
        noise = combine(span, made[0])[name] - zoo.state_dict(int(made[0].weights.argmax()))[name]
        assert noise.std().item() == pytest.approx(0.5 * scale, rel=0.03)


def test_gaussians_have_the_moments_of_the_zoo(zoo: Zoo, span: ZooSpan) -> None:
    weights = torch.stack([each.weights for each in combinations(span, "covariance_gaussian", 20_000, 0)])
    values, vectors = torch.linalg.eigh(span.gram)
    coordinates = vectors * values.clamp(min=0).sqrt()  # of the checkpoints' deviations in axes of their span
    found, expected = coordinates.T @ torch.cov(weights.T) @ coordinates, coordinates.T @ coordinates / 5
    assert (found - expected).norm() < 0.05 * expected.norm()
    low = torch.stack([each.weights for each in combinations(span, "low_rank_gaussian", 50, 0)])
    assert torch.linalg.matrix_rank(low) <= 5
    values = torch.stack([zoo.state_dict(i)["2.bias"] for i in range(6)])
    made = [combine(span, each)["2.bias"] for each in combinations(span, "coordinate_gaussian", 600, 0)]
    torch.testing.assert_close(torch.stack(made).std(0), values.std(0), rtol=0.1, atol=0)
    within = [each.members for each in combinations(span, "run_coordinate_gaussian" + AT_DISTANCE, 20, 0, 1e-9)]
    assert set(within) == {(0, 1, 2), (3, 4, 5)}
    for each in combinations(span, "run_covariance_gaussian" + AT_DISTANCE, 20, 0, 30.0):
        assert each.weights.sum().item() == pytest.approx(1)  # deviations from a run's mean add up to nothing


@pytest.mark.parametrize("by", ["deviation", "spread"])
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(AT_DISTANCE)])
def test_baselines_lie_at_the_distance_that_is_asked_for(tmp_path, name: str, by) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    for number in range(8):
        torch.manual_seed(number)
        centre = torch.full((3000,), float(number // 4))
        zoo.append({"w": centre + 0.3 * torch.randn(3000), "v": torch.randn(500)}, run=number // 4, step=number % 4)
    runs = [entry.run for entry in zoo.entries]
    span = ZooSpan([zoo.checkpoint(i) for i in range(8)], ["w", "v"], runs, by)
    distance = 3 * span.gram.diagonal().max().item() ** 0.5
    made = [combine(span, each) for each in combinations(span, name, 9, 0, distance)]
    assert span.distances(span.project(made)).amin(1).median().item() == pytest.approx(distance, rel=0.03)


def test_baselines_that_cannot_lie_so_near_are_averages_and_said_so(span: ZooSpan) -> None:
    near = 0.2 * span.distances(span.project_combinations(torch.zeros(1, 6, dtype=torch.float64))).min().item()
    made, (note,) = make_baselines(span, EvaluateConfig(), 3, near, 0)
    assert all(each.weights.abs().max() == 0 for each in made["covariance_gaussian" + AT_DISTANCE])
    for name in ("coordinate_gaussian", "covariance_gaussian", "run_sharpened_gaussian"):
        assert name + AT_DISTANCE in note
    assert "noise_at_distance" not in note and "extrapolation" not in note  # these reach any distance


def test_large_zoos_get_what_is_affordable_and_those_alike_say_so(tmp_path, span: ZooSpan, monkeypatch) -> None:
    monkeypatch.setattr("rpg.evaluation.combinations.MANY_VALUES", 10)
    assert set(make_baselines(span, EvaluateConfig(), 2, 30.0, 0)[0]) == {"average", *AFFORDABLE}
    few = EvaluateConfig(baselines=("run_average", "merge_ties"))
    assert set(make_baselines(span, few, 2, 30.0, 0)[0]) == {"average", "run_average"}
    alike = Zoo.create(tmp_path / "alike")
    for step in range(3):
        alike.append(make_networks(1)[0], run=0, step=step)
    made, (note,) = make_baselines(
        ZooSpan([alike.checkpoint(i) for i in range(3)], ["half"]), EvaluateConfig(), 2, 1.0, 0
    )
    assert set(made) == {"average"} and "the same" in note


def test_low_precision_stays(tmp_path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    for step in range(3):
        shared = torch.randn(4, 3).bfloat16()
        zoo.append({"a": shared, "b": shared, "fixed": torch.ones(2)}, run=0, step=step)
    span = ZooSpan([zoo.checkpoint(i) for i in range(3)], ["a", "fixed"])
    made = combine(span, Combination(torch.ones(3).double()))
    assert made["a"] is made["b"] and made["a"].dtype == torch.bfloat16 and torch.equal(made["fixed"], torch.ones(2))


def test_vectors_of_a_held_zoo_are_those_in_memory(tmp_path) -> None:
    from tests.conftest import make_zoo

    zoo = make_zoo(tmp_path / "zoo")
    span = span_of(zoo)
    slow, _ = slow_vectors(zoo, [zoo.state_dict(0)])
    torch.testing.assert_close(span.vectors().double(), slow, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(span.vector(zoo.state_dict(2)).double(), slow[2], rtol=1e-4, atol=1e-4)
