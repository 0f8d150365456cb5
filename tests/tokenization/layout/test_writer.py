from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.rows import CheckpointWriter
from tokenization.zoo.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Zoo:
    zoo = Zoo.create(tmp_path_factory.mktemp("writer") / "zoo")
    for step in range(2):
        shared = torch.randn(7, 5)
        zoo.append(
            {
                "flag": torch.tensor([True, False, True]),
                "embed.weight": shared,
                "conv.weight": torch.randn(4, 3, 3),
                "half": torch.randn(33).half(),
                "double": torch.randn(3).double(),
                "empty": torch.tensor(1),
                "head.weight": shared,
            },
            run=0,
            step=step,
        )
    return zoo


@pytest.fixture(params=["layer", "channel", "flat"])
def layout(zoo: Zoo, request) -> TokenLayout:
    return TokenLayout.fit(zoo, TokenOptions(size=8, flatten=request.param, exclude=("double",)))


def test_rows_in_any_order_make_the_file_that_decode_makes(zoo: Zoo, layout: TokenLayout, tmp_path: Path):
    tokens = layout.encode(zoo.checkpoint(1))
    path = tmp_path / "out.safetensors"
    with CheckpointWriter(path, layout, {"seed": "3"}) as writer:
        for first in reversed(range(0, layout.num_tokens, 3)):
            writer.write(first, tokens[first : first + 3].requires_grad_())
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]
    expected = layout.decode(tokens)
    loaded = load_file(path)
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["seed"] == "3"
    assert json.loads(metadata["rpg.order"]) == list(expected) == list(Checkpoint.open(path).state_dict())
    for info in Checkpoint.open(path).tensors.values():
        assert info.offset % info.dtype.itemsize == 0


def _fill(writer: CheckpointWriter, first: int, rows: torch.Tensor) -> None:
    writer.write(first, rows)
    writer.close()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_several_processes_fill_one_file(zoo: Zoo, layout: TokenLayout, tmp_path: Path, method: str):
    tokens = layout.encode(zoo.checkpoint(0))
    path, half = tmp_path / "out.safetensors", layout.num_tokens // 2
    context = multiprocessing.get_context(method)
    with CheckpointWriter(path, layout) as writer:
        workers = [
            context.Process(target=_fill, args=(writer, first, tokens[first : first + half + 1])) for first in (0, half)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        assert not path.exists()
    for name, tensor in layout.decode(tokens).items():
        assert torch.equal(load_file(path)[name], tensor)


def test_a_pickled_copy_never_publishes(zoo: Zoo, layout: TokenLayout, tmp_path: Path):
    writer = CheckpointWriter(tmp_path / "out.safetensors", layout)
    copy = pickle.loads(pickle.dumps(writer))
    copy._file.process += 1  # as in another process
    copy.write(0, layout.encode(zoo.checkpoint(0)))
    copy.close()
    assert not (tmp_path / "out.safetensors").exists()
    writer.close()
    assert (tmp_path / "out.safetensors").exists()


def test_a_token_that_was_never_written_is_not_published(zoo: Zoo, layout: TokenLayout, tmp_path: Path):
    writer = CheckpointWriter(tmp_path / "out.safetensors", layout)
    writer.write(0, layout.encode(zoo.checkpoint(0))[:2])
    with pytest.raises(ValueError, match="token 2 of"):
        writer.close()
    assert not list(tmp_path.iterdir())


def test_errors_and_dropped_writers_leave_the_old_file(zoo: Zoo, layout: TokenLayout, tmp_path: Path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), CheckpointWriter(path, layout) as writer:
        writer.write(0, layout.encode(zoo.checkpoint(0)))
        raise KeyError
    writer.abort()
    writer = CheckpointWriter(path, layout)
    del writer
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("rows", [torch.zeros(1, 7), torch.zeros(8), torch.zeros(10**4, 8)])
def test_rows_that_do_not_fit_are_refused(layout: TokenLayout, tmp_path: Path, rows):
    with (
        pytest.raises(ValueError, match="which must be"),
        CheckpointWriter(tmp_path / "x.safetensors", layout) as writer,
    ):
        writer.write(0, rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    zoo: Zoo, layout: TokenLayout, tmp_path: Path, monkeypatch, call: str
):
    tokens = layout.encode(zoo.checkpoint(0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    path, message = tmp_path / "out.safetensors", "out.safetensors could not be written .No space left"
    with pytest.raises(InputError, match=message) as caught, CheckpointWriter(path, layout) as writer:
        writer.write(0, tokens)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_without_preallocation_is_the_same(zoo: Zoo, layout: TokenLayout, tmp_path: Path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    for name in ("a", "b"):
        with CheckpointWriter(tmp_path / name, layout) as writer:
            writer.write(0, layout.encode(zoo.checkpoint(0)))
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_place_that_cannot_be_written_is_one_line(layout: TokenLayout, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "x.safetensors"):
        with pytest.raises(InputError, match="could not be written"):
            CheckpointWriter(path, layout)


def test_tensor_files_are_plain_safetensors(tmp_path: Path):
    specs = {"a": (torch.uint8, (3,)), "b": (torch.float64, (2, 2)), "none": (torch.float32, (0, 4))}
    with TensorFile(tmp_path / "x.safetensors", specs) as file:
        file.write("b", 2, torch.tensor([3.0, 4.0]).double())
        file.write("b", 0, torch.tensor([1.0, 2.0]).double())
        file.write("a", 0, torch.tensor([1, 2, 3], dtype=torch.uint8))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["b"].tolist() == [[1, 2], [3, 4]] and loaded["a"].tolist() == [1, 2, 3]
    assert loaded["none"].shape == (0, 4)
