"""Whatever is wrong with what a user gives: one line that names it, and the zoo's bytes are as they were."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenization.checkpoint.checkpoint import Checkpoint, read_state_dict, save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import ConditionSpec, Zoo, ZooEntry


def good(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv": torch.randn(4, 3, generator=generator),
        "norm": torch.randn(5, generator=generator).half(),
        "count": torch.tensor(seed),
    }


def make_zoo(path: Path) -> Zoo:
    zoo = Zoo.create(path)
    for step in range(2):
        zoo.append(good(step), run=0, step=step)
    return zoo


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def fails(action: Callable[[], Any], zoo: Path, *expected: str) -> None:
    """The action raises an InputError of one line with every expected text, and changes nothing in the zoo."""
    before = snapshot(zoo)
    with pytest.raises(InputError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for part in expected:
        assert part in text, text
    assert snapshot(zoo) == before


# Bytes of one safetensors file


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start: int, stop: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


VALID = {"conv": tensor(0, 8, [2]), "norm": tensor(8, 12, [1])}

FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is empty"),
    "shorter than the length field": (b"\x10\0\0", "fewer than its header announces"),
    "truncated header": (raw(VALID, bytes(12))[:60], "fewer than its header announces"),
    "truncated data": (raw(VALID, bytes(9)), "tensor 'norm'"),
    "header length too large": (raw(VALID, bytes(12), length=10**6), "fewer than its header announces"),
    "header length absurd": (raw(VALID, bytes(12), length=2**63), "fewer than its header announces"),
    "header length too small": (raw(VALID, bytes(12), length=20), "unreadable"),
    "header length one off": (raw(VALID, bytes(12), length=len(json.dumps(VALID)) - 1), "unreadable"),
    "header no JSON": (raw(b"no JSON at all"), "unreadable"),
    "header no UTF-8": (raw(b'{"\xff":1}'), "unreadable"),
    "header a list": (raw([1, 2]), "unreadable"),
    "header deeply nested": (raw(b"[" * 100_000), "unreadable"),
    "overlapping offsets": (raw({"a": tensor(0, 8, [2]), "conv": tensor(4, 12, [2])}, bytes(12)), "tensor 'conv'"),
    "hole between tensors": (raw({"a": tensor(0, 4, [1]), "conv": tensor(8, 12, [1])}, bytes(12)), "tensor 'conv'"),
    "bytes after the last tensor": (raw(VALID, bytes(20)), "unreadable"),
    "offsets reversed": (raw({"conv": tensor(8, 0, [2])}, bytes(8)), "tensor 'conv'"),
    "offsets negative": (raw({"conv": tensor(-4, 4, [2])}, bytes(8)), "tensor 'conv' is said to lie in bytes -4 to 4"),
    "offsets missing": (raw({"conv": {"dtype": "F32", "shape": [2]}}, bytes(8)), "unreadable"),
    "absurd shape": (raw({"conv": tensor(0, 8, [2**40, 2**40])}, bytes(8)), "tensor 'conv'"),
    "overflowing shape": (raw({"conv": tensor(0, 8, [2**63, 2])}, bytes(8)), "tensor 'conv'"),
    "negative shape": (raw({"conv": tensor(0, 8, [-2])}, bytes(8)), "conv"),
    "shape of another size": (raw({"conv": tensor(0, 8, [3])}, bytes(8)), "tensor 'conv'"),
    "shape of fractions": (raw({"conv": tensor(0, 8, [0.5])}, bytes(8)), "tensor 'conv'"),
    "unknown dtype": (raw({"conv": tensor(0, 8, [2], "F33")}, bytes(8)), "unreadable"),
    "unsupported dtype": (raw({"conv": tensor(0, 4, [8], "F4")}, bytes(4)), "tensor 'conv' has dtype F4"),
    "tensor twice": (
        raw(b'{"conv":%s,"conv":%s}' % ((json.dumps(tensor(0, 8, [2])).encode(),) * 2), bytes(8)),
        "'conv' twice in the header",
    ),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}, **VALID}, bytes(12)), "unreadable"),
    "no tensors": (raw({}), "no tensor"),
    "order no JSON": (raw({"__metadata__": {"rpg.order": "["}, **VALID}, bytes(12)), "rpg.order"),
    "order no list": (raw({"__metadata__": {"rpg.order": "3"}, **VALID}, bytes(12)), "rpg.order"),
    "order misses one": (raw({"__metadata__": {"rpg.order": '["conv"]'}, **VALID}, bytes(12)), "tensor 'norm'"),
    "order has one more": (
        raw({"__metadata__": {"rpg.order": '["conv", "norm", "x"]'}, **VALID}, bytes(12)),
        "tensor 'x'",
    ),
    "order twice": (raw({"__metadata__": {"rpg.order": '["conv", "norm", "conv"]'}, **VALID}, bytes(12)), "'conv'"),
    "tie to nothing": (raw({"__metadata__": {"rpg.ties": '{"a": "zz"}'}, **VALID}, bytes(12)), "tensor 'a'"),
    "tie of a stored tensor": (raw({"__metadata__": {"rpg.ties": '{"conv": "norm"}'}, **VALID}, bytes(12)), "'conv'"),
    "ties no object": (raw({"__metadata__": {"rpg.ties": "[]"}, **VALID}, bytes(12)), "rpg.ties"),
    "a pickle by another name": (pickle.dumps({"conv": 1}), "is a pickle, which cannot be read in parts"),
    "a web page": (b"<!DOCTYPE html><html>404: not found</html>", "is a web page"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "is a Git LFS pointer",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_safetensors(tmp_path: Path, case: str) -> None:
    content, expected = FILES[case]
    zoo = make_zoo(tmp_path / "zoo").path
    bad = tmp_path / "mine" / "bad.safetensors"
    bad.parent.mkdir()
    bad.write_bytes(content)
    fails(lambda: Checkpoint.open(bad), zoo, str(bad), expected)
    fails(lambda: read_state_dict(bad), zoo, str(bad))
    fails(lambda: collect_from(bad, zoo), zoo, str(bad))
    # The same in the place of a checkpoint that the zoo lists.
    (zoo / "checkpoints" / "000001.safetensors").write_bytes(content)
    fails(lambda: Zoo.open(zoo).verify(), zoo, "000001.safetensors")


# State dicts that are not checkpoints of the zoo


def replaced(**tensors: Tensor) -> dict[str, Tensor]:
    return {**good(), **tensors}


def nan_at(index: int, value: float = float("nan")) -> Tensor:
    result = torch.ones(4, 3)
    result.view(-1)[index] = value
    return result


STATES: dict[str, tuple[Callable[[], Any], str]] = {
    "missing tensor": (lambda: {k: v for k, v in good().items() if k != "norm"}, "'norm' is missing"),
    "extra tensor": (lambda: replaced(more=torch.ones(2)), "'more' is not in the zoo's structure"),
    "renamed tensor": (lambda: {f"x.{k}": v for k, v in good().items()}, "'conv' is missing"),
    "misshapen tensor": (lambda: replaced(conv=torch.ones(3, 4)), "'conv' has shape [3, 4], but the zoo's has [4, 3]"),
    "flattened tensor": (lambda: replaced(conv=torch.ones(12)), "'conv' has shape [12], but the zoo's has [4, 3]"),
    "reordered tensors": (lambda: dict(reversed(good(7).items())), "'count' is at place 0, where the zoo has 'conv'"),
    "another dtype": (
        lambda: replaced(conv=torch.ones(4, 3).half()),
        "'conv' has dtype float16, but the zoo's has float32",
    ),
    "another integer dtype": (lambda: replaced(count=torch.tensor(1, dtype=torch.int32)), "'count' has dtype int32"),
    "broken tie": (lambda: (lambda s: {**s, "norm": s["conv"]})(good()), "'norm' has shape [4, 3]"),
    "NaN": (lambda: replaced(conv=nan_at(7)), "'conv' has NaN or infinity (1 of"),
    "infinity": (lambda: replaced(conv=nan_at(0, float("inf"))), "'conv' has NaN or infinity"),
    "negative infinity": (lambda: replaced(conv=nan_at(11, float("-inf"))), "'conv' has NaN or infinity"),
    "NaN in halves": (
        lambda: replaced(norm=torch.full((5,), float("nan")).half()),
        "'norm' has NaN or infinity (5 of",
    ),
    "sparse tensor": (lambda: replaced(conv=torch.ones(4, 3).to_sparse()), "'conv' is a sparse tensor"),
    "sparse rows": (lambda: replaced(conv=torch.ones(4, 3).to_sparse_csr()), "'conv' is a sparse tensor"),
    "quantised tensor": (
        lambda: replaced(conv=torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8)),
        "'conv' is a quantised tensor",
    ),
    "tensor without data": (lambda: replaced(conv=torch.ones(4, 3, device="meta")), "'conv' is a tensor without"),
    "zero-size tensor": (lambda: replaced(conv=torch.ones(0, 3)), "'conv'"),
    "no tensor but a number": (lambda: replaced(count=3), "'count' is of type int"),  # type: ignore[arg-type]
    "no text for a name": (lambda: {1: torch.ones(1)}, "entry 1"),
    "empty": (dict, "no tensor"),
}


@pytest.mark.parametrize("case", STATES)
def test_state_dicts_that_do_not_belong(tmp_path: Path, case: str) -> None:
    make, expected = STATES[case]
    zoo = make_zoo(tmp_path / "zoo")
    fails(lambda: zoo.append(make(), run=0, step=2), zoo.path, "000002.safetensors", expected)
    assert len(zoo) == len(Zoo.open(zoo.path)) == 2
    # The same state dict as a user's file.
    source = tmp_path / "mine"
    source.mkdir()
    ending = ".pth"
    if case in ("missing tensor", "misshapen tensor", "another dtype", "NaN", "zero-size tensor", "extra tensor"):
        ending = ".safetensors"
        save_checkpoint(source / "bad.safetensors", make())
    else:
        torch.save(make(), source / "bad.pth")
    if case == "reordered tensors":  # a pickle is converted, and brought into the zoo's order
        assert len(collect_from(source, zoo.path)) == 3
    else:
        fails(lambda: collect_from(source, zoo.path), zoo.path, f"bad{ending}", re.split(" (?:is|has) ", expected)[0])
    zoo = Zoo.open(zoo.path)
    zoo.append(good(5), run=0, step=5)
    zoo.verify()


def test_the_first_checkpoint_is_checked_as_well(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path)
    for bad in (torch.ones(0), torch.tensor([float("nan")])):
        fails(lambda bad=bad: zoo.append({"w": bad}, run=0, step=0), tmp_path, "tensor 'w'")


def test_other_dtypes_cannot_be_stored(tmp_path: Path) -> None:
    state = {"w": torch.ones(2, dtype=torch.complex128)}
    fails(lambda: save_checkpoint(tmp_path / "a.safetensors", state), tmp_path, "tensor 'w' has dtype torch.complex128")


# Pickles


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_that_holds_code_is_not_run(tmp_path: Path, old_format: bool) -> None:
    zoo = make_zoo(tmp_path / "zoo").path
    bad = tmp_path / "bad.pth"
    content = {"state_dict": good(), "code": Bomb(tmp_path / "trace")}
    torch.save(content, bad, _use_new_zipfile_serialization=not old_format)
    fails(lambda: read_state_dict(bad), zoo, str(bad), "a pickle that holds code", "mkdir")
    fails(lambda: collect_from(bad, zoo), zoo, str(bad))
    bad.write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    fails(lambda: read_state_dict(bad), zoo, str(bad))
    assert not (tmp_path / "trace").exists()


def test_a_pickled_network_and_other_pickles(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo").path
    bad = tmp_path / "bad.pt"
    torch.save(nn.Linear(2, 2), bad)
    fails(lambda: read_state_dict(bad), zoo, str(bad), "torch.nn.modules.linear.Linear")
    for content in (
        [torch.ones(1)],
        torch.ones(2),
        {"epoch": 3},
        {"state_dict": {}},
        {},
    ):
        torch.save(content, bad)
        fails(lambda: read_state_dict(bad), zoo, str(bad))
    fails(lambda: Checkpoint.open(bad), zoo, str(bad), "a pickle", "rpg collect --from")
    torch.save(good(), bad)
    bad.write_bytes(bad.read_bytes()[:-200])
    fails(lambda: read_state_dict(bad), zoo, str(bad), "unreadable")
    for content, what in (
        (b"", "is empty"),
        (b"PK\3\4", "unreadable"),
        (b"\x80\2}", "unreadable"),
        (b"text", "unreadable"),
    ):
        bad.write_bytes(content)
        fails(lambda: read_state_dict(bad), zoo, str(bad), what)


# Shards


def sharded(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    state = good()
    save_checkpoint(folder / "one.safetensors", {"conv": state["conv"]})
    save_checkpoint(folder / "two.safetensors", {"norm": state["norm"], "count": state["count"]})
    weight_map = {"conv": "one.safetensors", "norm": "two.safetensors", "count": "two.safetensors"}
    index = {"metadata": {"total_size": 66}, "weight_map": {**weight_map, **changes}}
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


SHARDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing shard": (
        lambda f: unlinked(sharded(f), "two.safetensors"),
        "tensor 'norm' is in the shard two.safetensors, which is not",
    ),
    "shard never there": (
        lambda f: sharded(f, conv="three.safetensors"),
        "tensor 'conv' is in the shard three.safetensors, which is not",
    ),
    "tensor not in its shard": (lambda f: sharded(f, more="two.safetensors"), "tensor 'more' is missing"),
    "tensor not in the index": (lambda f: sharded(f, norm=None), "tensor 'norm' is not listed"),
    "shard out of the folder": (lambda f: sharded(f, conv="../one.safetensors"), "'../one.safetensors'"),
    "shard by absolute path": (lambda f: sharded(f, conv="/etc/passwd"), "'/etc/passwd'"),
    "shard no text": (lambda f: sharded(f, conv=3), "no weight_map"),
    "broken shard": (lambda f: cut(sharded(f) / "one.safetensors").parent, "one.safetensors: tensor 'conv'"),
    "broken index": (
        lambda f: cut(sharded(f) / "model.safetensors.index.json").parent,
        "index.json cannot be read as JSON",
    ),
    "no index but shards": (lambda f: unlinked(sharded(f), "model.safetensors.index.json"), "2 safetensors"),
}


def unlinked(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-5])
    return path


@pytest.mark.parametrize("case", SHARDS)
def test_shards(tmp_path: Path, case: str) -> None:
    make, expected = SHARDS[case]
    zoo = make_zoo(tmp_path / "zoo").path
    folder = make(tmp_path / "mine")
    fails(lambda: Checkpoint.open(folder), zoo, expected)


# The zoo's own files


def edited(name: str, edit: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda zoo: (zoo / name).write_text(edit((zoo / name).read_text())) and None


def with_line(**fields: Any) -> Callable[[Path], None]:
    line = {"file": "checkpoints/000001.safetensors", "run": 0, "step": 9, **fields}
    line = {key: value for key, value in line.items() if value != "absent"}
    return edited("manifest.jsonl", lambda text: text.splitlines()[0] + "\n" + json.dumps(line) + "\n")


def link_out(zoo: Path) -> None:
    outside = zoo.parent / "outside.safetensors"
    save_checkpoint(outside, good(1))
    (zoo / "checkpoints" / "000001.safetensors").unlink()
    (zoo / "checkpoints" / "000001.safetensors").symlink_to(outside)


def folder_linked_out(zoo: Path) -> None:
    (zoo / "checkpoints").rename(zoo.parent / "elsewhere")
    (zoo / "checkpoints").symlink_to(zoo.parent / "elsewhere")


def linked_inside_an_entry(zoo: Path) -> None:
    save_checkpoint(zoo.parent / "outside.safetensors", good(1))
    (zoo / "sub").mkdir()
    (zoo / "sub" / "model.safetensors").symlink_to(zoo.parent / "outside.safetensors")
    with_line(file="sub")(zoo)


def directory_for(name: str) -> Callable[[Path], None]:
    def change(zoo: Path) -> None:
        (zoo / name).unlink()
        (zoo / name).mkdir()

    return change


def exchanged(zoo: Path) -> None:
    save_checkpoint(zoo / "checkpoints" / "000001.safetensors", good(77))


ZOOS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "zoo does not exist"),
    "no zoo.json": (lambda zoo: (zoo / "zoo.json").unlink(), "has no zoo.json"),
    "no manifest": (lambda zoo: (zoo / "manifest.jsonl").unlink(), "manifest.jsonl is unreadable"),
    "empty zoo": (edited("manifest.jsonl", lambda text: ""), "an empty zoo"),
    "zoo.json cut": (edited("zoo.json", lambda text: text[:50]), "zoo.json cannot be read as JSON"),
    "zoo.json a list": (edited("zoo.json", lambda text: "[]"), "zoo.json is not a JSON object"),
    "another format": (
        edited("zoo.json", lambda text: text.replace('"format": 1', '"format": 9')),
        "zoo.json has format 9",
    ),
    "malformed structure": (edited("zoo.json", lambda text: text.replace('"dtype"', '"d"')), "zoo.json: structure"),
    "malformed task": (edited("zoo.json", lambda text: text.replace('"task": null', '"task": 3')), "zoo.json: task"),
    "malformed runs": (edited("zoo.json", lambda text: text.replace('"runs": []', '"runs": 3')), "zoo.json: runs"),
    "malformed condition": (
        edited("zoo.json", lambda text: text.replace('"condition": null', '"condition": 3')),
        "zoo.json: condition",
    ),
    "unknown kind of condition": (
        edited("zoo.json", lambda t: t.replace('"condition": null', '"condition": {"kind": "colour", "size": 3}')),
        "condition: kind is 'colour'",
    ),
    "last line cut in half": (edited("manifest.jsonl", lambda text: text[:-30]), "line 2 is a line cut in half"),
    "first line cut in half": (
        edited("manifest.jsonl", lambda text: text[:30] + "\n" + text.splitlines()[1] + "\n"),
        "line 1 is not complete JSON",
    ),
    "two lines run together": (edited("manifest.jsonl", lambda text: text.replace("\n", "", 1)), "line 1"),
    "duplicate line": (edited("manifest.jsonl", lambda text: text + text.splitlines()[1] + "\n"), "line 3"),
    "line no object": (edited("manifest.jsonl", lambda text: text + "3\n"), "line 3"),
    "line of zeros": (edited("manifest.jsonl", lambda text: text + "\0" * 40 + "\n"), "line 3"),
    "unknown field": (with_line(colour=1), "field 'colour'"),
    "no file": (with_line(file="absent"), "field 'file'"),
    "empty file name": (with_line(file=""), "field 'file'"),
    "no run": (with_line(run="absent"), "field 'run'"),
    "negative run": (with_line(run=-1), "field 'run' is -1"),
    "step no number": (with_line(step="x"), "field 'step' is 'x'"),
    "metrics no numbers": (with_line(metrics={"acc": "high"}), "field 'metrics'"),
    "metrics NaN": (with_line(metrics={"acc": float("nan")}), "field 'metrics'"),
    "condition without a kind": (with_line(condition=[1]), "has a condition, but the zoo has none"),
    "condition no list": (with_line(condition="cat"), "field 'condition'"),
    "split empty": (with_line(split=""), "field 'split'"),
    "external no boolean": (with_line(external="yes"), "field 'external'"),
    "missing checkpoint": (
        with_line(file="checkpoints/000009.safetensors"),
        "'checkpoints/000009.safetensors' does not exist",
    ),
    "external file gone": (with_line(file="/nowhere/a.safetensors", external=True), "'/nowhere/a.safetensors'"),
    "path out of the zoo": (with_line(file="../outside.safetensors"), " is a path out of the zoo"),
    "absolute path": (with_line(file="/etc/passwd"), "'/etc/passwd' is a path out of the zoo"),
    "symbolic link out of the zoo": (link_out, "000001.safetensors' is a symbolic link out of the zoo"),
    "folder linked out of the zoo": (folder_linked_out, " is a path out of the zoo"),
    "link out of the zoo in an entry": (linked_inside_an_entry, "model.safetensors is a link out of the zoo"),
    "broken link": (
        lambda zoo: ((zoo / "loose").symlink_to("nothing"), with_line(file="loose")(zoo)),
        "'loose' does not exist",
    ),
    "checkpoint exchanged": (exchanged, "000001.safetensors has digest"),
    "checkpoint cut": (lambda zoo: cut(zoo / "checkpoints" / "000001.safetensors"), "000001.safetensors"),
    "wrong size": (with_line(size=3), "but had 3 as collected"),
    "folder for a checkpoint": (
        directory_for("checkpoints/000001.safetensors"),
        "000001.safetensors has no safetensors",
    ),
    "folder for the manifest": (directory_for("manifest.jsonl"), "manifest.jsonl is unreadable"),
    "folder for zoo.json": (directory_for("zoo.json"), "no zoo.json"),
}


@pytest.mark.parametrize("case", ZOOS)
def test_broken_zoos(tmp_path: Path, case: str) -> None:
    change, expected = ZOOS[case]
    zoo = make_zoo(tmp_path / "zoo").path
    change(zoo)
    fails(lambda: Zoo.open(zoo).verify(), zoo, expected)


def test_a_zoo_where_there_is_one_or_where_a_file_is(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    fails(lambda: Zoo.create(zoo.path), zoo.path, "is a zoo already")
    (tmp_path / "file").write_text("")
    fails(lambda: Zoo.create(tmp_path / "file"), zoo.path, "file is a file")
    fails(lambda: Zoo.create(tmp_path / "file" / "sub"), zoo.path, "could not be written")
    for action in (zoo.checkpoint, zoo.state_dict):
        fails(lambda action=action: action(2), zoo.path, "has no entry 2")
    fails(lambda: zoo.checkpoint(0).flat("nothing"), zoo.path, "tensor 'nothing'")


def test_two_processes_at_once(tmp_path: Path) -> None:
    make_zoo(tmp_path)
    first, second = Zoo.open(tmp_path), Zoo.open(tmp_path)
    first.append(good(2), run=0, step=2)
    fails(lambda: second.append(good(3), run=0, step=3), tmp_path, "manifest.jsonl", "one process at a time")
    assert len(second) == 2
    fails(lambda: first.extend([ZooEntry("checkpoints/000001.safetensors", 0, 1)]), tmp_path, "lists already")


BAD_ENTRIES: list[dict[str, Any]] = [
    {"run": -1, "step": 0},
    {"step": 0.5, "run": 0},
    {"run": True, "step": 0},
    {"split": "", "run": 0, "step": 0},
    {"metrics": {"loss": float("nan")}, "run": 0, "step": 0},
    {"condition": (1.0, float("inf")), "run": 0, "step": 0},
]


@pytest.mark.parametrize("fields", BAD_ENTRIES, ids=str)
def test_bad_labels(tmp_path: Path, fields: dict[str, Any]) -> None:
    zoo = make_zoo(tmp_path)
    fails(lambda: zoo.append(good(), **fields), tmp_path, "000002.safetensors", f"field {next(iter(fields))!r}")


@pytest.mark.parametrize(
    "arguments", [("binary", 0), ("colour", 2), ("binary", 2, ("a",)), ("class", 2, ("a", "a")), ("text", 2)], ids=str
)
def test_bad_conditions(arguments: tuple) -> None:
    with pytest.raises(InputError, match="condition"):
        ConditionSpec(*arguments)


# Tables, patterns, sources

SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing there": ({"source": "nowhere"}, "nowhere does not exist"),
    "a glob without matches": ({"source": "mine/*.pth"}, "*.pth does not exist"),
    "a folder without checkpoints": ({"source": "empty"}, "empty has no checkpoint"),
    "a text file": ({"source": "t.csv"}, "t.csv"),
    "pattern no expression": ({"pattern": "(?P<run"}, "pattern: '"),
    "pattern without groups": ({"pattern": "a"}, "pattern: '"),
    "pattern does not match": ({"pattern": "(?P<run>z+)"}, "a.safetensors does not match"),
    "pattern step no number": ({"pattern": r"(?P<step>\w)\.safetensors"}, "step is 'a'; write a finite number"),
    "no table": ({"table": "nowhere.csv"}, "nowhere.csv is an unreadable table"),
    "table of another ending": ({"table": "t.txt"}, "the suffix '.txt'"),
    "empty table": ({"csv": "file,run\n"}, "t.csv has no rows"),
    "table without files": ({"csv": "name\na.safetensors\n"}, "line 2 has no file"),
    "table with a missing file": ({"csv": "file\nz.safetensors\n"}, "line 2: file 'z.safetensors'"),
    "table with a file twice": ({"csv": "file\na.safetensors\na.safetensors\n"}, "line 3: file"),
    "table with a short row": ({"csv": "file,run\na.safetensors\n"}, "line 2 has another number of fields"),
    "table with a long row": ({"csv": "file,run\na.safetensors,1,2\n"}, "line 2 has another number of fields"),
    "table with a bad step": ({"csv": "file,step\na.safetensors,-1\n"}, "line 2: step"),
    "table with a half step": ({"csv": "file,step\na.safetensors,1.5\n"}, "line 2: step"),
    "table with a text metric": ({"csv": "file,note\na.safetensors,fine\n"}, "line 2: note is 'fine'"),
    "table with a NaN metric": ({"csv": "file,loss\na.safetensors,nan\n"}, "line 2: loss is 'nan'"),
    "conditions of two lengths": (
        {"csv": "file,condition\na.safetensors,1 0\nb.safetensors,1 0 1\n"},
        "line 3: condition has 3 numbers, but 2",
    ),
    "a condition missing": (
        {"csv": "file,condition\na.safetensors,1 0\nb.safetensors,\n"},
        "line 3: condition is missing",
    ),
    "conditions of two kinds": ({"csv": "file,condition\na.safetensors,1\nb.safetensors,cat\n"}, "line 3: condition"),
    "a condition half a number": ({"csv": "file,condition\na.safetensors,1 x\n"}, "line 2: condition is 'x'"),
    "a binary condition of 2": (
        {"csv": "file,condition\na.safetensors,1 2\n", "condition": "binary"},
        "line 2: condition",
    ),
    "a condition for a zoo without": (
        {"csv": "file,condition\na.safetensors,1\n", "zoo": "old"},
        "line 2 has a condition",
    ),
    "a class nobody knows": (
        {"csv": "file,condition\na.safetensors,cow\n", "condition": ConditionSpec("class", 1, ("cat",))},
        "line 2: condition is 'cow', which the zoo does not know; write one of cat",
    ),
    "no condition of the kind": ({"condition": "class"}, "condition is missing"),
    "JSONL cut": ({"jsonl": '{"file": "a.safetensors"}\n{"file": "b.s'}, "line 2 is not complete JSON"),
    "JSONL no object": ({"jsonl": "3\n"}, "line 1 is of type int"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    arguments, expected = SOURCES[case]
    arguments = dict(arguments)
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "empty"):
        Path(name).mkdir()
    for seed, name in enumerate("ab"):
        save_checkpoint(f"mine/{name}.safetensors", good(seed))
    zoo = make_zoo(tmp_path / "old").path
    for kind in ("csv", "jsonl"):
        Path(f"t.{kind}").write_text(arguments.pop(kind, "x"))
        if kind in SOURCES[case][0]:
            arguments["table"] = f"t.{kind}"
    Path("t.txt").write_text("file\na.safetensors\n")
    target = tmp_path / arguments.pop("zoo", "new")
    fails(lambda: collect_from(arguments.pop("source", "mine"), target, **arguments), zoo, expected)
    assert not (tmp_path / "new").exists()


# Disks


def in_child(action: Callable[[], None]) -> None:
    """Run in a forked process, so that its limits end with it; a failure there fails here."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def limit_file_size(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.parametrize("limit", [0, 40, 3000])
