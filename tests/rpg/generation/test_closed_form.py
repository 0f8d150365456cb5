"""Codes, priors and kernel ridge from a zoo to files: what the closed forms promise holds of generated networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.planning.plan import make_plan
from rpg.planning.zoo_summary import ZooSummary
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


def quiet(config: Config, **options) -> Generator:
    return Generator.from_pretrained(train(config, say=lambda _: None, **options))


def ridge(folder: Path, condition: str, **sections) -> Config:
    tree = small_config(folder, tokens={"rank": 4}, **sections).plain()
    return Config.parse(tree | {"model": {"kind": "kernel_ridge", "condition": {"kind": condition}}}, "test")


def test_a_stored_code_gives_back_its_checkpoint_without_training(tmp_path):
    """Guards the first cause of learning nothing at scale: a generator must hold the directions of its zoo."""
    zoo = make_zoo(tmp_path / "zoo", num=10)
    config = small_config(
        tmp_path,
        tokens={"rank": 9, "basis_dtype": "fp32"},
        train={"steps": 1},
        model={"state": {"of": "code", "width": 9}},
    )
    generator = quiet(config)
    networks = generator.generate(4, seed=3, state="stored")
    for asked, network in zip(generator.asked(4, 3), networks, strict=True):
        for name, value in zoo.state_dict(asked).items():
            if value.is_floating_point():
                assert torch.allclose(network[name], value, atol=1e-3), name


def test_a_wide_token_generator_that_ignores_its_state_fails_where_codes_do_not(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", num=10, num_runs=1)
    stored = torch.stack([torch.cat([v.flatten() for v in zoo.state_dict(i).values()]).double() for i in range(10)])
    mean = stored.mean(0)

    def cosine(generator: Generator) -> float:
        networks = generator.generate(6, seed=0, state="stored")
        made = torch.stack([torch.cat([v.flatten() for v in n.values()]).double() for n in networks]) - mean
        asked = stored[generator.asked(6, 0)] - mean
        return float(torch.cosine_similarity(made, asked).mean())

    codes = {"state": {"of": "code", "width": 9}}
    wide = {"state": {"of": "checkpoint", "noise": 100.0}}
    assert cosine(quiet(small_config(tmp_path, run=str(tmp_path / "a"), tokens={"rank": 9}, model=codes))) > 0.85
    assert cosine(quiet(small_config(tmp_path, run=str(tmp_path / "b"), model=wide))) < 0.5


@pytest.mark.parametrize("rank", [None, 4])
def test_priors_and_regression_train_save_and_stream(tmp_path, rank):
    make_zoo(tmp_path / "zoo", num=12, num_runs=3, condition_size=3)
    state = {"of": "code", "width": 4, "prior": {"width": 16, "depth": 1, "batch_size": 8}}
    config = small_config(
        tmp_path, tokens={"rank": rank, "centre": "condition"}, model={"state": state, "condition": {"kind": "binary"}}
    )
    generator = quiet(config)
    for drawn in ("stored", "gaussian", "prior"):
        paths = generator.generate(3, seed=1, condition=[1, 0, 1], state=drawn, output=tmp_path / drawn)
        for path, network in zip(paths, generator.generate(3, seed=1, condition=[1, 0, 1], state=drawn), strict=True):
            assert all(torch.equal(load_file(path)[name], value) for name, value in network.items())
    with pytest.raises(InputError, match="no prior"):
        without = {"state": {"of": "checkpoint"}}
        quiet(small_config(tmp_path, run=str(tmp_path / "b"), model=without)).generate(1, state="prior")


def test_a_resumed_prior_equals_an_uninterrupted_one(tmp_path):
    make_zoo(tmp_path / "zoo", num=8)
    state = {"of": "code", "width": 4, "prior": {"width": 16, "depth": 1, "batch_size": 8, "dropout": 0.0}}
    sections = {"tokens": {"rank": 3}, "model": {"state": state}}
    whole = quiet(small_config(tmp_path, run=str(tmp_path / "a"), **sections))
    config = small_config(tmp_path, run=str(tmp_path / "b"), **sections)
    train(config, max_seconds=0, say=lambda _: None)
    parts = quiet(config, resume=True)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, parts.network.state_dict()[name]), name


def test_kernel_ridge_gives_the_mean_and_draws_around_it(tmp_path):
    make_zoo(tmp_path / "zoo", num=8, num_runs=1, condition_size=3)
    generator = quiet(ridge(tmp_path, "binary"))
    assert "leave-one-out error, part of the variance" in generator.facts
    draws = generator.generate(3, seed=5, condition=[1, 0, 1])
    means = generator.generate(2, seed=5, condition=[1, 0, 1], temperature=0)
    assert all(torch.equal(means[0][name], means[1][name]) for name in means[0])
    assert not torch.equal(draws[0]["0.weight"], draws[1]["0.weight"])
    again = Generator.from_pretrained(generator.save_pretrained(tmp_path / "again"))
    mean = again.generate(1, condition=[1, 0, 1], temperature=0)[0]
    assert torch.equal(mean["0.weight"], means[0]["0.weight"])


def test_kernel_ridge_without_a_condition_is_the_zoos_gaussian(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", num=8, num_runs=1)
    generator = quiet(ridge(tmp_path, "none"))
    made = torch.stack([network["3.weight"].flatten() for network in generator.generate(400, seed=0)])
    held = torch.stack(
        [generator.layout.decode(generator.layout.encode(zoo.checkpoint(i)))["3.weight"].flatten() for i in range(8)]
    )
    assert torch.allclose(made.mean(0), held.mean(0), atol=0.02)
    assert float(made.var(0).sum() / held.var(0, correction=0).sum()) == pytest.approx(1, abs=0.15)


def test_its_plan_is_made_without_values(tmp_path):
    make_zoo(tmp_path / "zoo", num=8, condition_size=3)
    config = ridge(tmp_path, "binary")
    plan = make_plan(config, ZooSummary.of(Zoo.open(config.zoo), config))
    assert plan.generation.total > 0 and sum(plan.parameters.values()) == 0
