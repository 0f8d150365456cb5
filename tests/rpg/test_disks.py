"""Disks that are full, that may only be read, or that another command writes: one line, and going on works."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.locks import written_elsewhere
from tests.rpg.commands import CASES, CONFIGS, write_configs
from tests.rpg.conftest import Run, refused
from tests.rpg.forks import ForkServer
from tests.rpg.test_kills import assert_same, assert_whole
from tokenization.zoo.locks import lock_file
from tokenization.zoo.zoo import Zoo


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
