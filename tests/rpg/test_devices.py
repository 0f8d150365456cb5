"""Which device a command takes, and what it says of one that is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from rpg import devices
from rpg.devices import VARIABLE, chosen_device, device_of_run, join_processes, parse_device, task_device, use_device
from rpg.generation.generator import Generator
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.rpg.conftest import Run, refused
from tokenization.errors import InputError

COMMANDS = ["train CONFIG", "generate RUN", "evaluate RUN", "unseen", "lora", "score ZOO"]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, "cpu")  # so that it is restored
    monkeypatch.delenv(VARIABLE)
    before = dict(PartialState._shared_state)
    yield
    PartialState._shared_state.clear()  # one that a test made knows devices that are not there
    PartialState._shared_state.update(before)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_the_best_there_is(two_gpus: None) -> None:
    assert parse_device("auto") == torch.device("cuda") == use_device() == task_device()
    assert parse_device("cuda:1") == torch.device("cuda:1") and parse_device("cpu") == torch.device("cpu")
    for name in ("cuda:2", "mps", "gpu", "cuda:x"):
        with pytest.raises(InputError, match="auto, cpu, cuda"):
            parse_device(name)


def test_everything_takes_the_device_that_was_chosen(two_gpus: None) -> None:
    assert chosen_device() is None and task_device() == torch.device("cuda")
    assert use_device("cpu") == torch.device("cpu") == chosen_device() == task_device() == PartialState().device
    assert os.environ[VARIABLE] == "cpu"  # the processes that it starts take it, too
    assert use_device("cuda:1") == torch.device("cuda:1") == chosen_device() == task_device("cuda:1")
    assert task_device("cpu") == torch.device("cpu")


def test_launched_processes_have_their_own(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    for choose in (join_processes, device_of_run):
        with pytest.raises(InputError, match="leave it out"):
            choose("cuda:1")
    assert device_of_run("auto") == torch.device("cuda") and device_of_run("cpu") == torch.device("cpu")
    assert os.environ["ACCELERATE_USE_CPU"] == "true" and chosen_device() is None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_is_not_there_is_one_line(rpg: Run, tmp_path: Path, command: str) -> None:
    make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path, train={"steps": 1})
    config.save(tmp_path / "config.yaml")
    places = {"CONFIG": tmp_path / "config.yaml", "RUN": tmp_path / "run", "ZOO": tmp_path / "zoo"}
    refused(rpg(*(places.get(word, word) for word in command.split()), "--device", "cuda:7"), "cuda:7", "cpu")
    assert not (tmp_path / "run").exists()


def test_commands_say_which_they_took(rpg: Run, tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path, train={"steps": 2})
    config.save(tmp_path / "config.yaml")
    code, out, _ = rpg("train", tmp_path / "config.yaml", "--device", "cpu")
    assert code == 0 and "training on cpu" in out
    code, out, _ = rpg("generate", tmp_path / "run")
    assert code == 0 and f"generating on {parse_device('auto')}" in out


@pytest.mark.parametrize("config", ["digits_demo", "fields", "gpt", "tickets", "digits_unseen", "detection"])
def test_every_kind_of_run_takes_the_device_and_plans_its_memory(
    rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    guarded: list[bool] = []
    monkeypatch.setattr("rpg.cli.experiments._guard_memory", lambda settings, ignore: guarded.append(ignore))
    monkeypatch.setattr("rpg.experiments.single.build_task", lambda task: pytest.fail("began"))
    words = ["run", f"configs/{config}.yaml", "--set", f"run={tmp_path / 'run'}", "--set", f"zoo={tmp_path / 'zoo'}"]
    refused(rpg(*words, "--device", "cuda:7"), "cuda:7", "cpu")
    assert not guarded
    with pytest.raises(pytest.fail.Exception, match="began"):
        rpg(*words, "--device", "cpu", "--ignore-memory")
    assert guarded == [True] and chosen_device() == torch.device("cpu")


def test_without_a_command_generators_are_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_zoo(tmp_path / "zoo")
    train(small_config(tmp_path, train={"steps": 2}), say=lambda _: None)
    seen = []
    monkeypatch.setattr(
        "rpg.generation.generator.parse_device", lambda name: seen.append(name) or devices.parse_device(name)
    )
    Generator.from_pretrained(tmp_path / "run")
    use_device("cpu")
    Generator.from_pretrained(tmp_path / "run")
    assert seen == ["cpu", torch.device("cpu")]
