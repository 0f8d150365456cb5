"""scripts/check_gpu.sh runs every check that it promises, and a check sees what it is there for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rpg.models import mamba2

SCRIPTS = Path(__file__).parent.parent / "scripts"
SCRIPT = SCRIPTS / "check_gpu.sh"
LAUNCHERS = {path.stem for path in Path("configs/accelerate").glob("*.yaml")} - {"cpu"}
COMPARED = {"generate_bytes", "losses"}
ON_DEVICE = {"mamba2", "mamba2_fused", "unet", "bf16"}
STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> {log}
case "$*" in
  *device_count*) echo 2;;
  *--set\\ run=*) run=$(echo "$*" | sed 's/.*--set run=\\([^ ]*\\).*/\\1/')
    mkdir -p "$run/generator" "$run/checkpoints/step-00000040";;
  *--output*) mkdir -p "${{*##*--output }}";;
esac
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The commands of a whole run on two GPUs, none of which is carried out."""
    folder = tmp_path_factory.mktemp("check_gpu")
    for name in ("python", "rpg", "accelerate-launch"):
        (folder / name).write_text(STUB.format(log=folder / "log"))
        (folder / name).chmod(0o755)
    environment = {**os.environ, "BIN": str(folder), "RUNS": str(folder / "runs"), "DEVICE": "cuda"}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "left out: none" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count(": right\n") == len(listed())
    return (folder / "log").read_text().splitlines()


def listed() -> list[str]:
    return subprocess.run(["bash", SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout.split()


def test_every_launcher_trains_a_mamba_generator(recorded: list[str]) -> None:
    """Whole and resumed; and its losses are compared."""
    trained = [line for line in recorded if line.startswith("accelerate-launch") and "-m rpg train" in line]
    assert all("model.backbone.kind=mamba2" in line for line in trained)
    compared = [line for line in recorded if "gpu_checks.py losses" in line]
    for name in LAUNCHERS:
        runs = [line for line in trained if f"configs/accelerate/{name}.yaml" in line]
        assert runs, f"{name} is never launched"
        if name != "single_gpu":
            assert any("--resume" in line for line in runs), f"nothing is resumed by {name}"
            assert {f"--run {name}", f"--run {name}-resumed"} <= {line[line.index("--run ") :] for line in compared}
    for setting in ("train.compile=inductor", "train.precision=bf16"):
        assert any(setting in line for line in trained)
    layer = dict(each.split("=") for each in trained[0].split() if each.startswith("model.backbone.d_"))
    width, state, heads = int(layer["model.backbone.d_model"]), int(layer["model.backbone.d_state"]), 32
    made = mamba2.Mamba2(width, d_state=state, headdim=heads)
    assert made.in_proj.out_features % 8 == 0 and f"model.backbone.headdim={heads}" in trained[0], "no kernel takes it"


def test_everything_promised_is_compared(recorded: list[str]) -> None:
    made = {line.split("gpu_checks.py ")[1].split()[0] for line in recorded if "gpu_checks.py" in line}
    assert made == COMPARED
    assert all("--device cuda" in line for line in recorded if "gpu_checks.py" in line)
    two = [line for line in recorded if "-m rpg generate" in line]
    assert any("ddp.yaml --num_processes 2" in line for line in two) and len(two) == 2
    tests = [line for line in recorded if "-m pytest" in line]
    assert {line.split("test_device.py::test_")[1] for line in tests if "test_device" in line} == ON_DEVICE
    tested = next(line for line in tests if "test_device" not in line)
    assert all(f"test_{name}.py" in tested and Path(f"tests/rpg/models/test_{name}.py").exists()
               for name in ("mamba2", "backbone", "denoiser", "unet1d"))  # fmt: skip


def test_the_list_is_what_is_run() -> None:
    text = SCRIPT.read_text()
    assert sorted(listed()) == sorted(line[6 : line.index("()")] for line in text.splitlines() if line[:6] == "check_")
    assert all(yaml.safe_load(Path(f"configs/accelerate/{name}.yaml").read_text()) for name in LAUNCHERS)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "gpu_checks", raising=False)
    import gpu_checks

    return gpu_checks


def test_other_losses_are_seen(checks, tmp_path: Path) -> None:
    for number, name in enumerate((checks.REFERENCE, "two"), 1):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"loss": {number}}}\n')
    with pytest.raises(AssertionError, match="other losses than one process"):
        checks.check_losses(tmp_path, "two", 1e-3, torch.device("cpu"))


@pytest.mark.slow
def test_what_a_machine_without_a_gpu_can_show(tmp_path: Path) -> None:
    """All but the kernels, launched for real."""
    environment = {
        **os.environ,
        "BIN": str(Path(sys.executable).parent),
        "RUNS": str(tmp_path / "runs"),
        "DEVICE": "cpu",
    }
    environment["PYTHONPATH"] = "."
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].endswith("left out: mamba2_fused")