def test_disk_full_while_writing(tmp_path: Path, limit: int) -> None:
    big = {"w": torch.ones(2000)}
    zoo = Zoo.create(tmp_path / "zoo")
    zoo.append(big, run=0, step=0)
    path = tmp_path / "alone" / "a.safetensors"
    path.parent.mkdir()
    save_checkpoint(path, {"w": torch.zeros(2)})

    def act() -> None:
        limit_file_size(limit)
        fails(lambda: save_checkpoint(path, big), path.parent, str(path), "could not be written")
        fails(lambda: zoo.append(big, run=0, step=1), zoo.path, "000001.safetensors could not be written")

    in_child(act)
    zoo.append(big, run=0, step=1)
    Zoo.open(zoo.path).verify()


@pytest.mark.parametrize("first", [True, False])
def test_disk_full_at_the_manifest_or_the_description(tmp_path: Path, first: bool) -> None:
    # Small values, a long name: the checkpoint fits where the manifest's next line or zoo.json does not.
    zoo = Zoo.create(tmp_path)
    state = {"w": torch.ones(1)}
    metrics = {f"metric{i}": 0.5 for i in range(200)}
    if not first:
        zoo.append(state, run=0, step=0, metrics=metrics)

    def act() -> None:
        limit_file_size(1000 if first else (tmp_path / "manifest.jsonl").stat().st_size + 500)
        fails(
            lambda: zoo.append(state, run=0, step=1, metrics=metrics), tmp_path, "manifest.jsonl could not be written"
        )
        assert len(zoo) == (0 if first else 1)

    in_child(act)
    zoo.append(state, run=0, step=1, metrics=metrics)
    Zoo.open(tmp_path).verify()


