"""The package as built and installed, far from the checkout: ``make package``; PACKAGE_TORCH=2.6 for that version.

Without PACKAGE_TORCH the versions are those of ``constraints.txt``, which uv has in its cache already.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import rpg
from rpg.generation.folders import FILES

ROOT = Path(__file__).parent.parent
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}") or "uv"
CONFIGS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
SMALL = [
    "task.seen=8",
    "task.validation=2",
    "task.unseen=2",
    "task.generalist.steps=20",
    "task.specialist.steps=20",
    "train.steps=20",
]

SCRIPT = """
import os, pathlib, rpg
from rpg.cli.making import load
config = load(pathlib.Path("configs/large/vit_base.yaml"), None)  # the package's own
print(os.getcwd(), rpg.__file__, config.task.network, rpg.Generator, rpg.Zoo)
"""

Command = Callable[..., str]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from the source archive, beside it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([UV, "build", "--quiet", "--out-dir", folder, ROOT], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def away(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Run a command of a fresh environment that has the wheel, in an empty folder."""
    folder, empty = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("away")
    torch = os.environ.get("PACKAGE_TORCH")
    versions = [f"torch=={torch}.*"] if torch else ["--constraint", str(ROOT / "constraints.txt")]
    (wheel,) = dist.glob("*.whl")
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [UV, "pip", "install", "--quiet", "--python", python, *versions, wheel], cwd=empty, check=True, timeout=1200
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(name: str, *arguments: str) -> str:
        command = [python.parent / name, *arguments]
        made = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=600)
        assert made.returncode == 0, made.stdout + made.stderr
        return made.stdout

    return run


@pytest.mark.package
def test_wheel_and_source_carry_the_configurations(dist: Path) -> None:
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert wheel.name.startswith(f"rpg_weights-{rpg.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [
        each for each in zipfile.ZipFile(wheel).infolist() if each.filename.startswith("rpg/generators/sensors/")
    ]
    assert {f"rpg/generators/sensors/{name}" for name in FILES} <= {each.filename for each in shipped}
    assert sum(each.file_size for each in shipped) < 2_000_000
    assert {f"rpg/{name}" for name in CONFIGS} <= names and "rpg/__main__.py" in names
    assert not any(name.startswith(("tests/", "docs/")) for name in names)
    with tarfile.open(source) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert CONFIGS | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= members
    assert not any(name.startswith((".venv/", "runs/")) for name in members)


@pytest.mark.package
def test_an_installed_package_works_far_from_the_checkout(away: Command) -> None:
    said = away("python", "-c", SCRIPT)
    where, file, network = said.split()[:3]
    assert network == "vit_base_patch16_224"
    assert "site-packages" in file and str(ROOT) not in said
    assert away("rpg", "--version") == away("python", "-m", "rpg", "--version") == f"rpg {rpg.__version__}\n"
    assert "Networks for unseen tasks" in away("rpg", "unseen", "--help")
    found = json.loads(away("rpg", "doctor", "--json"))
    assert found["unmet"] == []
    assert found["versions"]["torch"].startswith(os.environ.get("PACKAGE_TORCH", ""))
    said = away("rpg", "generate", "sensors", "--setting", "angle=137", "--output", "mine")
    assert "sensors is the generator that comes with rpg" in said and "expected error" in said
    assert [path.name for path in (Path(where) / "mine").glob("*.safetensors")] == ["network-00000.safetensors"]
    said = away("rpg", "demo", *(word for change in SMALL for word in ("--set", change)))
    run = Path(where) / "runs" / "demo"
    assert "runs/demo" in said and json.loads((run / "evaluation.json").read_text())["kinds"]["generated"]["count"] == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["zoo"] == "runs/zoos/demo"


def test_the_check_is_run() -> None:
    assert re.search(r"^make .*\bpackage\b", (ROOT / ".ci" / "run").read_text(), re.M)
    assert "tests/test_packages.py" in (ROOT / "Makefile").read_text()
