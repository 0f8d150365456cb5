"""A user's own files from `rpg collect --from` to networks: what is found, said and counted; proposals that train."""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from rpg.evaluation.report import Report
from rpg.evaluation.span import ZooSpan
from tests.rpg.conftest import Run, refused
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.zoo.zoo import Zoo


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def state(seed: int = 0, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value.clone() for name, value in network(seed).state_dict().items()}


def save(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def averaged(seed: int) -> dict[str, Tensor]:
    made = torch.optim.swa_utils.AveragedModel(network(seed))
    made.update_parameters(network(seed))
    return made.state_dict()


def half(folder: Path, seed: int) -> None:
    if seed % 2:
        safetensors.torch.save_file(state(seed, "_orig_mod."), folder / f"run{seed}.safetensors")
    else:
        save(folder / f"run{seed}.pth", state(seed))


SITUATIONS: dict[str, Callable[[Path, int], None]] = {
    "a whole training state": lambda folder, seed: save(
        folder / f"seed{seed}.th",
        {"state_dict": state(seed, "module."), "best": np.float64(0.9), "history": collections.defaultdict(list)},
    ),
    "averaged": lambda folder, seed: save(
        folder / f"run{seed}_epoch5.pth", {"model": state(seed + 90), "model_ema": averaged(seed), "epoch": seed}
    ),
    "half in each format": half,
    "steps of two runs": lambda folder, seed: save(folder / f"run{seed % 2}_step{seed}.pkl", state(seed)),
    "steps of one run": lambda folder, seed: save(folder / f"step{seed}.model", state(seed)),
    "without an ending": lambda folder, seed: save(
        folder / f"tune_{seed}" / "checkpoint_000050", {"weights": state(seed)}
    ),
}


@pytest.mark.parametrize("case", SITUATIONS)
def test_what_is_collected_trains_as_proposed_and_loads(
    rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for seed in range(5):
        SITUATIONS[case](Path("mine"), seed)
    for command in (
        ("collect", "--from", "mine", "--zoo", "zoo"),
        ("inspect", "zoo", "--verify", "--set", "train.steps=20", "--write-config", "c.yaml"),
        ("train", "c.yaml"),
        ("generate", "runs/zoo", "--num", "2", "--output", "new"),
    ):
        code, out, err = rpg(*command)
        assert code == 0, f"{command}: {out}{err}"
    assert "steps: 20" in Path("c.yaml").read_text()
    for path in sorted(Path("new").glob("*.safetensors")):
        network().load_state_dict(safetensors.torch.load_file(path))
    zoo, layers = Zoo.open("zoo"), [name for name in state() if "num_batches" not in name]
    span = ZooSpan([zoo.checkpoint(index) for index in range(5)], [name for name in layers if "running" not in name])
    made = span.project(Checkpoint.open(path).state_dict() for path in sorted(Path("new").glob("*.safetensors")))
    assert bool((span.distances(made).amin(1) > 0.05 * span.unit()).all()) or "is a copy of" in out


def test_several_paths_behind_from(rpg: Run, tmp_path: Path) -> None:
    for seed in range(3):
        save(tmp_path / f"net{seed}.pth", state(seed))
    files = [tmp_path / f"net{seed}.pth" for seed in range(3)]
    assert rpg("collect", "--from", *files, "--zoo", tmp_path / "zoo")[0] == 0
    assert len(Zoo.open(tmp_path / "zoo")) == 3
    assert rpg("collect", "--zoo", tmp_path / "b", "--from", files[0], "--from", files[1])[0] == 0
    assert len(Zoo.open(tmp_path / "b")) == 2
    refused(rpg("collect", files[0], files[1]), "takes one CONFIG", "--from")


def test_a_network_under_two_names_is_counted_once(rpg: Run, tmp_path: Path) -> None:
    for run in range(1, 5):
        for name in ("best", "last"):
            save(tmp_path / "runs" / f"exp{run}" / "weights" / f"{name}.pt", {"model": state(run), "name": name})
    code, out, _ = rpg("collect", "--from", tmp_path / "runs", "--zoo", tmp_path / "zoo")
    assert code == 0 and "counted once" in out and "4 checkpoints of 4 run(s)" in out
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.runs == ["1", "2", "3", "4"]
    code, out, _ = rpg("collect", "--from", tmp_path / "runs", "--zoo", tmp_path / "zoo")
    assert code == 0 and len(Zoo.open(tmp_path / "zoo")) == 4
    pattern = r"exp(?P<run>\d+)/weights/(best|last)"
    code, out, _ = rpg("collect", "--from", tmp_path / "runs", "--pattern", pattern, "--zoo", tmp_path / "kept")
    assert code == 0 and "kept, as table or pattern name both" in out
    kept = Zoo.open(tmp_path / "kept")
    names = ["0.weight", "3.weight"]
    once = ZooSpan([zoo.checkpoint(index) for index in range(4)], names).unit()
    assert once > 0 and len(kept) == 8
    assert ZooSpan([kept.checkpoint(index) for index in range(8)], names).unit() == pytest.approx(once)


def test_a_final_model_beside_its_checkpoints(rpg: Run, tmp_path: Path) -> None:
    for step in (500, 1000):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        save(folder / "optimizer.pt", {"state": {}})
        save(folder / f"global_step{step}" / "mp_rank_00_model_states.pt", {"module": state(step)})
        safetensors.torch.save_file(state(step), folder / "model.safetensors")
    shutil.copy(tmp_path / "out" / "checkpoint-1000" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    save(tmp_path / "out" / "training_args.bin", {"x": 1})
    code, out, _ = rpg("collect", "--from", tmp_path / "out", "--zoo", tmp_path / "zoo")
    assert code == 0 and "counted once" in out and "global_step500 lies in a folder that is a checkpoint" in out
    assert [(entry.run, entry.step) for entry in Zoo.open(tmp_path / "zoo").entries] == [(0, 500), (0, 1000)]


def test_bad_files_and_those_without_weights(rpg: Run, tmp_path: Path) -> None:
    for seed in range(3):
        save(tmp_path / "mine" / f"net{seed}.pth", state(seed))
        save(tmp_path / "mine" / f"optimizer{seed}.pt", torch.optim.Adam(network().parameters()).state_dict())
    (tmp_path / "mine" / "cut.pth").write_bytes((tmp_path / "mine" / "net0.pth").read_bytes()[:-300])
    save(tmp_path / "mine" / "other.pth", {"weight": torch.ones(3)})
    refused(rpg("collect", "--from", tmp_path / "mine", "--zoo", tmp_path / "zoo"), "cut.pth", "unreadable")
    code, out, _ = rpg("collect", "--from", tmp_path / "mine", "--zoo", tmp_path / "zoo", "--skip-bad")
    assert code == 0 and len(Zoo.open(tmp_path / "zoo")) == 3
    lines = " ".join(out.split())
    assert "skipped: " in lines and "cut.pth" in lines and "other.pth" in lines and "optimizer0.pt" in lines


def test_key_and_strip(rpg: Run, tmp_path: Path) -> None:
    for seed in range(2):
        content = {"generator": state(seed, "net."), "discriminator": state(seed + 9), "step": 3}
        save(tmp_path / f"gan{seed}.pt", content)
    told = rpg("collect", "--from", f"{tmp_path}/*.pt", "--zoo", tmp_path / "zoo")
    refused(told, "(generator, discriminator)", "--key generator")
    cure = told[2].split("choose one with ")[1].split()
    code, out, _ = rpg("collect", "--from", f"{tmp_path}/*.pt", "--zoo", tmp_path / "zoo", *cure)
    assert code == 0
    cure = out.split("cut it off with ")[1].split()[:2]
    code, out, _ = rpg("collect", "--from", f"{tmp_path}/*.pt", "--zoo", tmp_path / "b", "--key", "generator", *cure)
    assert code == 0
    network().load_state_dict(Zoo.open(tmp_path / "b").state_dict(1))


@pytest.mark.parametrize(("mark", "suffix"), [(";", "csv"), ("\t", "tsv"), ("\t", "csv"), (",", "csv")])
def test_tables_of_spreadsheets(rpg: Run, tmp_path: Path, mark: str, suffix: str) -> None:
    for seed in range(2):
        save(tmp_path / f"net{seed}.pth", state(seed))
    score = "0,25" if mark == ";" else "0.25"
    rows = [["file", "run", "step", "accuracy"], ["net0.pth", "a", "1", score], ["net1.pth", "b", "2", "1"]]
    (tmp_path / f"t.{suffix}").write_text("\n".join(mark.join(row) for row in rows))
    assert rpg("collect", "--from", tmp_path, "--table", tmp_path / f"t.{suffix}", "--zoo", tmp_path / "zoo")[0] == 0
    zoo = Zoo.open(tmp_path / "zoo")
    assert [entry.metrics["accuracy"] for entry in zoo.entries] == [0.25, 1] and zoo.runs == ["a", "b"]


def test_names_are_literal_before_they_are_patterns(rpg: Run, tmp_path: Path) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        content = {name: torch.randn(8) for name in ("layers[0].weight", "layers0.weight", "a[1]", "b*")}
        safetensors.torch.save_file(content, tmp_path / f"seed{seed}.safetensors")
    assert rpg("collect", "--from", f"{tmp_path}/*.safetensors", "--zoo", tmp_path / "zoo")[0] == 0
    for name, left in (("layers[0].weight", 24), ("layers[01].weight", 24), ("*[[]*", 16), ("b*", 24)):
        code, out, err = rpg("inspect", tmp_path / "zoo", "--set", f"tokens.exclude=['{name}']", "--json")
        assert code == 0, err
        assert json.loads(out)["values"] == left, name


def test_generate_names_the_runs_that_are_there(rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "runs" / "mine" / "generator").mkdir(parents=True)
    told = rpg("generate", "runs/nothing")
    refused(told, "there is no folder runs/nothing", "runs mine")
    assert "hub" not in told[2].lower()
    assert rpg("generate", "elsewhere/nothing")[2].startswith("error: there is no folder elsewhere/nothing")


def test_every_command_that_reads_a_file_takes_the_set_of_weights_and_the_prefix(
    rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cure of the message, applied to each command that gives it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("judge_of_sets.py").write_text("def mean(weights):\n    return weights['0.bias'].mean().item()\n")
    for seed in range(2):
        biases = {"student": torch.full((16,), 1.0 + seed), "teacher": torch.full((16,), 11.0 + seed)}
        sets = {name: {**state(seed, "net."), "net.0.bias": bias} for name, bias in biases.items()}
        save(Path(f"{seed}.pth"), sets)
    files = ("0.pth", "1.pth")
    commands = {
        "inspect": ("0.pth",),
        "score": (*files, "--score", "judge_of_sets:mean"),
        "merge": (*files, "--method", "linear", "--output", "m.safetensors", "--score", "judge_of_sets:mean"),
        "collect": ("--from", *files, "--zoo", "zoo"),
    }
    for command, words in commands.items():
        _, _, err = rpg(command, *words)
        cure = err.rpartition("choose one with ")[2].split()
        assert cure == ["--key", "student"], f"{command}: {err}"
        code, out, err = rpg(command, *words, "--key", "teacher", "--strip", "net.")
        assert code == 0, f"{command}: {err}"
        if command in ("score", "merge"):
            figures = [line.split()[-1] for line in out.splitlines() if line.split()]
            assert [each for each in figures if each in ("11", "12", "11.5")] == ["11", "12", "11.5"][
                : 2 + (command == "merge")
            ]
    assert Checkpoint.open("m.safetensors").order[0] == "0.weight" == Zoo.open("zoo").checkpoint(0).order[0]
    Path("judge_of_files.py").write_text("from pathlib import Path\ndef mean(file: Path):\n    return 0.0\n")
    refused(rpg("score", *files, "--score", "judge_of_files:mean", "--key", "teacher"), "reads files by itself")


def test_what_lies_in_a_checkpoints_folder_is_its_own_behind_any_glob(rpg: Run, tmp_path: Path) -> None:
    for run in range(3):
        folder = tmp_path / "trainer" / f"run{run}" / "checkpoint-10"
        save(folder / "pytorch_model.bin", state(run))
        save(folder / "global_step10" / "mp_rank_00_model_states.pt", {"module": {"x": torch.randn(3, 3)}})
        save(folder / "optimizer.pt", {"state": {0: torch.randn(3, 3)}})
    for number, source in enumerate(("trainer", "trainer/**", "trainer/*/*", "trainer/**/*")):
        code, out, err = rpg("collect", "--from", tmp_path / source, "--zoo", tmp_path / f"zoo{number}")
        assert code == 0 and "3 checkpoints of 3 run(s)" in out, err
        assert "lies in a folder that is a checkpoint" in out
    inside = tmp_path / "trainer" / "run0" / "checkpoint-10" / "global_step10"
    code, out, err = rpg("collect", "--from", inside, "--zoo", tmp_path / "named")
    assert code == 0 and "1 checkpoints" in out, err


@pytest.mark.parametrize("source", ["mine", "mine/*.pth", "mine/deep/../*.pth", "mine/0.pth"])
def test_a_table_names_files_from_the_folder_of_the_glob(
    rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    for seed in range(2):
        save(Path("mine") / f"{seed}.pth", state(seed))
    Path("mine/table.csv").write_text("file,run,condition\n0.pth,a,3\n1.pth,b,5\n")
    code, _, err = rpg("collect", "--from", source, "--table", "mine/table.csv", "--condition", "vector", "--zoo", "z")
    assert code == 0, err
    zoo = Zoo.open("z")
    assert [(entry.condition, entry.run) for entry in zoo.entries] == [((3.0,), 0), ((5.0,), 1)][: len(zoo)]


def test_a_zoo_of_one_network_has_no_distances(rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("judge_of_one.py").write_text("def total(weights):\n    return weights['0.weight'].sum().item()\n")
    for run in range(3):
        save(Path(f"{run}.pth"), state(1))
    Path("runs.csv").write_text("file,run\n" + "".join(f"{run}.pth,{run}\n" for run in range(3)))
    assert rpg("collect", "--from", "*.pth", "--table", "runs.csv", "--zoo", "zoo")[0] == 0
    code, out, err = rpg("evaluate", "zoo", "--score", "judge_of_one:total")
    assert code == 0 and "distance" not in out, err
    report = Report.load("zoo")
    total = state(1)["0.weight"].sum().item()
    assert report.mean("original") == pytest.approx(total, rel=1e-5) and report.unit in (None, 0.0)


@pytest.mark.parametrize(
    ("kind", "conditions", "asked"),
    [
        ("vector", ["0.5,-1.25", "1,2", "3,4"], "--condition 0.5,-1.25"),
        ("binary", ["1,0", "0,1", "1,1"], "--condition 1,0"),
        ("class", ["cat", "dog", "cat"], "--condition 0"),
    ],
)
def test_the_commands_that_inspect_names_make_networks(
    rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, conditions: list[str], asked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["file,condition" if kind == "class" else "file,condition.a,condition.b"]
    for seed, condition in enumerate(conditions):
        save(Path(f"{seed}.pth"), state(seed))
        lines.append(f"{seed}.pth,{condition}")
    Path("table.csv").write_text("\n".join(lines))
    collect = ("collect", "--from", "*.pth", "--table", "table.csv", "--condition", kind, "--zoo", "zoo")
    code, _, err = rpg(*collect)
    assert code == 0, err
    code, out, err = rpg("inspect", "zoo", "--set", "train.steps=3", "--write-config", "mine.yaml")
    commands = out.rpartition("next: ")[2].strip()
    assert code == 0 and commands.endswith(asked), out + err
    for command in commands.split(" && "):
        code, _, err = rpg(*command.split()[1:])
        assert code == 0, f"{command}: {err}"
