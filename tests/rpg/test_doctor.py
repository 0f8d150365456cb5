"""What `rpg` says of itself and of the machine: doctor, version, completion, start-up."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import packaging
import pytest
import torch
import yaml
from packaging.requirements import Requirement

import rpg as package
from rpg import packages
from rpg.planning import machine
from tests.rpg.conftest import Run, refused

tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
ROOT = Path(__file__).parents[2]


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rpg", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, **environment})


def test_doctor_says_what_is_here_and_what_a_lack_costs(rpg: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = rpg("doctor")
    assert (code, err) == (0, "")
    assert (
        f"torch {torch.__version__.partition('+')[0]}" in " ".join(out.split())
        and "device cpu: " in out
        and "free in" in out
    )
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
    assert not features["DeepSpeed"]["found"] and "pip install 'deepspeed>=0.19'" in features["DeepSpeed"]["note"]


def test_doctor_names_what_is_too_old_and_how_to_cure_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.unmet() == []
    known = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: {"torch": "2.4.1", "timm": None}.get(name, known(name)))
    assert set(packages.unmet()) == {
        "timm is missing; run pip install 'timm>=1.0'",
        "torch is 2.4.1, which is too old; run pip install 'torch>=2.6'",
    }


def test_doctor_finds_other_projects_that_overwrite_the_modules(rpg: Run, tmp_path: Path) -> None:
    """Applies the cure in an environment of its own, where a project called rpg was installed after this one."""
    packages_of = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    venv.create(tmp_path)
    for name, number in (("rpg", "2.0.3"), ("rpg-weights", "0.1")):
        info = packages_of / f"{name.replace('-', '_')}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    (info / "direct_url.json").write_text('{"url": "file:///home/me/checkout", "dir_info": {"editable": true}}')
    python = [tmp_path / "bin" / "python", "-c", "import rpg.packages; print(*rpg.packages.unmet(), sep='\\n')"]
    paths = f"{ROOT}{os.pathsep}{Path(packaging.__file__).parents[1]}"

    def unmet() -> list[str]:
        made = subprocess.run(python, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
        assert made.returncode == 0, made.stderr
        return made.stdout.split("\n")

    (packages_of / "paths.pth").write_text(paths.replace(os.pathsep, "\n"))
    what, _, cure = next(line for line in unmet() if "overwrite" in line).partition("; run ")
    assert what == "the package rpg 2.0.3 is installed, and its modules overwrite or hide those of rpg-weights"
    uninstall, reinstall = cure.split(" && ")
    assert reinstall == "pip install --force-reinstall --no-deps -e /home/me/checkout"
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "bin" / "python"]
    subprocess.run([*pip, *uninstall.split()[1:]], check=True, capture_output=True)
    assert not any("overwrite" in line for line in unmet())


def test_another_tokenization_on_the_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenization").mkdir()
    (tmp_path / "tokenization" / "__init__.py").write_text("")
    command = [Path(sys.executable).with_name("rpg"), "--version"]
    made = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert made.returncode == 1
    assert f"{tmp_path}/tokenization/__init__.py is another package's tokenization" in made.stderr.splitlines()[-1]


def test_cures_name_packages_and_work(rpg: Run) -> None:
    """Every package that is optional: pip takes the command as it stands, and finds its requirement met where it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = {line for extra in project["optional-dependencies"].values() for line in extra}
    for line in optional:
        requirement = Requirement(line)
        cure = shlex.split(packages.install_command(requirement.name))
        assert cure[:2] == ["pip", "install"] and [Requirement(cure[2])] == [
            Requirement(f"{requirement.name}{requirement.specifier}")
        ]
    there = [Requirement(line).name for line in sorted(optional) if packages.installed(Requirement(line).name)]
    cure = shlex.split(packages.install_command(*there))
    subprocess.run([sys.executable, "-m", *cure, "--no-index", "--no-deps"], check=True, capture_output=True)


def test_no_cure_names_an_extra_of_ours() -> None:
    """``rpg`` on the package index is another project; versions in the documentation are those of the metadata."""
    named = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    texts = {
        name: (ROOT / name).read_text() for name in named if name.endswith((".py", ".md", ".sh", ".ipynb", ".yaml"))
    }
    extra = re.compile(r"\brpg(-weights)?\[[a-z0-9]+\]|pip install '?rpg")
    assert [name for name, text in texts.items() if extra.search(text) and name != "tests/rpg/test_doctor.py"] == []
    for name, text in texts.items():
        for line in re.findall(r"pip install ((?:'[\w.-]+>=[\w.]+' ?)+)", text) if name.endswith(".md") else ():
            found = [Requirement(each).name for each in shlex.split(line)]
            assert f"pip install {line.strip()}" == packages.install_command(*found), name


def test_the_version_is_said_in_one_place(rpg: Run) -> None:
    assert rpg("--version") == (0, f"rpg {package.__version__}\n", "")
    assert packages.installed("rpg-weights") == package.__version__
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
