"""The joint denoiser through training and generation: whole networks, and one line for what would cut them."""

import pytest
import torch

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tokenization.errors import InputError

JOINT = {"kind": "joint", "width": 8, "hidden": 8, "depth": 1, "num_heads": 2}


def joint(folder, **sections) -> Config:
    make_zoo(folder / "zoo")
    plain = small_config(folder, **sections).plain()
    return Config.parse({**plain, "model": {**plain["model"], "denoiser": JOINT}}, "test")


def test_it_trains_saves_and_generates_the_same_bytes_for_any_number(tmp_path):
    config = joint(tmp_path)
    generator = Generator.from_pretrained(train(config, overwrite=True, say=lambda _: None))
    three, streamed = generator.generate(3, seed=1), list(generator.one_by_one(2, seed=1))
    for a, b in zip(three[:2], streamed, strict=True):
        assert all(torch.equal(a[name], b[name]) and bool(a[name].isfinite().all()) for name in a)


def test_what_would_cut_networks_is_one_line(tmp_path):
    config = joint(tmp_path)
    small = config.model_copy(update={"generate": config.generate.model_copy(update={"tile_tokens": 1})})
    with pytest.raises(InputError, match=r"generate.tile_tokens is 1; raise it"):
        train(small, overwrite=True, say=lambda _: None)
    with pytest.raises(InputError, match="train.tokens must be null"):
        Config.parse({**config.plain(), "train": {**config.plain()["train"], "tokens": 2}}, "test")
