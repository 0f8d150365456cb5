from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.zoo import ConditionSpec, Zoo, ZooEntry


def state_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=generator)
    return {
        "w": weight,
        "half": torch.randn(5, generator=generator).bfloat16(),
        "num_batches_tracked": torch.tensor(seed),
        "mask": torch.tensor([True, False]),
        "tied": weight,
    }


def test_append_and_read_back(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path / "zoo", task={"name": "t", "width": 3}, condition=ConditionSpec("binary", 2, ("a", "b")))
    for index in range(4):
        split = "test" if index == 3 else "train"
        zoo.append(
            state_of(index), run=index % 2, step=index, condition=(1, index % 2), metrics={"acc": 0.5}, split=split
        )
    reopened = Zoo.open(tmp_path / "zoo")
    for it in (zoo, reopened):
        assert len(it) == 4 and it.num_runs == 2 and it.task == {"name": "t", "width": 3}
        assert it.condition == ConditionSpec("binary", 2, ("a", "b"))
        assert it.subset("train") == [0, 1, 2] and it.subset("test") == [3] and it.subset("other") == []
        it.verify()
    assert zoo.entries == reopened.entries and zoo.digest() == reopened.digest()
    entry = zoo.entries[1]
    assert (entry.run, entry.step, entry.condition, entry.metrics) == (1, 1, (1.0, 1.0), {"acc": 0.5})
    for index in range(4):
        expected = state_of(index)
        loaded = reopened.state_dict(index)
        assert list(loaded) == list(expected) and all(torch.equal(loaded[name], expected[name]) for name in expected)
        assert loaded["tied"] is loaded["w"]
    assert reopened.checkpoint(2) is reopened.checkpoint(2) is reopened.checkpoint(-2)


def test_manifest_and_description_are_the_documented_format(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path, task=None)
    zoo.append({"w": torch.ones(2, dtype=torch.float16)}, run=0, step=7)
    line = json.loads((tmp_path / "manifest.jsonl").read_text())
    assert {key: line[key] for key in ("file", "run", "step", "condition", "metrics", "split")} == {
        "file": "checkpoints/000000.safetensors",
        "run": 0,
        "step": 7,
        "condition": None,
        "metrics": {},
        "split": "train",
    }
    assert line["size"] == (tmp_path / line["file"]).stat().st_size and len(line["sha256"]) == 64
    assert json.loads((tmp_path / "zoo.json").read_text()) == {
        "format": 1,
        "task": None,
        "condition": None,
        "runs": [],
        "structure": {"ordered": True, "tensors": [{"name": "w", "dtype": "float16", "shape": [2]}], "ties": {}},
    }


