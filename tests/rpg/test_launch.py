"""Real launches: accelerate's own launcher, and two processes through torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rpg.training import train
from tests.conftest import small_config

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def losses(run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def launch(*command: str) -> None:
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=300, stdout=subprocess.DEVNULL)


def test_accelerate_launch_is_the_same_code(tmp_path, zoo):
    config = small_config(tmp_path, run=str(tmp_path / "launched"))
    config.save(tmp_path / "config.yaml")
    launch(
        str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
        "scripts/train.py", str(tmp_path / "config.yaml"), "--set", "train.steps=7",
    )  # fmt: skip
    here = small_config(tmp_path, run=str(tmp_path / "here"), train={"steps": 7})
    train(here)
    assert losses(config.run) == losses(here.run)
    launched, local = (load_file(Path(run) / "generator" / "model.safetensors") for run in (config.run, here.run))
    assert all(launched[name].equal(local[name]) for name in local)


def test_two_processes_give_the_losses_of_one(tmp_path, zoo):
    one = small_config(tmp_path, run=str(tmp_path / "one"))
    train(one)
    two = small_config(tmp_path, run=str(tmp_path / "two"))
    two.save(tmp_path / "two.yaml")
    launch(str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", "0", "--nnodes", "1", "--rdzv_backend",
           "c10d", "--rdzv_endpoint", "localhost:0", "scripts/train.py", str(tmp_path / "two.yaml"))  # fmt: skip
    assert losses(two.run) == pytest.approx(losses(one.run), abs=1e-5)
    first, second = (load_file(Path(run) / "generator" / "model.safetensors") for run in (one.run, two.run))
    for name in first:
        assert second[name].sub(first[name]).abs().max() < 1e-5, name
