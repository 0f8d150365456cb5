"""Files broken at random: whatever is read of them is right or one `InputError`, and soon.

Each kind of file is mutated in bytes (flipped, cut, doubled, filled) and, where it is JSON, in values. Every mutation
is decided by its number alone, so that a failure can be repeated.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config, small_network
from tokenization.checkpoint.checkpoint import Checkpoint, read_state_dict
from tokenization.errors import InputError
from tokenization.layouts import load_layout
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo

MUTATIONS = 60
SECONDS = 10
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 1e300, 10**30, float("nan"), "", "x", "../../etc/passwd", [], {}, [[]], {"a": None},
    "\x00", "é" * 5000, [-1] * 3,
)  # fmt: skip
"""What takes the place of a JSON value."""


@dataclass(frozen=True)
class Kind:
    """A file of ``folder`` that is mutated, and what reads it."""

    file: str
    read: Callable[[Path], object]


def read_zoo(folder: Path) -> None:
    zoo = Zoo.open(folder)
    zoo.state_dict(len(zoo) - 1)
    zoo.digest()


def read_generator(folder: Path) -> None:
    generator = Generator.from_pretrained(folder)
    condition = generator.condition
    generator.generate(1, steps=1, condition=[0.0] * condition.size if condition else None)


def adopt(folder: Path) -> None:
    output = folder / "adopted"
    shutil.rmtree(output, ignore_errors=True)
    read_zoo(collect_from(folder / "checkpoints", output, table=folder / "table.csv").path)


def adopt_adapters(folder: Path) -> None:
    output = folder / "adopted"
    shutil.rmtree(output, ignore_errors=True)
    read_zoo(collect_from(folder / "adapters", output).path)


KINDS = {
    "safetensors": Kind(
        "checkpoint.safetensors", lambda folder: Checkpoint.open(folder / "checkpoint.safetensors").state_dict()
    ),
    "pickle": Kind("checkpoint.pth", lambda folder: read_state_dict(folder / "checkpoint.pth")),
    "zoo.json": Kind("zoo/zoo.json", lambda folder: read_zoo(folder / "zoo")),
    "manifest": Kind("zoo/manifest.jsonl", lambda folder: read_zoo(folder / "zoo")),
    "layout": Kind("run/generator/layout.json", lambda folder: load_layout(folder / "run" / "generator")),
    "statistics": Kind("run/generator/statistics.safetensors", lambda folder: read_generator(folder / "run")),
    "weights": Kind("run/generator/model.safetensors", lambda folder: read_generator(folder / "run")),
    "generator's configuration": Kind("run/generator/config.yaml", lambda folder: read_generator(folder / "run")),
    "configuration": Kind("config.yaml", lambda folder: Config.load(folder / "config.yaml")),
    "table": Kind("table.csv", adopt),
    "adapter's configuration": Kind(f"adapters/a/{CONFIG_NAME}", adopt_adapters),
    "adapter": Kind("adapters/a/adapter_model.safetensors", adopt_adapters),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind, whole."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("whole")
    zoo = make_zoo(folder / "zoo", condition_size=3)
    config = small_config(folder, model={"condition": {"kind": "binary"}}, train={"steps": 1})
    train(config, overwrite=True, say=lambda _: None)
    config.save(folder / "config.yaml")
    state_dict = zoo.state_dict(0)
    save_file(state_dict, folder / "checkpoint.safetensors")
    torch.save({"state_dict": small_network().state_dict(), "epoch": 3}, folder / "checkpoint.pth")
    (folder / "checkpoints").mkdir()
    for number in range(2):
        save_file(zoo.state_dict(number), folder / f"checkpoints/{number}.safetensors")
    (folder / "table.csv").write_text("file,run,step,condition.a\n0.safetensors,0,1,0.5\n1.safetensors,1,2,1\n")
    for number, name in enumerate("ab"):
        path = folder / "adapters" / name
        path.mkdir(parents=True)
        pair = {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(5, 2)}
        tensors = {f"base_model.model.q.{key}.weight": value + number for key, value in pair.items()}
        save_file(tensors, path / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}
        (path / CONFIG_NAME).write_text(json.dumps(settings))
    return folder


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Broken bytes; of JSON every other time a broken value."""
    if rng.random() < 0.5:
        lines = data.splitlines(keepends=True)
        row = rng.randrange(len(lines)) if data[:1] == b"{" and data.count(b"\n{") else None
        try:
            tree = json.loads(data if row is None else lines[row])
        except ValueError:
            return _bytes(data, rng)
        text = json.dumps(_changed(tree, rng)).encode()
        return text if row is None else b"".join([*lines[:row], text + b"\n", *lines[row + 1 :]])
    return _bytes(data, rng)


def _changed(tree: Any, rng: random.Random) -> Any:
    """The tree with one of its values replaced, left out or given twice."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.15:
        return rng.choice(VALUES)
    if isinstance(tree, list):
        place = rng.randrange(len(tree))
        changed = [tree[place], _changed(tree[place], rng)] if rng.random() < 0.1 else [_changed(tree[place], rng)]
        return [*tree[:place], *changed, *tree[place + 1 :]]
    key = rng.choice(sorted(tree))
    if rng.random() < 0.15:
        return {name: value for name, value in tree.items() if name != key}
    return {**tree, key: _changed(tree[key], rng)}


def _bytes(data: bytes, rng: random.Random) -> bytes:
    broken = bytearray(data)
    # Headers and first lines are where most is said.
    place = rng.randrange(min(len(data), 400) if rng.random() < 0.6 else len(data))
    way = rng.randrange(6)
    if way == 0:
        return bytes(broken[:place])
    if way == 1:
        return bytes(broken[:place] + broken[place : place + 40] * 3 + broken[place + 40 :])
    if way == 2:
        return bytes(broken[:place] + broken[place + rng.randrange(1, 40) :])
    if way == 3:
        broken[place : place + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, b"\x7f" * 8])
        return bytes(broken)
    for _ in range(rng.choice([1, 1, 5])):
        broken[rng.randrange(max(0, place - 20), min(len(broken), place + 20))] = rng.randrange(256)
    return bytes(broken)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_one_line(whole: Path, tmp_path: Path, kind: str) -> None:
    file, read = KINDS[kind].file, KINDS[kind].read
    folder = tmp_path / "broken"
    shutil.copytree(whole, folder)
    read(folder)
    good = (folder / file).read_bytes()
    refused = 0
    for number in range(MUTATIONS):
        (folder / file).unlink()
        (folder / file).write_bytes(mutated(good, random.Random(f"{kind} {number}")))
        started = time.perf_counter()
        try:
            read(folder)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error), (kind, number)
        except Exception as error:
            raise AssertionError(f"mutation {number} of {kind}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - started < SECONDS, (kind, number)
    assert refused > MUTATIONS // 10
