"""A zoo and a generator as version 0.1 of the formats wrote them: they load, and generate the bytes they always did."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rpg.generation.generator import Generator
from tests.machine import machine
from tests.test_golden import summary
from tokenization.zoo.zoo import Zoo

OLD = Path(__file__).parent / "golden" / "old"


def content_digest(file: Path) -> str:
    """Digest of names and bytes of all tensors; metadata, which name the generator's own digest, left out."""
    digest = hashlib.sha256()
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys()):
            values = opened.get_tensor(name).contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    shutil.copytree(OLD / "zoo", tmp_path / "zoo")  # a zoo keeps a cache in its folder
    return Zoo.open(tmp_path / "zoo")


def test_an_old_zoo_loads(zoo: Zoo) -> None:
    zoo.verify()
    state = zoo.state_dict(1)
    torch.manual_seed(1)
    assert len(zoo) == 3 and torch.equal(state["embed"], torch.randn(4, 5)) and state["head"] is state["embed"]
    assert state["norm.num_batches_tracked"] == 20 and state["mask"].tolist() == [True, False, True]


def test_an_old_generator_makes_what_it_made(tmp_path: Path) -> None:
    record = json.loads((OLD / "record.json").read_text())
    paths = Generator.from_pretrained(OLD / "generator").generate(2, seed=7, output=tmp_path)
    for path, values, digest in zip(paths, record["values"], record["bytes"], strict=True):
        found = summary(path)  # type: ignore[arg-type]
        assert list(found) == list(values)
        assert all(found[name] == pytest.approx(values[name], rel=1e-3, abs=1e-4) for name in values)
        assert record["machine"] != machine() or content_digest(path) == digest  # type: ignore[arg-type]
