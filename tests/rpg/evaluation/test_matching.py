from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from rpg.evaluation.matching import Distances, Matcher, assignment, permute
from rpg.evaluation.permutations import Group, permutation_groups
from rpg.evaluation.span import ZooSpan
from rpg.tasks import DigitsConfig, build_task
from rpg.tasks.images.networks import build_network
from tokenization.zoo.zoo import Zoo

MATCHABLE = {"cnn": 3, "convnet-mini": 4, "mlp-mini": 2, "resnet-mini": 6, "vit-mini": 4, "convnext-mini": 7}
TASK = build_task(DigitsConfig())


def random_orders(groups: Sequence[Group], generator: torch.Generator) -> list[torch.Tensor]:
    """A random order of the units of each group."""
    return [torch.randperm(group.size, generator=generator) for group in groups]


def random_network(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    network = build_network(name, in_channels=1, image_size=8, num_classes=10).eval()
    for key, value in network.state_dict().items():
        if "norm" in key and value.is_floating_point():
            value.uniform_(0.5, 2)
        if key.endswith("gamma"):  # ConvNeXt's layer scale: at 1e-6 its blocks would not matter
            value.uniform_(0.5, 2)
    return network


def distances_in(folder: Path, originals: Sequence[dict], runs: Sequence[int], groups: Sequence[Group]) -> Distances:
    """Distances to networks, which are written into a zoo in the folder."""
    zoo = Zoo.create(folder / "originals")
    for step, (network, run) in enumerate(zip(originals, runs, strict=True)):
        zoo.append(network, run=run, step=step)
    names = [name for name, value in originals[0].items() if value.is_floating_point()]
    return Distances(ZooSpan([zoo.checkpoint(i) for i in range(len(runs))], names, runs, "spread"), groups)


@pytest.fixture(scope="module")
def groups():
    images = TASK.images("test")[:2]
    return {name: permutation_groups(random_network(name), images) for name in MATCHABLE}


@pytest.mark.parametrize("name", MATCHABLE)
def test_permuted_units_compute_the_same_and_are_matched_back(groups, name):
    network, images = random_network(name), TASK.images("test")[:20]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    permuted = permute(state, groups[name], random_orders(groups[name], torch.Generator().manual_seed(1)))
    assert len(groups[name]) == MATCHABLE[name]
    assert any(not torch.equal(permuted[key], state[key]) for key in state)
    with torch.no_grad():
        before = network(images)
        network.load_state_dict(permuted)
        assert torch.allclose(network(images), before, atol=1e-4)
    matched = Matcher(groups[name]).match(state, permuted)
    assert all(torch.equal(matched[key], state[key]) for key in state)


def test_a_noisy_permuted_copy_is_matched_back(groups):
    state = {key: value.clone() for key, value in random_network("resnet-mini").state_dict().items()}
    noisy = {
        key: value + 0.05 * value.std() * torch.randn_like(value) if value.numel() > 1 else value
        for key, value in state.items()
    }
    permuted = permute(noisy, groups["resnet-mini"], random_orders(groups["resnet-mini"], torch.Generator()))
    matched = Matcher(groups["resnet-mini"]).match(state, permuted)
    assert all(torch.equal(matched[key], noisy[key]) for key in noisy)


def test_matching_goes_on_until_nothing_changes(groups):
    """So much noise that groups which were solved first are solved better once the others are."""
    state = {key: value.clone() for key, value in random_network("resnet-mini").state_dict().items()}
    torch.manual_seed(0)
    noisy = {
        key: value + 1.5 * value.std() * torch.randn_like(value) if value.numel() > 1 else value
        for key, value in state.items()
    }
    permuted = permute(
        noisy, groups["resnet-mini"], random_orders(groups["resnet-mini"], torch.Generator().manual_seed(0))
    )
    matched, once = (Matcher(groups["resnet-mini"], sweeps=sweeps).match(state, permuted) for sweeps in (20, 1))
    assert all(torch.equal(matched[key], noisy[key]) for key in noisy)
    assert not all(torch.equal(once[key], noisy[key]) for key in noisy)  # one sweep does not do


def test_matching_never_makes_the_fit_worse(groups):
    first, second = (random_network("cnn", seed).state_dict() for seed in (0, 1))
    matched = Matcher(groups["cnn"]).match(first, second)

    def fit(network):
        return sum(float((first[key] * network[key]).sum()) for key in first)

    assert fit(matched) > fit(second)


@pytest.mark.parametrize("noise", [0.01, 0.5, 3.0])
def test_assignment_is_the_best_one_with_and_without_a_search(noise):
    rng = np.random.default_rng(0)
    units = rng.normal(size=(60, 8))
    order = rng.permutation(60)
    shuffled = units[order] + noise * rng.normal(size=units.shape)
    gain = units @ shuffled.T - 0.5 * np.square(shuffled).sum(1)
    found, rows = assignment(gain), np.arange(60)
    assert sorted(found) == list(rows)
    assert gain[rows, found].sum() == pytest.approx(gain[linear_sum_assignment(gain, maximize=True)].sum())
    if noise == 0.01:
        assert (order[found] == rows).all()


def test_matching_many_at_once_is_matching_each(zoo, groups, tmp_path):
    originals, runs, fresh = zoo
    measure = distances_in(tmp_path, originals, runs, groups["cnn"])
    networks = [*fresh, originals[4]]
    plain = measure.plain(networks)
    matched = measure.matched(networks, plain)
    assert bool((matched <= plain).all()) and matched[3, 4] == 0
    first = {run: runs.index(run) for run in runs}
    for row, network in enumerate(networks[:3]):
        aligned = [measure.matcher.match(originals[first[run]], network) for run in runs]
        alone = torch.stack([measure.plain([each])[0, column] for column, each in enumerate(aligned)])
        nearest = torch.minimum(alone, plain[row]).min()
        assert matched[row].min() == pytest.approx(float(nearest))


def test_computation_that_is_not_known_has_no_symmetries():
    class Branching(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    class Reversing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.second(torch.cumsum(self.first(x), 1))

    assert permutation_groups(Branching(), torch.ones(2, 4)) == []
    assert permutation_groups(Reversing(), torch.ones(2, 4)) == []


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two runs of three checkpoints, and a run of another seed that is not in the zoo."""
    folder = tmp_path_factory.mktemp("zoos")
    short = {"train_steps": 150, "steps": 3, "batch_size": 64}
    zoo = build_task(DigitsConfig(**short, runs=2)).collect(folder / "zoo")
    fresh = build_task(DigitsConfig(**short, seed=7)).collect(folder / "fresh")
    runs = [entry.run for entry in zoo.entries]
    return [zoo.state_dict(i) for i in range(len(zoo))], runs, [fresh.state_dict(i) for i in range(3)]


def test_copies_have_no_distance_permuted_ones_neither_and_fresh_runs_are_far(zoo, groups, tmp_path):
    originals, runs, fresh = zoo
    rng = torch.Generator().manual_seed(0)
    permuted = [permute(network, groups["cnn"], random_orders(groups["cnn"], rng)) for network in originals]
    measure = distances_in(tmp_path, originals, runs, groups["cnn"])
    unit = measure.unit()
    assert measure.plain(originals).amin(1).max() == 0
    plain = measure.plain(permuted)
    assert (plain.amin(1) / unit).min() > 10 and (measure.matched(permuted, plain).amin(1) / unit).max() < 1e-6
    assert (measure.matched(fresh, measure.plain(fresh)).amin(1) / unit).min() > 10
    near = measure.plain(originals[:1])  # nothing is left to be matched
    assert torch.equal(measure.matched(originals[:1], near), near)


def test_the_unit_is_the_median_distance_to_the_nearest_neighbour(tmp_path):
    originals = [{"w": torch.tensor([float(x), 0.0])} for x in (0, 1, 3, 5, 9)]
    measure = distances_in(tmp_path, originals, [0] * 5, [])
    scale = torch.tensor([x["w"].tolist() for x in originals]).std(correction=0)
    assert measure.unit() == pytest.approx(2 / float(scale))  # distances 1, 1, 2, 2, 4
    # alone in their runs and without symmetries the same neighbours count
    alone = distances_in(tmp_path / "alone", originals, list(range(5)), [])
    assert alone.unit() == pytest.approx(2 / float(scale))


@pytest.mark.parametrize("order", [(0, 1, 3, 5, 9), (0, 9, 5, 3, 1)])
def test_the_unit_of_runs_of_one_checkpoint_is_the_median_after_matching(zoo, groups, tmp_path, order):
    """One network at five distances along a line, its units in another order every time."""
    first, rng = zoo[0][0], torch.Generator().manual_seed(0)
    line = [{name: value + 1e-3 * x for name, value in first.items()} for x in order]
    permuted = [permute(each, groups["cnn"], random_orders(groups["cnn"], rng)) for each in line]
    measure = distances_in(tmp_path, permuted, range(5), groups["cnn"])
    vectors = measure.vectors(line)
    near = [order.index(x) for x in (3, 5)]
    assert measure.unit() == pytest.approx((vectors[near[0]] - vectors[near[1]]).norm().item(), rel=1e-4)
