"""Whatever a user gives: one line and exit code 2, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpg.cli import making
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.golden_record import plain_text, recorded
from tests.rpg.conftest import Run, refused
from tokenization.zoo.zoo import Zoo

MISTAKES = {
    # the command line itself
    "rpg trian CONFIG": "trian",
    "rpg train CONFIG --steps 3": "--steps",
    "rpg train": "CONFIG",
    "rpg generate RUN --num many": "--num",
    "rpg generate RUN --num 0": "--num",
    "rpg generate RUN --seed": "--seed",
    "rpg plan CONFIG --processes -1": "--processes",
    "rpg sweep SWEEP --jobs 0": "--jobs",
    "rpg train CONFIG more": "more",
    # configurations
    "rpg train FOLDER/none.yaml": "none.yaml",
    "rpg train EMPTY": "empty",
    "rpg train BROKEN": "broken.yaml",
    "rpg train LIST": "list.yaml",
    "rpg train BYTES": "bytes.yaml",
    "rpg train ENDLESS": "endless.yaml",
    "rpg train ORPHAN": "none.yaml",
    "rpg train STRANGE": "strange.yaml",
    "rpg train NUMBERED": "numbered.yaml",
    "rpg inspect NUMBERED": "numbered.yaml",
    "rpg train CONFIG --set train.steps": "--set",
    "rpg train CONFIG --set train.steps=[1": "train.steps",
    "rpg train CONFIG --set train=3": "train",
    "rpg train CONFIG --set train.steps.more=3": "train.steps",
    "rpg train CONFIG --set train.stpes=3": "train.stpes",
    "rpg train CONFIG --set seed=-1": "seed",
    "rpg train CONFIG --set model.backbone.kind=lstmm": "lstmm",
    "rpg train CONFIG --set tokens.size=0": "size",
    "rpg train CONFIG --set tokens.base=FOLDER/none.safetensors --set run=FOLDER/new": "none.safetensors",
    "rpg plan CONFIG --set =3": "--set",
    "rpg inspect CONFIG --set run": "--set",
    "rpg demo --config FOLDER/none.yaml": "none.yaml",
    "rpg unseen FOLDER/none.yaml": "none.yaml",
    "rpg lora FOLDER/none.yaml": "none.yaml",
    "rpg fields FOLDER/none.yaml": "none.yaml",
    "rpg metric FOLDER/none.yaml": "none.yaml",
    "rpg score FOLDER/none.yaml EMPTY": "none.yaml",
    "rpg app RUN --port 0": "--port",
    # zoos
    "rpg train CONFIG --set zoo=FOLDER/none": "none",
    "rpg train CONFIG --set zoo=TEXT": "text",
    "rpg train CONFIG --set zoo=EMPTY": "empty",
    "rpg train CONFIG --set zoo=EMPTYZOO": "emptyzoo",
    "rpg train CONFIG --set zoo=BROKENZOO": "zoo.json",
    "rpg train CONFIG --set zoo=TORNZOO": "manifest.jsonl",
    "rpg train CONFIG --set zoo=LOSTZOO": "",
    "rpg train CONFIG --set train.splits=[none] --set run=FOLDER/new": "no checkpoint",
    "rpg train CONFIG --set model.condition.kind=binary --set run=FOLDER/new": "condition",
    "rpg train CONFIG --set tokens.include=[nothing] --set run=FOLDER/new": "nothing",
    "rpg train CONFIG --set train.optimizer=sgd": "train.optimizer",
    "rpg train CONFIG --set run=/proc/x": "/proc/x",
    "rpg train CONFIG --set run=TEXT": "text",
    "rpg train CONFIG --set run=TEXT/run": "text",
    "rpg train CONFIG --set run=RUN": "--resume",
    "rpg train CONFIG --set tokens.include=[nothing] --overwrite": "nothing",
    "rpg train CONFIG --set train.behaviour={} --set run=FOLDER/new": "task",
    "rpg train CONFIG --compare --set run=FOLDER/new": "task",
    "rpg train UNSEEN --compare --set zoo=FOLDER/none": "none",
    "rpg inspect FOLDER/none": "none",
    "rpg inspect EMPTY": "empty",
    "rpg inspect TEXT": "text",
    "rpg inspect BROKEN": "broken.yaml",
    "rpg inspect FAKE": "fake.safetensors",
    "rpg inspect PICKLE --verify": "zoo",
    "rpg inspect FAKEPICKLE": "fake.pth",
    "rpg inspect BROKENZOO": "zoo.json",
    "rpg inspect ZOO --set tokens.size=no": "size",
    "rpg align FOLDER/none FOLDER/out": "none",
    "rpg align ZOO FOLDER/out": "task",
    "rpg align TEXT FOLDER/out": "text",
    "rpg align BROKENZOO FOLDER/out": "zoo.json",
    # collect
    "rpg collect": "--from",
    "rpg collect CONFIG": "task",
    "rpg collect --from MINE": "--zoo",
    "rpg collect --from FOLDER/none --zoo FOLDER/out": "none",
    "rpg collect --from EMPTY --zoo FOLDER/out": "empty",
    "rpg collect --from TEXT --zoo FOLDER/out": "text",
    "rpg collect --from MINE --zoo /proc/x": "/proc/x",
    "rpg collect --from MINE --zoo TEXT": "text",
    "rpg collect --from MINE --zoo FOLDER/out --condition banana": "banana",
    "rpg collect --from MINE --zoo FOLDER/out --pattern (": "pattern",
    "rpg collect --from MINE --zoo FOLDER/out --pattern nothing(?P<run>x)": "pattern",
    "rpg collect --from MINE --zoo FOLDER/out --table FOLDER/none.csv": "none.csv",
    "rpg collect --from MINE --zoo FOLDER/out --table EMPTY": "empty",
    "rpg collect --from MINE --zoo FOLDER/out --table TEXT": "text",
    "rpg collect --from MINE --zoo FOLDER/out --table BYTES": "bytes.yaml",
    "rpg collect DIGITS --set zoo=/proc/x": "/proc/x",
    "rpg collect DIGITS --set zoo=TEXT": "text",
    "rpg collect DIGITS --set task.name=digts": "digts",
    "rpg collect IMAGENET": "",
    # plan
    "rpg plan CONFIG --memory much": "--memory",
    "rpg plan CONFIG --network no_such_network": "no_such_network",
    "rpg plan CONFIG --set zoo=FOLDER/none": "none",
    "rpg plan CONFIG --checkpoints -3 --network resnet18": "--checkpoints",
    "rpg plan CONFIG --network resnet18 --set model.condition.kind=binary": "--condition-size",
    "rpg plan CONFIG --network resnet18 --set model.condition.kind=binary --condition-size -2": "--condition-size",
    # generate
    "rpg generate FOLDER/none": "none",
    "rpg generate nobody/nothing": "nobody/nothing",
    "rpg generate EMPTY": "config.yaml",
    "rpg generate TEXT": "text",
    "rpg generate ZOO": "config.yaml",
    "rpg generate DAMAGED": "model.safetensors",
    "rpg generate MIXED": "mixed",
    "rpg generate RUN --device cuda": "cuda",
    "rpg generate RUN --device cuda:7": "cuda:7",
    "rpg generate RUN --device banana": "banana",
    "rpg generate RUN --device cpu:x": "cpu:x",
    "rpg generate RUN --device meta": "meta",
    "rpg generate RUN --output /proc/x": "/proc/x",
    "rpg generate RUN --output README.md": "README.md",
    "rpg generate RUN --output README.md/new": "README.md",
    "rpg generate RUN --output TAKEN": "network-00000.safetensors",
    "rpg generate RUN --steps 0": "steps",
    "rpg generate RUN --guidance-scale inf": "guidance",
    "rpg generate RUN --sampler ddpm": "ddpm",
    "rpg generate RUN --sampler banana": "banana",
    "rpg generate RUN --state banana": "banana",
    "rpg generate RUN --guidance-scale -1": "guidance",
    "rpg generate RUN --guidance-scale nan": "guidance",
    "rpg generate RUN --temperature -1": "temperature",
    "rpg generate RUN --temperature nan": "temperature",
    "rpg generate RUN --temperature inf": "temperature",
    "rpg generate RUN --temperature warm": "temperature",
    "rpg generate RUN --seed -1": "seed",
    "rpg generate RUN --condition 1,x": "--condition",
    "rpg generate RUN --condition 1,0": "condition",
    "rpg generate RUN --classes 1": "--classes",
    "rpg generate RUN --prompt cats": "--prompt",
    "rpg generate RUN --classes 1 --prompt cats": "--prompt",
    "rpg generate RUN --metric loss=0.1": "--metric",
    "rpg generate RUN --from GOOD": "initial",
    "rpg generate CRUN --metric loss=0.1 --classes c1": "--metric",
    "rpg generate CRUN": "condition",
    "rpg generate CRUN --condition 1": "condition",
    "rpg generate CRUN --condition 1,nan,0": "condition",
    "rpg generate CRUN --classes c9": "c9",
    "rpg generate CRUN --prompt anything": "--prompt-model",
    "rpg generate CRUN --prompt anything --prompt-model FOLDER/none": "none",
    # export
    "rpg export FOLDER/none --to timm --output FOLDER/out.safetensors": "none",
    "rpg export TEXT --to timm --output FOLDER/out.safetensors": "text",
    "rpg export FAKE --to torch --output FOLDER/out.pth": "fake.safetensors",
    "rpg export PICKLE --to torch --output FOLDER/out.pth": "pickle",
    "rpg export GOOD --to onnx --output FOLDER/out": "onnx",
    "rpg export GOOD --to torch --output FOLDER/out.bin": ".bin",
    "rpg export GOOD --to torch --output TEXT": "text",
    "rpg export GOOD --to torch --output /proc/x.pth": "/proc/x.pth",
    "rpg export GOOD --to torch --output FOLDER/none/out.pth": "none",
    "rpg export GOOD --to torch --output TEXT/out.pth": "text",
    "rpg export GOOD --to transformers --output FOLDER/out": "--base",
    "rpg export GOOD --to transformers --base EMPTY --output FOLDER/out": "config.json",
    "rpg export GOOD --to transformers --base BROKENBASE --output FOLDER/out": "config.json",
    "rpg export GOOD --to peft --base EMPTY --output FOLDER/out": "adapter_config.json",
    "rpg export GOOD --to peft --base BROKENBASE --output FOLDER/out": "adapter_config.json",
    "rpg export RUN --to torch --output FOLDER/out.pth --condition x": "--condition",
    "rpg export EMPTY --to torch --output FOLDER/out.pth": "empty",
    # scores and experiments
    "rpg evaluate RUN --higher loss": "--score",
    "rpg evaluate RUN --num 0": "--num",
    "rpg evaluate FOLDER/none": "none",
    "rpg evaluate EMPTY": "config.yaml",
    "rpg evaluate TEXT": "text",
    "rpg sweep FOLDER/none.yaml": "none.yaml",
    "rpg sweep EMPTY": "empty",
    "rpg sweep BROKEN": "broken.yaml",
    "rpg sweep LIST": "list.yaml",
    "rpg sweep BYTES": "bytes.yaml",
    "rpg sweep CONFIG": "config.yaml",
    "rpg sweep TWICE": "one",
    "rpg unseen CONFIG": "task",
    "rpg unseen DIGITS": "digits",
    "rpg unseen CONFIG --split banana": "banana",
    "rpg unseen CONFIG --split test": "task",
    "rpg unseen UNSEEN --set run=EMPTY --split test": "config.yaml",
    "rpg lora CONFIG": "task",
    "rpg lora DIGITS": "digits",
    "rpg lora CONFIG --split banana": "banana",
    "rpg lora LORA --set run=EMPTY --split test": "config.yaml",
    "rpg fields CONFIG": "task",
    "rpg fields FIELDS --set run=EMPTY --split validation": "config.yaml",
    "rpg metric CONFIG": "task",
    "rpg metric DIGITS": "digits",
    "rpg metric GPT --set run=EMPTY --split validation": "config.yaml",
    "rpg render FAKE": "no run or zoo of fields",
    "rpg render FAKE --config FIELDS": "fake.safetensors",
    "rpg score CONFIG EMPTY": "task",
    "rpg score LORA EMPTY": "empty",
    "rpg score LORA TEXT": "text",
    "rpg score LORA EMPTY --split banana": "banana",
    "rpg demo --set run=TEXT": "text",
    "rpg generate RUN --setting angle=3": "generator of settings",
    "rpg demo --set task=null": "task",
    "rpg run FOLDER/none.yaml": "none.yaml",
    "rpg collect --from FAKE EMPTY --zoo FOLDER/new": "empty",
    "rpg run CONFIG --set zoo=FOLDER/none --set task=null": "none",
    "rpg run DIGITS --set run=TEXT": "text",
}
"""What is typed, with names of ``world`` in capitals, and what the line must name."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good and bad files and folders, by the names that the table uses."""
    folder = tmp_path_factory.mktemp("world")
    names = {"FOLDER": folder, "DIGITS": Path("configs/digits.yaml"), "UNSEEN": Path("configs/digits_unseen.yaml")}
    names |= {"FIELDS": Path("configs/fields.yaml"), "GPT": Path("configs/gpt.yaml")}
    names |= {"LORA": Path("configs/lora/tiny.yaml"), "IMAGENET": Path("configs/large/vit_tiny.yaml")}

    def write(name: str, file: str, content: str | bytes) -> None:
        names[name] = folder / file
        names[name].parent.mkdir(parents=True, exist_ok=True)
        names[name].write_bytes(content if isinstance(content, bytes) else content.encode())

    write("TEXT", "text", "hello\n")
    write("BROKEN", "broken.yaml", "run: [1\n")
    write("LIST", "list.yaml", "- 1\n")
    write("BYTES", "bytes.yaml", b"\xff\xfe\x00run: 1")
    write("ENDLESS", "endless.yaml", "extends: endless.yaml\n")
    write("ORPHAN", "orphan.yaml", "extends: none.yaml\n")
    write("STRANGE", "strange.yaml", "extends: [1]\n")
    write("NUMBERED", "numbered.yaml", "1: 2\n")
    write("TWICE", "twice.yaml", "run: r\nconfig: run/config.yaml\nentries: [{name: one}, {name: one}]\n")
    write("FAKE", "fake.safetensors", "no tensors")
    write("FAKEPICKLE", "fake.pth", "no tensors")
    for name in ("EMPTY", "BROKENBASE", "MINE"):
        names[name] = folder / name.lower()
        names[name].mkdir()
    for name in ("config.json", "adapter_config.json"):
        (names["BROKENBASE"] / name).write_text("{")
    for name in ("CRUN", "RUN"):  # the last one is what ZOO and CONFIG are of
        place = folder / name.lower()
        names["ZOO"], names[name], names["CONFIG"] = place / "zoo", place / "run", place / "config.yaml"
        make_zoo(names["ZOO"], condition_size=3 if name == "CRUN" else 0)
        condition = {"condition": {"kind": "binary"}} if name == "CRUN" else {}
        config = small_config(place, model=condition, train={"steps": 1})
        config.save(names["CONFIG"])
        train(config, say=lambda _: None)
    names["GOOD"] = Zoo.open(names["ZOO"]).file(0)
    shutil.copy(names["GOOD"], names["MINE"])
    torch.save(Zoo.open(names["ZOO"]).state_dict(0), folder / "good.pth")
    names["PICKLE"] = folder / "good.pth"
    for name in ("DAMAGED", "MIXED"):
        names[name] = folder / name.lower()
        shutil.copytree(names["RUN"] / "generator", names[name])
    os.truncate(names["DAMAGED"] / "model.safetensors", 1000)
    shutil.copy(names["CRUN"] / "generator" / "model.safetensors", names["MIXED"])
    for name in ("EMPTYZOO", "BROKENZOO", "TORNZOO", "LOSTZOO"):
        names[name] = folder / name.lower()
        shutil.copytree(names["ZOO"], names[name])
    shutil.rmtree(names["EMPTYZOO"])
    Zoo.create(names["EMPTYZOO"])
    (names["BROKENZOO"] / "zoo.json").write_text("{")
    (names["TORNZOO"] / "manifest.jsonl").write_text('{"file": 1}\n')
    Zoo.open(names["LOSTZOO"]).file(0).unlink()
    names["TAKEN"] = folder / "taken"
    (names["TAKEN"] / "network-00000.safetensors").mkdir(parents=True)
    return names


