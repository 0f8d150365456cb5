"""A folder has one writer at a time; a lock outlives no process of this machine, and judges none of another one."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

from tokenization.errors import InputError
from tokenization.zoo.locks import LOCK_NAME, Holder, lock_file, locked, locks


@pytest.fixture
def other() -> Iterator[Holder]:
    """A process that lives beside this one."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield Holder(platform.node(), process.pid, psutil.Process(process.pid).create_time(), "rpg train")
    process.communicate(b"\n")


def write_lock(folder: Path, holder: Holder) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / LOCK_NAME).write_text(json.dumps(asdict(holder)))
    return folder / LOCK_NAME


def test_a_folder_that_is_written_is_refused_and_left_alone(tmp_path: Path, other: Holder) -> None:
    file = write_lock(tmp_path, other)
    with pytest.raises(InputError) as caught, locked(tmp_path):
        pytest.fail("it was taken")
    assert f"process {other.pid}" in str(caught.value) and "'rpg train'" in str(caught.value)
    assert "wait for its end" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert Holder.parse(file.read_bytes()) == other


def test_the_lock_names_this_process_and_goes_with_what_was_made_for_it(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "folder"):
        holder = Holder.parse((tmp_path / "new" / "folder" / LOCK_NAME).read_bytes())
        assert holder == Holder.current() and holder.pid == os.getpid() and holder.host == platform.node()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "file").touch()
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "file"]


def test_a_lock_may_be_taken_again_and_by_processes_that_its_owner_starts(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "..", beside=False), locked(tmp_path):
            1 / 0  # noqa: B018
        assert (tmp_path / LOCK_NAME).exists()
        child = os.fork()
        if child == 0:
            with locked(tmp_path):
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert Holder.parse((tmp_path / LOCK_NAME).read_bytes()) == Holder.current()
    assert not (tmp_path / LOCK_NAME).exists()


def killed(tmp_path: Path) -> Holder:
    """What a process leaves that was killed with a lock."""
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    holder = Holder.parse((tmp_path / LOCK_NAME).read_bytes())
    assert holder is not None and holder.pid == child
    return holder


def test_a_lock_of_a_process_that_was_killed_is_taken_with_what_it_left(tmp_path: Path) -> None:
    holder = killed(tmp_path)
    (tmp_path / f".file.{holder.host}.{holder.pid}.partial").touch()
    (tmp_path / ".folder.replaced").mkdir()
    with locked(tmp_path):
        assert Holder.parse((tmp_path / LOCK_NAME).read_bytes()) == Holder.current()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_later_process_of_the_same_number_is_another_one(tmp_path: Path, other: Holder) -> None:
    write_lock(tmp_path, Holder(other.host, other.pid, other.started - 60, "rpg train"))
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_nobody_has_buried_is_gone(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    write_lock(tmp_path, Holder(platform.node(), child, psutil.Process(child).create_time(), "rpg train"))
    with locked(tmp_path):
        os.waitpid(child, 0)


@pytest.mark.parametrize("pid", [1, 2**22 + 1])
def test_another_machine_is_the_users_to_judge(tmp_path: Path, pid: int) -> None:
    file = write_lock(tmp_path, Holder("far-away", pid, 0.0, "rpg collect"))
    with pytest.raises(InputError) as caught, locked(tmp_path):
        pass
    assert f"process {pid} on far-away" in str(caught.value)
    assert str(caught.value).endswith(f"if that process is gone, delete {file}")
    file.unlink()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "a", "pid": null, "started": 1, "command": ""}'])
def test_what_a_kill_cut_short_holds_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_appears_as_a_whole_is_locked_beside_it(tmp_path: Path, other: Holder) -> None:
    with locked(tmp_path / "file.pth", beside=True):
        assert [path.name for path in tmp_path.iterdir()] == [".file.pth.lock"]
        (tmp_path / "file.pth").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]
    lock_file(tmp_path / "file.pth", beside=True).write_text(json.dumps(asdict(other)))
    with pytest.raises(InputError, match="file.pth is being written"), locked(tmp_path / "file.pth", beside=True):
        pass


def test_only_one_of_many_gets_a_lock_that_was_left(tmp_path: Path) -> None:
    """Each looks for another one while it has the lock; the first finds that of a process that was killed."""
    folder, num = tmp_path / "folder", 6
    killed(folder)
    go = tmp_path / "go"

    def compete() -> None:
        while not go.exists():
            pass
        for _ in range(40):
            try:
                with locked(folder):
                    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
                    (folder / "inside").unlink()
            except InputError as error:
                assert "is being written" in str(error)

    children = []
    for _ in range(num):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                compete()
                os._exit(0)
            except BaseException:
                os._exit(1)
    go.touch()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * num
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("refused", [False, True])
def test_launched_processes_share_one_lock(tmp_path: Path, other: Holder, refused: bool) -> None:
    """They enter together, or all of them are told."""
    folder = tmp_path / "folder"
    if refused:
        write_lock(folder, other)
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ["RANK"] = str(rank)
            place = {"init_method": f"file://{tmp_path}/store", "rank": rank, "world_size": 2}
            torch.distributed.init_process_group("gloo", **place)
            try:
                with locked(folder):
                    holder = Holder.parse((folder / LOCK_NAME).read_bytes())
                    assert holder is not None and (holder.pid == os.getpid()) == (rank == 0)
                    torch.distributed.barrier()
                os._exit(3)
            except InputError as error:
                os._exit(4 if f"process {other.pid}" in str(error) else 5)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ended == ([4, 4] if refused else [3, 3])
    assert (folder / LOCK_NAME).exists() == refused


def test_a_function_runs_with_the_lock_of_its_folder(tmp_path: Path) -> None:
    @locks(lambda folder, write=True: folder if write else None)
    def names(folder: Path, write: bool = True) -> list[str]:
        """Names in a folder."""
        return [path.name for path in folder.iterdir()]

    assert names(tmp_path) == [LOCK_NAME] and names(tmp_path, write=False) == []
    assert names.__doc__ == "Names in a folder."
