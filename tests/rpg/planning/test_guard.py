"""The memory guard: what is free, what is needed, and what is said where it is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from rpg.config import Config
from rpg.planning import collection, machine, measuring, plan
from rpg.planning.collection import collection_need, plan_collection
from rpg.planning.measuring import Target, find_target
from rpg.planning.plan import (
    GIB,
    Need,
    evaluation_need,
    free_memory,
    generation_need,
    guard,
    make_plan,
    require_memory,
    training_need,
)
from rpg.planning.zoo_summary import ZooSummary
from rpg.tasks import collecting
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.rpg.conftest import Run, refused
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

RECIPE: dict[str, Any] = {"batch_size": 100, "checkpoints": 5}


@pytest.fixture
def one_mebibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda: 1 << 20)


def test_too_much_is_one_sentence_with_both_figures_and_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda: 16 * GIB)
    need = Need("training", 31 * GIB, 0, "lower train.batch_size")
    with pytest.raises(
        InputError, match=r"training needs 31 GiB, 16 GiB of memory are free; lower train.batch_size, .*--ignore-memory"
    ):
        require_memory(need)
    half = Need("training", 10 * GIB, 0, "wait")
    require_memory(half)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"20 GiB \(2 processes\)"):
        require_memory(half)


def test_a_gpu_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda: GIB)
    monkeypatch.setattr(plan, "free_on_device", lambda: 8 * GIB)
    monkeypatch.setattr(plan, "chosen_device", lambda: torch.device("cuda:1"))
    require_memory(Need("generating", 0, 7 * GIB, "wait"))
    with pytest.raises(InputError, match="needs 9 GiB, 8 GiB of cuda:1 are free"):
        require_memory(Need("generating", 0, 9 * GIB, "wait"))


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int) -> None:
    root = tmp_path if version == 2 else tmp_path / "memory"
    own = root / "outer" / "inner"
    own.mkdir(parents=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for folder, (limit, usage) in {
        own: ("9223372036854771712" if version == 1 else "max", 10),
        own.parent: (1000, 700),
    }.items():
        for name, value in zip(names, (limit, usage), strict=True):
            (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text("inactive_file 40\ntotal_inactive_file 40\n")
    lines = "0::/outer/inner\n" if version == 2 else "4:cpu,memory:/outer/inner\n0::/\n"
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda p, *a, **k: lines if str(p) == "/proc/self/cgroup" else read(p, *a, **k)
    )
    assert free_memory() == 1000 - 700 + 40  # page cache goes when it has to


def test_without_limits_it_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    assert free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_training_needs_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path)
    summary = ZooSummary.of(Zoo.open(zoo.path), config)
    assert training_need(config) is None  # clearly small
    monkeypatch.setattr(plan, "free_memory", lambda: 1 << 20)
    need = training_need(config)
    assert need is not None and need.host == make_plan(config, summary).training.total
    assert need.host < plan.rough_training_bytes(plan.build_estimator(config, summary))
    assert training_need(config.model_copy(update={"zoo": str(tmp_path / "none")})) is None


def test_weights_that_are_spread_over_processes_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_zoo(tmp_path / "zoo")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert training_need(small_config(tmp_path)) is None


def test_small_generators_are_not_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_zoo(tmp_path / "zoo", condition_size=2)
    config = small_config(tmp_path, train={"steps": 2}, model={"condition": {"kind": "binary"}})
    train(config, say=lambda _: None)
    monkeypatch.setattr(plan, "free_memory", lambda: 16 * GIB)
    assert generation_need(config.run) is None
    monkeypatch.setattr(plan, "free_memory", lambda: 1 << 20)
    need = generation_need(config.run)
    assert need is not None and 0 < need.host < plan.rough_generation_bytes(plan.saved_parts(config.run))
    evaluating = evaluation_need(config.run)
    assert evaluating is not None and 0 < evaluating.host < 1 << 30  # one network after the other


def task_config(**task: Any) -> Config:
    return Config.parse({"run": "r", "zoo": "z", "task": task}, "t")


def test_collection_needs_weights_gradients_moments_and_activations() -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 1000, device="meta"), nn.ReLU(), nn.Linear(1000, 10, device="meta")
    )
    target = Target(network, (1, 8, 8), torch.device("cpu"), 7)
    weights, activations = 4 * (64 * 1000 + 1000 + 10000 + 10), 4 * 32 * (64 + 2 * 1000 + 10)
    step, scoring = target.step_bytes(32), target.scoring_bytes
    assert target.weights == weights and step is not None and scoring is not None
    assert weights < step < weights + 4 * activations
    assert weights + 4 * 7 * (64 + 1000) < scoring < weights + 4 * 7 * (64 + 3 * 1000)
    digits, large = (
        collection_need(task_config(name="digits", image_size=32, network=name)) for name in ("cnn", "convnext-large")
    )
    assert digits is not None and digits.host < GIB / 10
    assert large is not None and large.host > 4 * 4 * 196_000_000
    assert collection_need(task_config(name="imagenet", network="nothing")) is None
    small = task_config(name="imagenet", network="test_vit", image_size=160, batch_size=4, checkpoints=3)
    planned = plan_collection(small)
    assert planned is not None and planned.disk == 3 * 4 * 371_240 and planned.processes == 1
    assert plan_collection(task_config(name="imagenet", network="test_vit", image_size=100)) is None  # it takes 160


def test_groups_are_trained_in_as_many_processes_as_memory_and_device_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "num_cores", lambda: 16)
    monkeypatch.setattr(collection, "free_memory", lambda: 1000 * GIB)
    config = Config.load("configs/cifar10_unseen.yaml")
    planned = plan_collection(config)
    assert planned is not None and planned.processes == 16 and planned.groups == 256
    assert 3 * GIB < planned.need.host < 7 * GIB  # 100 of the 500 images at a time, of one network of four
    assert planned.disk == pytest.approx(1022 * 5 * 4 * 5_524_802, rel=1e-3)
    monkeypatch.setattr(collection, "free_memory", lambda: 16 * GIB)
    assert 2 <= planned.processes <= 4
    monkeypatch.setattr(collection, "free_memory", lambda: GIB)
    assert planned.processes == 1
    changes = {"network": "test_vit", "image_size": 160, "finetune": {**RECIPE, "images_at_a_time": 10}}
    small = task_config(name="cifar10_subsets", **changes)
    few, all_ = (
        plan_collection(small),
        plan_collection(task_config(name="cifar10_subsets", **changes | {"finetune": RECIPE})),
    )
    assert few is not None and all_ is not None and all_.need.host > few.need.host + 20 * (1 << 20)
    monkeypatch.setattr(measuring, "task_device", lambda name: torch.device("cuda"))
    on_gpu = plan_collection(small)
    assert on_gpu is not None and on_gpu.processes == 1
    assert on_gpu.need.host < GIB < on_gpu.need.device


def test_the_plan_shows_what_collecting_takes(rpg: Run, tmp_path: Path) -> None:
    config = small_config(tmp_path, task={"name": "digits", "network": "cnn", "runs": 2, "steps": 3, "image_size": 8})
    config.save(tmp_path / "config.yaml")
    code, said, _ = rpg("plan", tmp_path / "config.yaml")
    assert code == 0 and "collecting the zoo" in said
    assert f"{6 * 4 * 3658 / 1024:.1f} KiB" in said.split("the zoo on disk")[1]


def test_a_complete_zoo_of_tasks_needs_nothing_more(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo", condition_size=2)
    task = {"name": "digits_subsets", "tasks": zoo.num_runs + 4}
    config = Config.parse({"run": "r", "zoo": str(zoo.path), "task": task}, "t")
    assert collection_need(config) is not None
    complete = config.model_copy(update={"task": config.task.model_copy(update={"tasks": zoo.num_runs})})  # type: ignore
    assert collection_need(complete) is None


def test_evaluation_counts_the_network_that_is_scored(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path, train={"steps": 2})
    train(config, say=lambda _: None)
    plain = evaluation_need(config.run)
    task = {"name": "imagenet", "network": "test_vit", "image_size": 160, "batch_size": 64, "device": "cpu"}
    with_task = Config.parse({**config.model_dump(mode="json"), "task": task}, "t")
    with_task.save(Path(config.run) / "generator" / "config.yaml")
    scored, target = evaluation_need(config.run), find_target(with_task.task)
    assert plain is not None and scored is not None and target is not None
    assert scored.host - plain.host == target.scoring_bytes
    assert target.scoring_bytes is not None and target.scoring_bytes > target.weights + 64 * 3 * 160 * 160 * 4


def test_a_plan_that_fails_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("no shape for this\nand more")

    guard(fail, ignore=False)
    said = capsys.readouterr().out
    assert "could not be estimated (RuntimeError: no shape for this)" in " ".join(said.split()) and "more" not in said


def test_commands_stop_before_they_begin(rpg: Run, tmp_path: Path, one_mebibyte: None) -> None:
    make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path, train={"steps": 2})
    config.save(tmp_path / "config.yaml")
    train_command = ("train", tmp_path / "config.yaml", "--device", "cpu")
    refused(
        rpg(*train_command, "--set", "model.denoiser.hidden=4096"),
        "training needs",
        "GiB of memory are free",
        "--ignore-memory",
    )
    assert not (tmp_path / "run").exists()
    assert rpg(*train_command, "--ignore-memory")[0] == 0
    wide = ("--set", "model.denoiser.hidden=4096", "--set", f"run={tmp_path / 'wide'}")
    assert rpg(*train_command, *wide, "--ignore-memory")[0] == 0
    refused(rpg("generate", tmp_path / "wide", "--device", "cpu"), "generating needs")
    assert not (tmp_path / "wide" / "generated").exists()
    assert rpg("generate", tmp_path / "wide", "--device", "cpu", "--ignore-memory")[0] == 0
    refused(rpg("evaluate", tmp_path / "wide", "--score", "mine:score"), "evaluating needs")
    collect = {
        "run": "r",
        "zoo": str(tmp_path / "new"),
        "task": {"name": "digits", "network": "cnn", "train_steps": 2, "batch_size": 1024, "steps": 1},
    }
    Config.parse(collect, "t").save(tmp_path / "collect.yaml")
    refused(rpg("collect", tmp_path / "collect.yaml"), "collecting needs")
    assert not (tmp_path / "new").exists() and rpg("collect", tmp_path / "collect.yaml", "--ignore-memory")[0] == 0
