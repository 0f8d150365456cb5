import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rpg.generation.folders import FILES
from rpg.generation.generator import Generator
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config, small_network
from tokenization.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    make_zoo(folder / "zoo", num=8, num_runs=4, condition_size=3)
    config = small_config(folder, model={"condition": {"kind": "binary", "dropout": 0.3}})
    train(config)
    return config.run


CONDITION = (1.0, 0.0, 1.0)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_files_load_into_the_network_with_plain_torch(run, tmp_path):
    paths = Generator.from_pretrained(run).generate(3, seed=4, condition=CONDITION, output=tmp_path)
    assert [path.name for path in paths] == [f"network-0000{i}.safetensors" for i in range(3)]
    small_network().load_state_dict(load_file(paths[1]), strict=True)
    with safe_open(paths[1], "pt") as file:
        facts = json.loads(file.metadata()["rpg.provenance"])
    assert facts["seed"] == 4 and facts["index"] == 1 and facts["condition"] == list(CONDITION)
    assert facts["generator"] == Generator.from_pretrained(run).digest


@pytest.mark.parametrize("state", ["stored", "density", "gaussian"])
def test_a_seed_decides_the_bytes(run, tmp_path, state):
    generator = Generator.from_pretrained(run)
    many = generator.generate(7, seed=4, condition=CONDITION, state=state)
    few = generator.generate(2, seed=4, condition=CONDITION, state=state)
    streamed = generator.generate(2, seed=4, condition=CONDITION, state=state, output=tmp_path)
    other = generator.generate(2, seed=5, condition=CONDITION, state=state)
    for index in range(2):
        assert same(many[index], few[index])
        assert same(many[index], load_file(streamed[index]))
        assert not same(many[index], other[index])
    assert not same(many[0], many[1])


@pytest.mark.parametrize("tile_tokens", [4, 32, 64])
def test_tiles_cover_every_token_once(run, tile_tokens):
    generator = Generator.from_pretrained(run)
    section = generator.config.generate.model_copy(update={"tile_tokens": tile_tokens})
    generator.config = generator.config.model_copy(update={"generate": section})
    seen = torch.zeros(5, generator.layout.num_tokens)
    for tile in generator.sampler().tiles(5):
        seen[tile.network : tile.network + tile.num_networks, tile.token : tile.token + tile.num_tokens] += 1
    assert (seen == 1).all()
    # Networks larger than a tile are finite and complete too.
    assert all(torch.isfinite(v).all() for v in generator.generate(1, condition=CONDITION)[0].values())


def test_guidance_of_one_is_no_guidance_and_more_changes_the_weights(run):
    generator = Generator.from_pretrained(run)
    plain, one, two = (
        generator.generate(1, condition=CONDITION, guidance_scale=scale)[0] for scale in (None, 1.0, 2.0)
    )
    assert same(plain, one) and not same(plain, two)


def test_each_network_can_have_its_own_condition(run):
    generator = Generator.from_pretrained(run)
    mixed = generator.generate(2, condition=[[1, 0, 1], [0, 1, 0]])
    assert same(mixed[0], generator.generate(1, condition=CONDITION)[0])
    assert not same(mixed[1], generator.generate(2, condition=CONDITION)[1])


def test_saving_and_loading_keeps_the_generator(run, tmp_path):
    first = Generator.from_pretrained(run)
    first.save_pretrained(tmp_path / "copy")
    second = Generator.from_pretrained(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted([*FILES, "README.md"])
    assert same(first.generate(1, condition=CONDITION)[0], second.generate(1, condition=CONDITION)[0])


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"condition": None}, "condition"),
        ({"condition": (1.0, 0.0)}, "condition"),
        ({"condition": (1.0, 0.5, 0.0)}, "binary"),
        ({"condition": CONDITION, "sampler": "ddim"}, "euler"),
        ({"condition": CONDITION, "steps": 0}, "steps"),
        ({"condition": CONDITION, "num": 0}, "num"),
    ],
)
def test_impossible_requests_are_one_line(run, request_, expected):
    with pytest.raises(InputError, match=expected) as caught:
        Generator.from_pretrained(run).generate(**request_)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run, tmp_path, name):
    Generator.from_pretrained(run).save_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(InputError, match=name):
        Generator.from_pretrained(tmp_path / "copy")


def test_a_truncated_file_is_named(run, tmp_path):
    Generator.from_pretrained(run).save_pretrained(tmp_path / "copy")
    victim = tmp_path / "copy" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        Generator.from_pretrained(tmp_path / "copy")


def test_no_such_folder(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        Generator.from_pretrained(tmp_path / "nothing" / "here")


def test_the_digest_stays_when_a_generator_is_saved_again(run, tmp_path):
    generator = Generator.from_pretrained(run)
    digest = generator.digest
    for index in range(6):  # the order of two metadata is a coin's
        generator.save_pretrained(tmp_path / str(index))
        assert generator.digest == Generator.from_pretrained(tmp_path / str(index)).digest == digest


def test_a_kill_while_a_generator_is_replaced_loses_none(run, tmp_path, monkeypatch):
    target = Generator.from_pretrained(run).save_pretrained(tmp_path / "run" / "generator")
    digest, replace = Generator.from_pretrained(target).digest, os.replace

    def killed(source, destination):
        if str(destination) == str(target):
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(Path, "rename", lambda source, destination: killed(source, destination))
    with pytest.raises(KeyboardInterrupt):
        Generator.from_pretrained(run).save_pretrained(target)
    monkeypatch.undo()
    assert Generator.from_pretrained(tmp_path / "run").digest == digest


@pytest.mark.parametrize("eta", [-0.5, 1.5, float("nan")])
def test_shares_of_fresh_noise_are_checked(run, eta):
    with pytest.raises(InputError, match="eta is"):
        Generator.from_pretrained(run).generate(1, condition=CONDITION, eta=eta)
