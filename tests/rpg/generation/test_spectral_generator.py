"""A generator of coefficients: trained, saved, streamed and resumed as one of values is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpg.generation.generator import Generator
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.rpg.models.test_pdiff import pdiff_config


@pytest.mark.parametrize("basis", ["token", "network"])
@pytest.mark.parametrize("kind", ["recurrent", "pdiff"])
def test_it_trains_saves_and_streams(tmp_path: Path, basis: str, kind: str) -> None:
    make_zoo(tmp_path / "zoo")
    tokens = {"size": 16, "rank": 4, "basis": basis}
    if kind == "pdiff":
        config = pdiff_config(tmp_path, tokens=tokens)
    else:
        config = small_config(tmp_path, tokens=tokens, generate={"tile_tokens": 5})
    generator = Generator.from_pretrained(train(config, say=lambda _: None))
    assert generator.layout.token_size == 4
    paths = generator.generate(2, seed=3, output=tmp_path / "new")
    for path, state in zip(paths, generator.generate(2, seed=3), strict=True):
        assert all(torch.equal(load_file(path)[name], value) for name, value in state.items())
    again = Generator.from_pretrained(generator.save_pretrained(tmp_path / "again"))
    assert again.digest == generator.digest


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    sections = {"tokens": {"rank": 3}, "train": {"save_every": 5}}
    whole = Generator.from_pretrained(
        train(small_config(tmp_path, run=str(tmp_path / "a"), **sections), say=lambda _: None)
    )
    config = small_config(tmp_path, run=str(tmp_path / "b"), **sections)
    train(config, max_seconds=0, say=lambda _: None)
    parts = Generator.from_pretrained(train(config, resume=True, say=lambda _: None))
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, parts.network.state_dict()[name]), name