def arguments_of(line: str, world: dict[str, Path]) -> list[str]:
    """The words of a line, the names of ``world`` in them replaced."""
    words = []
    for word in line.split()[1:]:
        for name in sorted(world, key=len, reverse=True):
            start, found, rest = word.rpartition(name)
            if found and (not start or start.endswith("=")) and (not rest or rest.startswith("/")):
                word = f"{start}{world[name]}{rest}"
                break
        words.append(word)
    return words


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(rpg: Run, world: dict[str, Path], line: str) -> None:
    before = files_of(world["FOLDER"])
    result = rpg(*arguments_of(line, world))
    refused(result, MISTAKES[line])
    assert plain_text(result[2]) == recorded("errors", line, plain_text(result[2]))
    assert files_of(world["FOLDER"]) == before


def test_what_the_disk_refuses_is_one_line(rpg: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "runs/zoos/mine")

    monkeypatch.setattr(making, "load", fail)
    refused(rpg("train", "config.yaml"), "runs/zoos/mine: permission denied")


def test_a_fault_of_the_program_keeps_its_traceback(rpg: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise AttributeError("a fault of the program")

    monkeypatch.setattr(making, "load", fault)
    with pytest.raises(AttributeError, match="a fault"):
        rpg("train", "config.yaml")


def test_a_mistake_in_a_process_of_its_own(world: dict[str, Path]) -> None:
    line = "rpg train CONFIG --set zoo=FOLDER/none"
    command = [sys.executable, "-m", "rpg", *arguments_of(line, world)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=180)
    refused((process.returncode, process.stdout, process.stderr), MISTAKES[line])
