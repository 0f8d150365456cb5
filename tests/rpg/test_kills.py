"""Every command that writes, killed at random moments, or on disks that are full, may only be read, or that another
command writes: what has its name is whole, and a second start ends as one that nobody disturbed. ``-m slow`` kills a
hundred times; a few kills are enough to see that nothing has come loose."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from rpg.config import Config
from rpg.generation.folders import FILES
from rpg.training.run_folder import RunFolder, check_folder
from tests.conftest import small_config
from tests.locks import written_elsewhere
from tests.rpg.commands import CASES, CONFIGS, write_configs
from tests.rpg.conftest import Run, refused
from tests.rpg.forks import ForkServer
from tests.rpg.training.test_faults import assert_same_run
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.zoo.locks import lock_file
from tokenization.zoo.zoo import Zoo

FEW = {"collect": 2, "generate": 2}
MANY = {
    "collect": 13, "align": 12, "train": 13, "generate": 13, "evaluate": 12, "export-torch": 6, "export-timm": 6,
    "unseen": 13, "lora": 12,
}  # fmt: skip


# --- what is whole, and what is equal -------------------------------------------------------------------------------


def visible(folder: Path) -> list[Path]:
    """Files whose names, and whose folders' names, are final."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def assert_whole(folder: Path) -> None:
    """Nothing that has its final name is partial."""
    readers: dict[str, Callable[[Path], object]] = {
        ".safetensors": load_file,
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".yaml": lambda path: yaml.safe_load(path.read_text())["run"],
        ".pth": partial(torch.load, weights_only=True),
        ".png": lambda path: Image.open(path).load(),
        ".html": lambda path: path.read_text().rstrip().index("</html>"),
        ".md": lambda path: path.read_text()[0],
        ".csv": lambda path: path.read_text().rindex("\n", -1),
    }
    for path in visible(folder):
        if "tensorboard" not in path.parts and path.name != "log":
            assert path.suffix == ".jsonl" or path.stat().st_size, path  # a log is empty before its first line
            readers[path.suffix](path)
    for zoo in ("zoo", "aligned"):
        if (folder / zoo / "zoo.json").exists() and len(opened := Zoo.open(folder / zoo)):
            opened.verify()
    for adapter in [*folder.glob("zoo/checkpoints/*/"), *folder.glob("new/network-*/")]:
        assert (adapter / CONFIG_NAME).exists() and (adapter / "adapter_model.safetensors").exists()
    for generator in folder.glob("**/generator/"):
        assert all((generator / name).is_file() for name in FILES)
    for step in folder.glob("run/checkpoints/step-*/"):
        assert check_folder(step) is None, step


def content(folder: Path) -> dict[str, Any]:
    """What stands in a folder but for times; hidden files too, of which none should be left."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "tensorboard" in path.parts or path.suffix == ".html":
            found[name if "tensorboard" not in path.parts else ""] = None
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = {key: value for key, value in (file.metadata() or {}).items() if key != "rpg"}
            found[name] = metadata, {key: value.numpy().tobytes() for key, value in load_file(path).items()}
        elif path.suffix == ".md":
            found[name] = [line for line in path.read_text().splitlines() if "seconds" not in line]
        else:
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    """JSON without what counts seconds."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if "seconds" not in key}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def assert_same(folder: Path, other: Path) -> None:
    mine, theirs = content(folder), content(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


# --- the kills ------------------------------------------------------------------------------------------------------


def kill(forks: ForkServer, prepared: Path, folder: Path, name: str, times: int) -> None:
    """Kill a command ``times`` times at random moments of its work; compare whenever it came to its end."""
    case, clock = CASES[name], random.Random(name)
    arguments = [each.replace("INPUT", str(prepared)) for each in case.arguments.split()]
    whole, log = folder / "whole", folder / "log"

    def run(work: Path, seconds: float | None = None) -> int:
        process = forks.start(work, *arguments, log=log)
        if seconds is not None:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):  # it was done
                os.kill(process, signal.SIGKILL)
        return forks.finish()

    write_configs(whole)
    started = time.monotonic()
    assert run(whole) == 0, log.read_text()
    seconds, kills, number = time.monotonic() - started, 0, 0
    while True:
        work = folder / f"killed-{number}"
        write_configs(work)
        status = run(work, clock.uniform(0, seconds) if kills < times else None)
        assert status in (0, -signal.SIGKILL), log.read_text()
        kills += status == -signal.SIGKILL
        assert_whole(work)
        if status == 0 or (case.output and (work / case.output).exists()):
            number += 1
            if status == 0:
                assert_same(work, whole)
                if kills >= times:
                    return
            shutil.rmtree(work)