def test_a_minimal_manifest_written_by_hand(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    (tmp_path / "zoo.json").write_text('{"format": 1}')
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.safetensors", "run": 0, "step": 0}')  # no newline
    zoo = Zoo.open(tmp_path)
    zoo.verify()
    assert len(zoo.digest()) == 64
    zoo.append({"w": torch.zeros(2)}, run=0, step=1)
    assert len(Zoo.open(tmp_path)) == 2


def test_digest_depends_on_values_and_order(tmp_path: Path) -> None:
    digests = set()
    for index, seeds in enumerate([(0, 1), (1, 0), (0,), (0, 2)]):
        zoo = Zoo.create(tmp_path / str(index))
        for step, seed in enumerate(seeds):
            zoo.append(state_of(seed), run=0, step=step)
        digests.add(zoo.digest())
    assert len(digests) == 4


def test_pickles_and_serves_other_processes(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path)
    zoo.append(state_of(3), run=0, step=0)
    zoo.checkpoint(0).flat("w")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert torch.equal(pool.apply(Zoo.state_dict, (zoo, 0))["w"], state_of(3)["w"])
    assert pickle.loads(pickle.dumps(zoo)).digest() == zoo.digest()


def test_an_unfinished_last_line_is_refused_then_repaired(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path)
    zoo.append(state_of(0), run=0, step=0)
    whole = (tmp_path / "manifest.jsonl").read_bytes()
    (tmp_path / "manifest.jsonl").write_bytes(whole + whole[:40])
    (tmp_path / "checkpoints" / ".000001.safetensors.99.partial").write_bytes(b"half")
    with pytest.raises(InputError, match="line 2 is a line cut in half"):
        Zoo.open(tmp_path)
    assert (tmp_path / "manifest.jsonl").read_bytes() == whole + whole[:40]
    zoo = Zoo.open(tmp_path, repair=True)
    assert (tmp_path / "manifest.jsonl").read_bytes() == whole and len(zoo) == 1
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["000000.safetensors"]
    zoo.append(state_of(1), run=0, step=1)
    Zoo.open(tmp_path).verify()


def test_killed_between_the_first_line_and_the_description(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path)
    empty = (tmp_path / "zoo.json").read_bytes()
    zoo.append(state_of(0), run=0, step=0)
    (tmp_path / "zoo.json").write_bytes(empty)
    zoo = Zoo.open(tmp_path)
    with pytest.raises(InputError, match="tensor 'w'"):
        zoo.append({**state_of(1), "w": torch.ones(2)}, run=0, step=1)
    zoo.append(state_of(1), run=0, step=1)
    zoo.verify()


def test_killed_between_the_file_and_its_line(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path)
    zoo.append(state_of(0), run=0, step=0)
    stranger = tmp_path / "checkpoints" / "000001.safetensors"
    save_checkpoint(stranger, state_of(9))
    before = stranger.read_bytes()
    entry = Zoo.open(tmp_path, repair=True).append(state_of(1), run=0, step=1)
    assert entry.file == "checkpoints/000002.safetensors" and stranger.read_bytes() == before


def test_killed_at_any_moment_the_zoo_opens(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    child = os.fork()
    if child == 0:
        for step in range(1_000_000):
            zoo.append({"w": torch.full((20000,), float(step))}, run=0, step=step)
    time.sleep(0.6)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    zoo = Zoo.open(tmp_path / "zoo", repair=True)
    steps = len(zoo)
    assert [entry.step for entry in zoo.entries] == list(range(steps))
    zoo.append({"w": torch.full((20000,), float(steps))}, run=0, step=steps)
    zoo.verify()


def test_external_files_and_shards(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "outside.safetensors", {"w": torch.ones(2)})
    zoo = Zoo.create(tmp_path / "zoo")
    zoo.extend([ZooEntry(str(tmp_path / "outside.safetensors"), 0, 0, external=True)])
    zoo.extend([ZooEntry("../outside.safetensors", 0, 1, external=True)])
    zoo = Zoo.open(tmp_path / "zoo")
    zoo.verify()
    assert torch.equal(zoo.state_dict(1)["w"], torch.ones(2))


def test_ordered_checkpoints_must_agree_and_sorted_ones_may_mix(tmp_path: Path) -> None:
    import safetensors.torch

    zoo = Zoo.create(tmp_path / "zoo")
    zoo.append({"b": torch.ones(1), "a": torch.ones(1)}, run=0, step=0)
    safetensors.torch.save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "zoo" / "own.safetensors")
    zoo.extend([ZooEntry("own.safetensors", 0, 1)])
    zoo.verify()
    assert list(zoo.checkpoint(0).tensors) == ["b", "a"]


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (ConditionSpec("binary", 3), (0, 1, 1), (0, 1, 2)),
        (ConditionSpec("binary", 3), (0, 1, 1), (0, 1)),
        (ConditionSpec("vector", 2), (0.5, -3), None),
        (ConditionSpec("class", 3), (2,), (3,)),
        (ConditionSpec("class", 3), (0,), (0.5,)),
        (ConditionSpec("text", 2, ("a cat", "a dog")), (1,), (-1,)),
        (None, None, (1,)),
    ],
)
def test_conditions(tmp_path: Path, spec: ConditionSpec | None, good: tuple | None, bad: tuple | None) -> None:
    zoo = Zoo.create(tmp_path, condition=spec)
    zoo.append({"w": torch.ones(2)}, run=0, step=0, condition=good)
    with pytest.raises(InputError, match="condition"):
        zoo.append({"w": torch.ones(2)}, run=0, step=1, condition=bad)
    assert Zoo.open(tmp_path).condition == spec


def test_require_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"zoo\.json names no task"):
        Zoo.create(tmp_path / "a").require_task()
    assert Zoo.create(tmp_path / "b", task={"name": "x"}).require_task() == {"name": "x"}


def test_checkpoint_files_of_a_zoo_are_plain_checkpoints(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path)
    zoo.append(state_of(0), run=0, step=0)
    assert Checkpoint.open(zoo.file(0)).ties == {"tied": "w"}


def test_a_folder_full_of_other_files_becomes_no_zoo(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"is not a zoo, and not empty \(it has thesis.tex\); choose a new folder"):
        Zoo.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_kill_leaves_of_a_new_zoo_and_hidden_files_are_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text("")
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / ".zoo.json.1.partial").write_text("{")
    assert len(Zoo.create(tmp_path)) == 0 and len(Zoo.open(tmp_path)) == 0
    (tmp_path / "zoo.json").unlink()
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="not empty"):
        Zoo.create(tmp_path)
