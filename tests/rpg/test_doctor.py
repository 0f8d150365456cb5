"""What `rpg` says of itself and of the machine: doctor, version, completion, start-up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import rpg as package
from rpg.planning import machine, versions
from tests.rpg.conftest import Run, refused


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rpg", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, **environment})


def test_doctor_says_what_is_here_and_what_a_lack_costs(rpg: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = rpg("doctor")
    assert (code, err) == (0, "")
    assert f"torch {torch.__version__.partition('+')[0]}" in out and "device cpu: " in out and "free in" in out
    assert "– Mamba-2 kernels: mamba2 backbones run in plain PyTorch" in out or torch.cuda.is_available()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, err = rpg("doctor", "--json")
    found = json.loads(out)
    assert list(found) == ["versions", "unmet", "devices", "features", "memory", "disks", "hub"]
    assert found["versions"]["rpg"] == package.__version__ and found["versions"]["mamba-ssm"] is None
    assert 0 < found["memory"]["free"] <= found["memory"]["total"] and found["devices"][0]["name"] == "cpu"
    assert all(0 < each["free"] <= each["total"] for each in found["disks"].values())
    assert {each["name"] for each in found["features"]} >= {"GPU", "bitsandbytes", "DeepSpeed", "bf16 LSTM"}
    assert "hf_secret" not in out and found["hub"]["logged_in"]
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    features = {each["name"]: each for each in machine.features()}
    assert not features["DeepSpeed"]["found"] and "rpg[deepspeed]" in features["DeepSpeed"]["note"]


def test_doctor_names_what_is_too_old_and_how_to_cure_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.unmet() == []
    known = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: {"torch": "2.4.1", "timm": None}.get(name, known(name)))
    assert set(versions.unmet()) == {
        "timm is missing; run pip install 'timm>=1.0'",
        "torch is 2.4.1, which is too old; run pip install 'torch>=2.6'",
    }


def test_the_version_is_said_in_one_place(rpg: Run) -> None:
    assert rpg("--version") == (0, f"rpg {package.__version__}\n", "")
    assert versions.installed("rpg") == package.__version__
    citation = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0" and "version" not in citation


def test_shells_complete_commands_and_mistakes_stay_one_line(rpg: Run, tmp_path: Path) -> None:
    words = {"_RPG_COMPLETE": "complete_bash", "COMP_WORDS": "rpg ge", "COMP_CWORD": "1"}
    assert process(**words).stdout.split() == ["generate"]
    named = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # not the shell of the tests
    installed = process("--install-completion", "bash", **named)
    assert installed.returncode == 0, installed.stderr
    assert "_RPG_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "rpg.sh").read_text()
    refused(rpg("genrate"), "No such command", "see `rpg --help`")
    refused(rpg("--nothing"), "No such option", "see `rpg --help`")


def test_the_start_loads_nothing_slow() -> None:
    """Modules and not seconds, which other programs on the machine decide; `rpg --help` takes 0.2 s of processor."""
    script = "import sys, rpg.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60).stdout.split()
    slow = {
        "torch",
        "numpy",
        "pydantic",
        "huggingface_hub",
        "transformers",
        "matplotlib",
        "yaml",
        "psutil",
        "packaging",
    }
    assert slow.isdisjoint(loaded)
    assert len(loaded) < 400