@pytest.mark.parametrize("name", FEW)
def test_a_few_kills_change_nothing(forks: ForkServer, prepared: Path, tmp_path: Path, name: str) -> None:
    kill(forks, prepared, tmp_path, name, FEW[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_a_hundred_kills_change_nothing(forks: ForkServer, prepared: Path, tmp_path: Path, name: str) -> None:
    assert sum(MANY.values()) == 100
    kill(forks, prepared, tmp_path, name, MANY[name])


# --- training -------------------------------------------------------------------------------------------------------


def long_config(folder: Path, run: str) -> Config:
    """Some seconds of training and many saves."""
    return small_config(folder, run=str(folder / run), train={"steps": 90, "save_every": 3, "log_every": 2})


def start(forks: ForkServer, config: Config) -> int:
    """Begin a run, or go on with it; what it says goes to ``<run>.log``."""
    config.save(f"{config.run}.yaml")
    arguments = ("train", f"{config.run}.yaml", "--resume", "--ignore-memory")
    return forks.start(Path(config.run).parent, *arguments, log=Path(f"{config.run}.log"))


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_points_change_nothing(tmp_path, zoo, forks, times):
    whole, killed = long_config(tmp_path, "whole"), long_config(tmp_path, "killed")
    started = time.monotonic()
    start(forks, whole)
    assert forks.finish() == 0
    seconds = time.monotonic() - started
    clock, folder, kills, saved = random.Random(0), RunFolder(killed.run), 0, 0
    while kills < times:
        process = start(forks, killed)
        time.sleep(clock.uniform(0, seconds / 6))
        with contextlib.suppress(ProcessLookupError):  # it was done
            os.kill(process, signal.SIGKILL)
        status = forks.finish()
        newest = folder.newest()
        assert newest is None or newest[0] >= saved  # a save is never lost
        said = re.search(r"going on after step (\d+)", Path(f"{killed.run}.log").read_text())
        assert not said or int(said[1]) == saved  # and it went on from the last one
        saved = newest[0] if newest else 0
        kills += status == -signal.SIGKILL
        if status == 0:  # done before its kill: once more from the beginning
            assert_same_run(killed.run, whole.run)
            killed, saved = long_config(tmp_path, f"killed-{kills}"), 0
            folder = RunFolder(killed.run)
    start(forks, killed)
    assert forks.finish() == 0
    assert_same_run(killed.run, whole.run)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_as_interrupted(tmp_path, zoo, forks, name):
    config = long_config(tmp_path, "run")
    process, folder = start(forks, config), RunFolder(config.run)
    while not folder.steps():
        time.sleep(0.01)
    os.kill(process, getattr(signal, name))
    assert forks.finish() == 130
    stopped = re.search(
        r"stopped after step (\d+) of 90; continue with --resume", Path(f"{config.run}.log").read_text()
    )
    assert stopped and folder.newest()[0] == int(stopped[1])


# --- disks ----------------------------------------------------------------------------------------------------------


def mount(*arguments: object) -> None:
    """Mount something. Skips the test where that is not permitted."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder to mount something on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", "--lazy", folder], capture_output=True)


def run_on(forks: ForkServer, prepared: Path, folder: Path, name: str, log: Path) -> int:
    arguments = [each.replace("INPUT", str(prepared)) for each in CASES[name].arguments.split()]
    forks.start(folder, *arguments, log=log)
    return forks.finish()


def fill_up(forks: ForkServer, prepared: Path, disk: Path, name: str, sizes: list[int]) -> None:
    """Run a command on disks of so many KiB, then give it room; without sizes on larger ones until one is enough."""
    whole, log = disk.parent / "whole", disk.parent / "log"
    write_configs(whole)
    assert run_on(forks, prepared, whole, name, log) == 0, log.read_text()
    for size in sizes or [24 << 2 * n for n in range(8)]:
        mount("-t", "tmpfs", "-o", f"size={size}k", "none", disk)
        write_configs(disk)
        status = run_on(forks, prepared, disk, name, log)
        said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert "Traceback" not in log.read_text(), log.read_text()
        assert_whole(disk)
        if status:
            assert status == 2 and len(said) == 1 and "no space left" in said[0].lower(), log.read_text()
            mount("-o", "remount,size=200m", disk)
            assert run_on(forks, prepared, disk, name, log) == 0, log.read_text()
        assert_same(disk, whole)
        subprocess.run(["umount", disk], check=True)
        if status == 0:
            assert not sizes
            return
    assert sizes


@pytest.mark.parametrize(("name", "size"), [("collect", 40), ("generate", 96), ("export-torch", 24)])
def test_a_full_disk_is_one_line(forks, prepared, disk, name, size):
    fill_up(forks, prepared, disk, name, [size])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_disks_of_every_size(forks, prepared, disk, name):
    fill_up(forks, prepared, disk, name, [])


def test_what_may_only_be_read_is_read(forks, prepared, disk, tmp_path):
    """Training, scoring and generating from it go on elsewhere; caches that cannot be written are done without."""
    mount("--bind", prepared, disk)
    mount("-o", "remount,bind,ro", disk)
    log, work = tmp_path / "log", tmp_path / "work"
    write_configs(work)
    zoo, run = disk / "zoo", disk / "run"
    works = [
        f"collect digits.yaml --set zoo={zoo}",  # it is whole
        f"train digits.yaml --ignore-memory --set zoo={zoo} --set tokens.rank=2",
        f"generate {run} --output {work}/new --device cpu",
        f"evaluate {run} --num 2 --output {work}/scores --device cpu",
        f"align {zoo} {work}/aligned",
        f"export {run} --to torch --output {work}/out.pth",
        f"inspect {zoo}",
    ]

    def run_to_end(command: str) -> int:
        forks.start(work, *command.split(), log=log)
        return forks.finish()

    for command in works:
        assert run_to_end(command) == 0, log.read_text()
    refuses = [
        f"train digits.yaml --ignore-memory --set zoo={zoo} --set run={run} --overwrite",
        f"train {run}/config.yaml --ignore-memory --set run={run} --resume",
        f"generate {run} --device cpu",
        f"evaluate {run} --num 2 --device cpu",
        f"collect digits.yaml --set zoo={zoo} --set task.steps=4",
        f"collect digits.yaml --set zoo={disk}/new",
        f"align {zoo} {disk}/aligned",
        f"export {run} --to torch --output {disk}/out.pth",
    ]
    for command in refuses:
        assert run_to_end(command) == 2, log.read_text()
        (said,) = log.read_text().splitlines()
        assert said.startswith("error: ") and str(disk) in said, said


def test_what_another_command_writes_is_left_to_it(rpg: Run, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_configs(tmp_path)
    shutil.copytree(prepared / "zoo", tmp_path / "whole")
    shutil.copytree(prepared / "run", tmp_path / "run")
    taken = ["zoo", "run", "new"]
    locks = [*(lock_file(name) for name in taken), lock_file("out.pth", beside=True), lock_file("al", beside=True)]
    with written_elsewhere(*locks) as holder:
        for command in (
            "collect digits.yaml",
            "collect --from whole/checkpoints --zoo zoo",
            "align whole al",
            "train digits.yaml --ignore-memory --set zoo=whole --overwrite",
            "train digits.yaml --ignore-memory --set zoo=whole --resume --compare",
            "generate run --output new --device cpu",
            "evaluate run --device cpu",
            "evaluate whole --device cpu --output new",
            "export run --to torch --output out.pth",
            "unseen unseen.yaml --device cpu",
            "lora lora.yaml --device cpu",
            "fields --set run=run --set zoo=none",
            "metric --set run=run --set zoo=none",
            "demo --set run=run --set zoo=none",
        ):
            refused(rpg(*command.split()), "is being written", f"process {holder.pid}", "wait for its end")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == sorted(
        [*taken, "whole", *(f"{name}.yaml" for name in CONFIGS)]
    )
    assert len(Zoo.open(tmp_path / "whole")) == 6
