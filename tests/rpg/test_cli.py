"""The command line as a user meets it: what it prints, what it leaves on disk, how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rpg as package
from rpg import cli
from rpg.generation.folders import FILES
from rpg.tasks.config import TASKS
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config, small_network
from tests.golden_record import plain_text, recorded
from tests.rpg.commands import write_configs
from tests.rpg.conftest import Run, refused
from tokenization.zoo.zoo import Zoo

COMMANDS = [str(command.name or command.callback.__name__) for command in cli.app.registered_commands]  # type: ignore[union-attr]


def rpg_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "rpg", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=180)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(rpg: Run, command: str) -> None:
    code, out, err = rpg(command, "--help")
    assert code == 0 and err == ""
    assert f"rpg {command} [OPTIONS]" in out
    assert plain_text(out) == recorded("help", command, plain_text(out))
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert len(lines[1]) > 20, "the line after the usage says what the command does"


def test_help_lists_the_commands_and_is_quick(rpg: Run) -> None:
    code, out, _ = rpg("--help")
    assert code == 0 and all(command in out for command in COMMANDS)
    listing = "import sys, rpg.cli; print(' '.join(name for name in ('torch', 'transformers') if name in sys.modules))"
    process = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, timeout=180)
    assert process.stdout.strip() == "", "the command line loads these before it knows what is asked"
    assert rpg() == rpg("--help")


def test_commands_load_what_they_need() -> None:
    """torch takes seconds, and each of these a second or more on top; a configuration needs nothing that trains."""
    needed = {
        "collect --from": "tokenization.zoo.importing", "collect": "rpg.experiments.single",
        "inspect": "rpg.planning.inspect, rpg.planning.proposal", "train": "rpg.training.loop, rpg.planning.plan",
        "generate": "rpg.generation.generator, rpg.experiments.single, rpg.generation.examples",
    }  # fmt: skip
    slow = ("accelerate", "diffusers", "jinja2", "matplotlib", "peft", "scipy", "sklearn", "sympy", "timm")
    slow += ("torchvision", "transformers", "triton")
    tasks = {"rpg.tasks.images.training", *(each.task.partition(":")[0] for each in TASKS.values())}
    script = f"import sys, rpg.config; print(*{tasks} & set(sys.modules)); import {', '.join(needed.values())}; "
    script += f"print(*(name for name in {slow} if name in sys.modules))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert (process.returncode, process.stdout.strip()) == (0, ""), process.stderr


def test_the_package_offers_its_main_parts() -> None:
    """When they are asked for: what `rpg` itself imports is seen where help is quick."""
    assert {"Config", "Generator", "InputError", "evaluate", "train"} <= set(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)


# --- collect ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real timm checkpoints as people leave them: safetensors, plain and nested pickles."""
    folder = tmp_path_factory.mktemp("mine")
    for seed in range(4):
        torch.manual_seed(seed)
        state = timm.create_model("test_resnet", num_classes=3).state_dict()
        stem = folder / f"seed{seed // 2}-step{10 * (seed % 2) + 10}"
        if seed % 2 == 0:
            save_file(state, stem.with_suffix(".safetensors"))
        elif seed == 1:
            torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, f"{stem}.pth")
        else:
            torch.save(state, f"{stem}.pth")
    return folder


def test_collect_from_a_folder_of_timm_checkpoints(rpg: Run, mine: Path, tmp_path: Path) -> None:
    before = snapshot(mine)
    code, out, err = rpg("collect", "--from", mine, "--zoo", tmp_path / "zoo")
    assert (code, err) == (0, "") and "4 checkpoints of 2 run(s)" in out
    assert "2 runs found in the names" in out
    zoo = Zoo.open(tmp_path / "zoo")
    zoo.verify()
    network = timm.create_model("test_resnet", num_classes=3)
    for index in range(len(zoo)):
        network.load_state_dict(zoo.state_dict(index))
    torch.manual_seed(1)
    expected = timm.create_model("test_resnet", num_classes=3).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in zoo.state_dict(1).items())
    assert snapshot(mine) == before


