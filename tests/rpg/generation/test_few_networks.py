"""A request for few networks computes few rows, and its bytes are those of a full tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rpg.config import Config
from rpg.generation import sampler
from rpg.generation.generator import Generator
from rpg.generation.sampler import first_of_normal
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config

CONDITIONAL = {"state": {"of": "none"}, "condition": {"kind": "binary"}}
DDPM = {**CONDITIONAL, "diffusion": {"kind": "ddpm", "num_steps": 20}}


def trained(folder: Path, model: dict[str, Any] = CONDITIONAL, tile: int = 256) -> Generator:
    make_zoo(folder / "zoo", condition_size=3)
    generate = {"steps": 3, "tile_tokens": tile}
    config = small_config(folder, model=model, generate=generate)
    if model.get("kind") == "kernel_ridge":
        config = Config.parse({**config.plain(), "model": model}, "test")
    train(config, say=lambda _: None)
    return Generator.from_pretrained(config.run)


@pytest.mark.parametrize(
    "model, options",
    [
        (CONDITIONAL, {}),
        (CONDITIONAL, {"guidance_scale": 2.0, "sampler": "heun"}),
        (DDPM, {"sampler": "ddpm"}),
        (DDPM, {"sampler": "ddim", "eta": 0.5}),
        ({"kind": "kernel_ridge", "condition": {"kind": "binary"}}, {}),
    ],
)
def test_few_networks_have_the_bytes_of_a_full_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], options: dict[str, Any]
) -> None:
    generator = trained(tmp_path, model)
    conditions = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0]])
    found = {}
    for seed in (0, 1, 1):  # the last time only as much is computed as is known to be enough
        for num in (1, 2, 3):
            found[seed, num] = generator.generate(num, seed=seed, condition=conditions[:num], **options)
    monkeypatch.setattr(sampler, "FEW", 10**9)
    whole = Generator.from_pretrained(generator.folder)
    for (seed, num), networks in found.items():
        expected = whole.generate(num, seed=seed, condition=conditions[:num], **options)
        for mine, theirs in zip(networks, expected, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs), (seed, num)


def test_one_network_computes_a_small_part_of_a_tile(tmp_path: Path) -> None:
    generator = trained(tmp_path, tile=4096)
    rows: list[int] = []
    generator.network.denoiser.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for seed in range(3):
        rows.clear()
        generator.generate(1, seed=seed, condition=[1.0, 0.0, 1.0])
    assert set(rows) <= {generator.layout.num_tokens << power for power in range(3)}  # of a tile of hundreds


@pytest.mark.parametrize("rows, width", [(1, 16), (3, 5), (7, 512), (40, 3)])
def test_the_first_normal_numbers_of_many_are_those_of_few(rows: int, width: int) -> None:
    whole = torch.randn(64, width, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first_of_normal(rows, 64, width, torch.Generator().manual_seed(3)), whole[:rows])
