from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rpg.evaluation import span as span_module
from rpg.evaluation.span import Projections, ZooSpan, measure_span
from rpg.experiments.single import zoo_span
from rpg.generation.generator import Generator
from rpg.training.data import training_entries
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tokenization.zoo.zoo import Zoo

CHECKPOINT_STATES = {"state": {"of": "checkpoint", "width": 8}}


def span_of(zoo: Zoo) -> ZooSpan:
    names = [name for name, tensor in zoo.state_dict(0).items() if tensor.is_floating_point()]
    return ZooSpan([zoo.checkpoint(index) for index in range(len(zoo))], names)


def slow_vectors(zoo: Zoo, networks: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised deviations of the zoo and of networks, everything in memory: ``[n, values]``, ``[N, values]``."""
    zoo_parts, parts = [], []
    originals = [zoo.state_dict(index) for index in range(len(zoo))]
    for name, like in originals[0].items():
        if like.is_floating_point():
            values = torch.stack([each[name].flatten() for each in originals]).double()
            scale = (values - values.mean(0)).square().mean().sqrt()
            zoo_parts.append((values - values.mean(0)) / scale)
            parts.append((torch.stack([each[name].flatten() for each in networks]).double() - values.mean(0)) / scale)
    return torch.cat(zoo_parts, 1), torch.cat(parts, 1)


def noisy(zoo: Zoo, num: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        {name: value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value for name, value in each}
        for each in ([*zoo.state_dict(index).items()] for index in range(num))
    ]


@pytest.mark.parametrize(("block", "group"), [(1 << 16, 1 << 20), (7, 1), (64, 300)])
def test_places_are_those_of_vectors_in_memory(zoo, monkeypatch, block, group):
    monkeypatch.setattr(span_module, "BLOCK", block)
    monkeypatch.setattr(span_module, "GROUP_VALUES", group)
    networks = noisy(zoo, 3)
    slow_zoo, slow = slow_vectors(zoo, networks)
    span = span_of(zoo)
    torch.testing.assert_close(span.gram, slow_zoo @ slow_zoo.T, rtol=1e-5, atol=1e-4)
    places = span.project(iter(networks))
    torch.testing.assert_close(places.squares, slow.square().sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(places.products, slow @ slow_zoo.T, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(span.distances(places), torch.cdist(slow, slow_zoo), rtol=1e-4, atol=1e-3)
    far = span.distance(networks[0], zoo.checkpoint(4))
    assert far == pytest.approx(torch.cdist(slow, slow_zoo)[0, 4].item(), rel=1e-5)
    among = torch.cdist(slow_zoo, slow_zoo).fill_diagonal_(torch.inf)
    assert span.unit() == pytest.approx(among.amin(1).median().item(), rel=1e-4)


def test_the_zoo_itself_is_what_it_was_asked_to_be(zoo):
    span = span_of(zoo)
    measured = measure_span(span, span.project(zoo.state_dict(i) for i in range(len(zoo))), range(len(zoo)))
    assert measured == {"cosine": pytest.approx(1), "spread": pytest.approx(1), "accuracy": None, "num": len(zoo)}
    half = Projections(span.gram.diagonal() / 4, span.gram / 2)
    assert measure_span(span, half, range(len(zoo)))["cosine"] == pytest.approx(1)
    assert measure_span(span, half, range(len(zoo)))["spread"] == pytest.approx(0.25)


def test_the_mean_points_nowhere_and_a_zoo_without_spread_has_no_span(tmp_path):
    zoo = make_zoo(tmp_path / "zoo")
    span = span_of(zoo)
    mean = span.project_combinations(torch.zeros(2, len(zoo), dtype=torch.float64))
    assert measure_span(span, mean, [0, 1]) == {"cosine": 0.0, "spread": 0.0, "accuracy": None, "num": 2}
    assert measure_span(span, mean, []) is None
    alike = Zoo.create(tmp_path / "alike")
    for step in range(2):
        alike.append(zoo.state_dict(0), run=0, step=step)
    lone = span_of(alike)
    assert measure_span(lone, lone.project([zoo.state_dict(1)]), [0]) is None


def test_a_network_with_nan_has_no_span(zoo):
    broken = zoo.state_dict(0)
    broken["0.weight"][0] = torch.nan
    span = span_of(zoo)
    assert measure_span(span, span.project([broken]), [0]) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained generator with a state for each of twelve checkpoints of one run."""
    folder = tmp_path_factory.mktemp("span")
    make_zoo(folder / "zoo", 12, 1)
    config = small_config(
        folder,
        model=CHECKPOINT_STATES,
        tokens={"size": 16, "normalization": "residual"},
        train={"steps": 300, "batch_size": 12, "learning_rate": 5e-3, "save_every": 300, "log_every": 300},
    )
    train(config, say=lambda _: None)
    return folder


def measured(generator: Generator, num: int = 12):
    zoo = Zoo.open(generator.config.zoo)
    span = zoo_span(generator, zoo, training_entries(zoo, generator.config.train.splits))
    return measure_span(span, span.project(generator.generate(num, seed=3)), generator.asked(num, seed=3))


def test_networks_are_the_checkpoints_that_they_were_asked_to_be_unless_the_state_is_ignored(folder):
    """A guard: a generator whose tokens cannot hold the zoo passes its state by, and must not pass here."""
    generator = Generator.from_pretrained(folder / "run")
    told = measured(generator)
    assert told["cosine"] > 0.6 and 0.5 < told["spread"] < 1.5, told
    table = generator.network.state.weight
    table.copy_(table.mean(0).expand_as(table))  # whatever is asked, the generator hears the same
    deaf = measured(generator)
    assert abs(deaf["cosine"]) < 0.3, deaf


def test_asked_are_the_states_that_were_drawn(folder):
    generator = Generator.from_pretrained(folder / "run")
    table, request = generator.network.state.weight, generator.request(5, 7, state="stored")
    drawn = generator.sampler().state_vectors(request, list(range(5)))
    assert torch.equal(table[generator.asked(5, 7)], drawn)
    assert generator.asked(2, 7) == generator.asked(5, 7)[:2] and sorted(generator.asked(12, 7)) == list(range(12))


def test_nothing_is_asked_where_states_are_not_those_of_checkpoints(tmp_path):
    make_zoo(tmp_path / "zoo", 4)
    for number, model in enumerate(({"state": {"of": "run"}}, {"state": {"of": "none"}})):
        config = small_config(tmp_path, model=model, train={"steps": 1}, run=str(tmp_path / str(number)))
        generator = Generator.from_pretrained(train(config, say=lambda _: None))
        assert generator.asked(3) == []


@pytest.mark.parametrize("tile_tokens", [4, 64])
def test_networks_one_by_one_are_those_of_generate(folder, tile_tokens):
    generator = Generator.from_pretrained(folder / "run")
    section = generator.config.generate.model_copy(update={"tile_tokens": tile_tokens})
    generator.config = generator.config.model_copy(update={"generate": section})
    together, one_by_one = generator.generate(7, seed=2), list(generator.one_by_one(7, seed=2))
    assert len(one_by_one) == 7
    for first, second in zip(together, one_by_one, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