def test_collect_with_a_pattern(rpg: Run, mine: Path, tmp_path: Path) -> None:
    pattern = r"(?P<run>seed\d)-step(?P<step>\d+)"
    code, out, _ = rpg("collect", "--from", mine, "--zoo", tmp_path / "zoo", "--pattern", pattern)
    assert code == 0 and "4 checkpoints of 2 run(s)" in out
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.runs == ["seed0", "seed1"] and [entry.step for entry in zoo.entries] == [10, 20, 10, 20]


def test_collect_with_a_table_and_a_kind_of_condition(rpg: Run, mine: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("file,run,condition,accuracy\nseed0-step10.safetensors,a,0 1,0.5\nseed0-step20.pth,a,1 1,0.7\n")
    code, _, err = rpg("collect", "--from", mine, "--zoo", tmp_path / "zoo", "--table", table, "--condition", "vector")
    assert (code, err) == (0, "")
    zoo = Zoo.open(tmp_path / "zoo")
    assert zoo.condition is not None and (zoo.condition.kind, zoo.condition.size) == ("vector", 2)
    assert [entry.condition for entry in zoo.entries] == [(0, 1), (1, 1)]
    assert [entry.metrics for entry in zoo.entries] == [{"accuracy": 0.5}, {"accuracy": 0.7}]
    refused(rpg("collect", "--from", mine, "--zoo", tmp_path / "b", "--table", table, "--condition", "kind"), "kind")
    assert not (tmp_path / "b").exists()


def test_collect_says_what_is_missing(rpg: Run, mine: Path, tmp_path: Path) -> None:
    refused(rpg("collect"), "a CONFIG with a task, or --from FOLDER")
    refused(rpg("collect", "--from", mine), "--zoo")
    refused(rpg("collect", "--from", tmp_path / "none", "--zoo", tmp_path / "zoo"), "none", "folder or glob")


# --- inspect ------------------------------------------------------------------------------------------------------


def test_inspect_a_zoo(rpg: Run, mine: Path, tmp_path: Path) -> None:
    rpg("collect", "--from", mine, "--zoo", tmp_path / "zoo")
    code, out, err = rpg("inspect", tmp_path / "zoo", "--set", "tokens.size=512", "--verify")
    assert (code, err) == (0, "")
    for part in ("convolution", "batch statistics", "tokens of 512 values", "num_batches_tracked", "all the same bits"):
        assert part in out
    code, out, _ = rpg("inspect", tmp_path / "zoo", "--set", "tokens.pack=true")
    assert code == 0 and "tokens of 128 values" in out and "verified" not in out


def test_inspect_a_checkpoint_of_any_kind(rpg: Run, mine: Path) -> None:
    outputs = {}
    for name in ("seed0-step10.safetensors", "seed0-step20.pth"):
        code, out, err = rpg("inspect", mine / name)
        assert (code, err) == (0, "")
        table = out[out.index("tokens of") : out.index("outside the tokens")]
        outputs[name] = sorted(table.splitlines())  # a foreign safetensors file has its names sorted
    assert outputs["seed0-step10.safetensors"] == outputs["seed0-step20.pth"]
    refused(rpg("inspect", mine / "seed0-step20.pth", "--verify"), "a zoo")


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A configuration file with its zoo, beside it."""
    make_zoo(tmp_path / "zoo")
    config = tmp_path / "config.yaml"
    small_config(tmp_path).save(config)
    return config


def test_inspect_a_configuration(rpg: Run, experiment: Path) -> None:
    code, out, err = rpg("inspect", experiment, "--set", "train.tokens=4")
    assert (code, err) == (0, "")
    for part in ("6", "backbone", "denoiser", "state", "optimizer", "activations", "tile", "16 of 16 values"):
        assert part in out
    assert not (experiment.parent / "run").exists() and not (experiment.parent / "zoo" / "cache").exists()


def test_inspect_a_configuration_before_its_zoo_is_collected(rpg: Run, tmp_path: Path) -> None:
    code, out, err = rpg("inspect", "configs/digits.yaml", "--set", f"zoo={tmp_path / 'zoo'}")
    assert (code, err) == (0, "") and "no zoo yet" in " ".join(out.split()) and "peak" in out
    assert list(tmp_path.iterdir()) == []


# --- train, generate, export ----------------------------------------------------------------------------------------


def test_train_generate_export(rpg: Run, experiment: Path, tmp_path: Path) -> None:
    code, out, err = rpg("train", experiment, "--set", "train.steps=3")
    assert (code, err) == (0, "") and "generator in" in out
    code, _, err = rpg("generate", tmp_path / "run", "--num", 2, "--seed", 3)
    assert (code, err) == (0, "")
    files = sorted((tmp_path / "run" / "generated").iterdir())
    for file in files:
        small_network().load_state_dict(load_file(file))
    code, out, err = rpg("export", files[0], "--to", "torch", "--output", tmp_path / "net.pth")
    assert (code, err) == (0, "") and "net.pth" in out
    code, _, err = rpg("export", tmp_path / "run", "--to", "torch", "--output", tmp_path / "again.pth", "--seed", 3)
    assert (code, err) == (0, "")
    first, again = (torch.load(tmp_path / name) for name in ("net.pth", "again.pth"))
    assert list(first) == list(again) and all(torch.equal(first[name], again[name]) for name in first)
    refused(rpg("train", experiment), "a run already", "--resume")
    refused(rpg("generate", tmp_path / "run", "--condition", "1,x"), "--condition", "comma-separated")
    refused(rpg("export", files[0], "--to", "onnx", "--output", tmp_path / "o"), "--to", "'onnx'")


def test_a_run_that_is_trained_anew_is_named(rpg: Run, tmp_path: Path, monkeypatch) -> None:
    write_configs(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert rpg("collect", "digits.yaml")[0] == rpg("train", "digits.yaml")[0] == 0
    few = ("--set", "evaluate.num=2", "--set", "evaluate.baselines=[]")
    code, out, err = rpg("run", "digits.yaml", *few)
    assert code == 0, err
    assert "run exists and is trained anew; `rpg evaluate run` only scores it\n" in out


def test_the_temperature_of_fresh_states(rpg: Run, experiment: Path, tmp_path: Path) -> None:
    states = ("--set", "train.steps=1", "--set", "model.state.of=checkpoint", "--set", "generate.state=gaussian")
    assert rpg("train", experiment, *states)[0] == 0
    made: dict[str, list[bytes]] = {}
    for name, asked in {"default": (), "1": ("--temperature", 1), "0": ("--temperature", 0)}.items():
        code, _, err = rpg("generate", tmp_path / "run", "-n", 2, "--output", tmp_path / name, *asked)
        assert (code, err) == (0, "")
        files = sorted((tmp_path / name).iterdir())
        made[name] = [path.read_bytes() for path in files]
        with safe_open(files[0], "pt") as file:
            assert json.loads(file.metadata()["rpg.provenance"])["temperature"] == float(name == "default" or name)
    assert made["default"] == made["1"] and made["1"][0] != made["0"][0]


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_an_empty_zoo(rpg: Run, experiment: Path, tmp_path: Path) -> None:
    Zoo.create(tmp_path / "empty")
    refused(rpg("inspect", tmp_path / "empty"), "empty", "an empty zoo")
    refused(rpg("inspect", experiment, "--set", f"zoo={tmp_path / 'empty'}"), "an empty zoo")
    refused(rpg("train", experiment, "--set", f"zoo={tmp_path / 'empty'}"), "no checkpoint to train on")
    refused(rpg("train", experiment, "--set", f"zoo={tmp_path / 'none'}"), "does not exist", "rpg collect")


def collect_two(rpg: Run, folder: Path, second: Callable[[Path], None]) -> tuple[int, str, str]:
    """Collect a good checkpoint and a bad one; whatever happens, there must be no zoo and no change."""
    (folder / "mine").mkdir()
    save_file({"w": torch.zeros(2, 3), "b": torch.zeros(3)}, folder / "mine" / "a.safetensors")
    second(folder / "mine" / "b.safetensors")
    before = snapshot(folder)
    result = rpg("collect", "--from", folder / "mine", "--zoo", folder / "zoo")
    assert snapshot(folder) == before and not (folder / "zoo").exists()
    return result


def test_checkpoints_of_different_structures(rpg: Run, tmp_path: Path) -> None:
    result = collect_two(rpg, tmp_path, lambda path: save_file({"w": torch.zeros(2, 4), "b": torch.zeros(3)}, path))
    refused(result, "b.safetensors", "tensor 'w'", "[2, 4]", "[2, 3]")


def test_a_truncated_safetensors_file(rpg: Run, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        save_file({"w": torch.zeros(2, 3), "b": torch.zeros(3)}, path)
        path.write_bytes(path.read_bytes()[:-4])

    refused(collect_two(rpg, tmp_path, write), "b.safetensors", "tensor 'w' is cut off")
    refused(rpg("inspect", tmp_path / "mine" / "b.safetensors"), "b.safetensors", "tensor 'w' is cut off")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(rpg: Run, tmp_path: Path, value: str) -> None:
    bad = torch.tensor([0.0, float(value), 0.0])
    result = collect_two(rpg, tmp_path, lambda path: save_file({"w": torch.zeros(2, 3), "b": bad}, path))
    refused(result, "b.safetensors", "tensor 'b'", "NaN or infinity")


def test_a_zoo_that_was_damaged_later(rpg: Run, experiment: Path, tmp_path: Path) -> None:
    path = Zoo.open(tmp_path / "zoo").file(3)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    refused(rpg("inspect", experiment, "--verify"), path.name, "digest", "as collected")


@pytest.mark.parametrize("command", ["train", "inspect", "collect"])
def test_a_configuration_with_a_mistake(rpg: Run, experiment: Path, command: str) -> None:
    tree = yaml.safe_load(experiment.read_text())
    experiment.write_text(yaml.safe_dump({**tree, "trian": {"steps": 3}}))
    refused(rpg(command, experiment), "config.yaml: trian is an unknown key", "did you mean 'train'?")
    experiment.write_text(yaml.safe_dump(tree))
    refused(rpg(command, experiment, "--set", "train.stpes=3"), "train.stpes", "did you mean 'steps'?")
    refused(rpg(command, experiment, "--set", "train.steps=0"), "train.steps cannot be 0", "greater than or equal to 1")
    refused(rpg(command, experiment, "--set", "train.steps"), "--set", "section.field=value")
    refused(rpg(command, experiment.with_name("none.yaml")), "There is no file", "none.yaml", "configs/")


@pytest.mark.parametrize("name", FILES)
def test_a_generator_with_a_missing_file(rpg: Run, experiment: Path, tmp_path: Path, name: str) -> None:
    if not (tmp_path / "run").exists():
        train(small_config(tmp_path, train={"steps": 1}), say=lambda _: None)
    (tmp_path / "run" / "generator" / name).unlink()
    refused(rpg("generate", tmp_path / "run"), f"no {name}")
    refused(rpg("export", tmp_path / "run", "--to", "timm", "--output", tmp_path / "n.safetensors"), f"no {name}")
    assert not (tmp_path / "run" / "generated").exists() and not (tmp_path / "n.safetensors").exists()


class Bomb:
    """Pickled, it touches a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.trace}",))


def test_a_pickle_that_holds_code_is_refused_and_not_run(rpg: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    bomb = tmp_path / "mine" / "bomb.pth"
    torch.save({"w": torch.zeros(2), "bomb": Bomb(tmp_path / "trace")}, bomb)
    refused(rpg("collect", "--from", tmp_path / "mine", "--zoo", tmp_path / "zoo"), "bomb.pth", "holds code")
    refused(rpg("inspect", bomb), "bomb.pth", "holds code")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_unknown_option_is_a_usage_error(rpg: Run, experiment: Path) -> None:
    code, out, err = rpg("train", experiment, "--steps", 3)
    assert code == 2 and out == "" and "--steps" in err and "Traceback" not in err
    assert rpg("trian", experiment)[0] == 2


def test_a_process_of_its_own(mine: Path, tmp_path: Path) -> None:
    process = rpg_process("inspect", mine / "seed0-step10.safetensors")
    assert process.returncode == 0 and process.stderr == "" and "convolution" in process.stdout
