"""Every command that writes, killed at random moments: what has its name is whole, and a second start ends as one
that nobody disturbed. ``-m slow`` kills a hundred times; a few kills are enough to see that nothing has come loose."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from rpg.generation.folders import FILES
from rpg.training.run_folder import check_folder
from tests.rpg.commands import CASES, write_configs
from tests.rpg.forks import ForkServer
from tokenization.lora.adapter import CONFIG_NAME
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
