"""`rpg merge` on files: values known in advance, formats that mix, what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rpg.merging.files import METADATA_KEY, merge_files
from rpg.merging.methods import METHODS, NEED_BASE, Merge, merge_values
from rpg.seeding import make_rng
from tests.rpg.conftest import Run, refused
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.errors import InputError


def network(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    head = torch.randn(4, 3, generator=rng)
    return {
        "head.weight": head,
        "scale": torch.tensor(float(seed)),
        "norm.running_var": torch.rand(3, generator=rng),
        "norm.num_batches_tracked": torch.tensor(10 * seed),
        "half": torch.randn(5, generator=rng).bfloat16(),
        "mask": torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]),
        "ids": torch.arange(3),
        "tied": head,
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two safetensors files, a pickle of a wrapped network, and the base."""
    save_checkpoint(tmp_path / "0.safetensors", network(0))
    save_checkpoint(tmp_path / "1.safetensors", network(1))
    torch.save({"model": {f"module.{name}": value for name, value in network(2).items()}}, tmp_path / "2.pth")
    save_checkpoint(tmp_path / "base.safetensors", network(3))
    return [tmp_path / name for name in ("0.safetensors", "1.safetensors", "2.pth", "base.safetensors")]


@pytest.mark.parametrize("method", METHODS)
def test_files_merge_to_what_their_tensors_do(files: list[Path], tmp_path: Path, method: str) -> None:
    parts = files[:2] if method == "slerp" else files[:3]
    weights = None if method in ("slerp", "model_stock") else [0.5, 0.25, 0.5]
    merge = Merge(method, weights, t=0.25 if method == "slerp" else None, seed=3)
    base = files[3] if method in NEED_BASE else None
    found = Checkpoint.open(merge_files(parts, merge, tmp_path / "out.safetensors", base=base))
    networks, begun = [network(seed) for seed in range(len(parts))], network(3)
    shares, options = merge.settled(len(parts))
    made = found.state_dict()
    assert list(made) == list(begun) and made["tied"] is made["head.weight"]
    for name in ("head.weight", "scale", "half"):
        values = torch.stack([each[name].double().flatten() for each in networks])
        own = None if base is None else begun[name].double().flatten()
        # DARE draws in the precision that the file's dtype is merged in
        expected = merge_values(method, values, own, shares, make_rng(3, name), **options)
        if "dare" not in method:
            tolerance = {"atol": 1e-6, "rtol": 1e-5} if name != "half" else {"atol": 1e-2, "rtol": 1e-2}
            torch.testing.assert_close(made[name].double().flatten(), expected, **tolerance)
        assert (made[name].dtype, made[name].shape) == (begun[name].dtype, begun[name].shape)
    assert made["norm.num_batches_tracked"] == 10 * (len(parts) - 1) and made["norm.running_var"].min() >= 0
    assert torch.equal(made["mask"], begun["mask"]) and torch.equal(made["ids"], torch.arange(3))
    again = merge_files(parts, merge, tmp_path / "again.safetensors", base=base)
    assert again.read_bytes() == found.path.read_bytes()


def test_the_file_says_what_it_is_made_of(files: list[Path], tmp_path: Path) -> None:
    made = merge_files(files[:3], Merge("ties", [1, 2, 3], density=0.5), tmp_path / "out.safetensors", base=files[3])
    with safe_open(made, framework="pt") as opened:
        record = json.loads(opened.metadata()[METADATA_KEY])
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert record == {
        "method": "ties",
        "density": 0.5,
        "parts": [
            {"path": str(file), "sha256": digest, "weight": weight}
            for file, digest, weight in zip(files[:3], digests, (1.0, 2.0, 3.0), strict=False)
        ],
        "base": {"path": str(files[3]), "sha256": digests[3]},
    }


def test_equal_files_merge_to_the_same_bytes_of_values(files: list[Path], tmp_path: Path) -> None:
    made = Checkpoint.open(merge_files([files[1]] * 3, Merge("linear"), tmp_path / "out.safetensors")).state_dict()
    assert all(torch.equal(value, made[name]) for name, value in network(1).items())


def test_ties_of_one_file_alone_are_stored(tmp_path: Path) -> None:
    apart = {**network(1), "tied": network(1)["head.weight"] + 1}
    save_checkpoint(tmp_path / "a.safetensors", network(0))
    save_checkpoint(tmp_path / "b.safetensors", apart)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    found = Checkpoint.open(merge_files(paths, Merge("linear"), tmp_path / "out.safetensors")).state_dict()
    torch.testing.assert_close(found["tied"], found["head.weight"] + 0.5)


BROKEN = {
    "name": ({"more": torch.ones(1)}, "tensor 'more' is missing, but .*other.safetensors has it"),
    "shape": ({"half": torch.ones(6).bfloat16()}, r"tensor 'half' is torch.bfloat16 of shape \[6\], but"),
    "dtype": ({"half": torch.ones(5)}, r"tensor 'half' is torch.float32 of shape \[5\], but torch.bfloat16"),
    "integers": ({"ids": torch.arange(3) + 1}, "tensor 'ids' differs .* values of torch.int64, which are not merged"),
    "nan": ({"scale": torch.tensor(torch.nan)}, "tensor 'scale' differs .* NaN or infinity"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused_and_leaves_nothing(files: list[Path], tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    save_checkpoint(tmp_path / "other.safetensors", {**network(1), **change})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as error:
        merge_files([files[0], tmp_path / "other.safetensors"], Merge("linear"), tmp_path / "out.safetensors")
    assert "\n" not in str(error.value) and sorted(tmp_path.iterdir()) == before


MISTAKES = {
    "--method sum": "linear, slerp",
    "--method ties": "--base",
    "--method linear --base BASE": "--base",
    "--method linear --density 0.5": "--density",
    "--method ties --base BASE --density 0": "--density",
    "--method linear --t 0.5": "--t",
    "--method slerp --t 1.5": "--t",
    "--method slerp --weights 1,2": "--weights",
    "--method model_stock --base BASE --normalize": "--normalize",
    "--method linear --weights 1": "--weights",
    "--method linear --weights 1,-1": "--weights",
    "--method linear --weights a,b": "--weights",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_options_that_a_method_does_not_have(rpg: Run, files: list[Path], tmp_path: Path, line: str) -> None:
    words = line.replace("BASE", str(files[3])).split()
    refused(rpg("merge", *files[:2], *words, "--output", tmp_path / "o.safetensors"), MISTAKES[line])
    assert not (tmp_path / "o.safetensors").exists()


def test_the_command_scores_the_merged_network_beside_its_parts(
    rpg: Run, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judge_of_merges.py").write_text("def scale(weights):\n    return weights['scale'].item()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "out.safetensors"
    words = ["--method", "linear", "--weights", "1,3", "--output", out, "--score", "judge_of_merges:scale"]
    code, text, errors = rpg("merge", files[1], files[2], *words)
    assert code == 0, errors
    last = [line.split()[-1] for line in text.splitlines() if line.split()]  # a long path is folded above its figure
    assert [word for word in last if re.fullmatch(r"[\d.]+", word)] == ["1", "2", "1.75"], text