def test_disk_full_at_the_first_description(tmp_path: Path) -> None:
    # Tensors enough that zoo.json, and not the file of 1-byte values, exceeds the limit.
    zoo = Zoo.create(tmp_path)
    zoo.path.joinpath("checkpoints").mkdir()
    state = {f"{i}": torch.ones(1, dtype=torch.bool) for i in range(100)}

    def act() -> None:
        limit_file_size(7900)
        fails(lambda: zoo.append(state, run=0, step=0), tmp_path, "zoo.json could not be written")
        assert len(zoo) == 0

    in_child(act)
    zoo.append(state, run=0, step=0)
    Zoo.open(tmp_path).verify()


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo").path
    (tmp_path / "a.safetensors").mkdir()
    fails(lambda: Checkpoint.open(tmp_path / "a.safetensors"), zoo, "a.safetensors has no safetensors file")
    fails(lambda: save_checkpoint(tmp_path / "a.safetensors", good()), zoo, "a.safetensors could not be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "zoo"]
    fails(lambda: save_checkpoint(tmp_path / "no" / "a.safetensors", good()), zoo, "could not be written")
    fails(lambda: save_checkpoint(tmp_path / "a.pth", good()), zoo, "the suffix '.pth'")


def test_what_is_no_file(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo").path
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert stat.S_ISFIFO((tmp_path / "pipe.safetensors").stat().st_mode)
    fails(lambda: Checkpoint.open(tmp_path / "pipe.safetensors"), zoo, "neither a file nor a folder")
    fails(lambda: collect_from(tmp_path / "pipe.safetensors", tmp_path / "new"), zoo, "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    fails(lambda: Checkpoint.open(tmp_path / "loop.safetensors"), zoo, "loop.safetensors")
    (tmp_path / "gone.safetensors").symlink_to("nothing")
    fails(lambda: Checkpoint.open(tmp_path / "gone.safetensors"), zoo, "a link to nothing")
    fails(lambda: Checkpoint.open(tmp_path / "nowhere"), zoo, "nowhere does not exist")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to become another user")
def test_an_unreadable_file(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    file = zoo.file(1)
    pickled = tmp_path / "a.pth"
    torch.save(good(), pickled)
    for folder in [tmp_path, *tmp_path.parents]:  # others must be able to come as far as the files
        if {Path(tempfile.gettempdir()), Path("/dev/shm")} & set(folder.parents):
            folder.chmod(0o755)
    for path in (file, pickled):
        path.chmod(0o000)

    def act() -> None:
        os.setuid(65534)
        for action, name in [
            (lambda: Zoo.open(zoo.path).verify(), str(file)),
            (lambda: read_state_dict(pickled), str(pickled)),
            (lambda: Zoo.create(zoo.path / "new"), "new"),
        ]:
            with pytest.raises(InputError, match="Permission denied") as error:
                action()
            assert name in str(error.value) and "\n" not in str(error.value)

    in_child(act)
