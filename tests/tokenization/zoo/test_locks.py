"""A folder has one writer at a time; a lock ends with the process that holds it."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
from pathlib import Path

import pytest
import torch

from tests.locks import written_elsewhere
from tokenization.errors import InputError
from tokenization.zoo.locks import LOCK_NAME, Holder, lock_file, locked, locks


def test_a_folder_that_is_written_is_refused_and_left_alone(tmp_path: Path) -> None:
    with written_elsewhere(lock_file(tmp_path)) as other:
        with pytest.raises(InputError) as caught, locked(tmp_path):
            pytest.fail("it was taken")
        assert str(caught.value) == f"{tmp_path} is being written ({other}); wait for its end, or choose another place"
        assert f"'rpg other', process {other.pid} since 20" in str(other)
    with locked(tmp_path):
        pass


def test_the_lock_names_this_process_and_goes_with_what_was_made_for_it(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "folder"):
        holder = Holder.read(tmp_path / "new" / "folder" / LOCK_NAME)
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
        assert Holder.read(tmp_path / LOCK_NAME) == Holder.current()
    assert not (tmp_path / LOCK_NAME).exists()


def killed(tmp_path: Path) -> Holder:
    """What a process leaves that was killed with a lock."""
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    holder = Holder.read(tmp_path / LOCK_NAME)
    assert holder is not None and holder.pid == child
    return holder


def test_a_lock_of_a_process_that_was_killed_is_taken_with_what_it_left(tmp_path: Path) -> None:
    holder = killed(tmp_path)
    (tmp_path / f".file.{holder.host}.{holder.pid}.partial").touch()
    (tmp_path / ".folder.replaced").mkdir()
    with locked(tmp_path):
        assert Holder.read(tmp_path / LOCK_NAME) == Holder.current()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("text", ["", "[]", '{"host": "far-away", "pid": 1, "started": 1.0, "command": "rpg train"}'])
def test_a_file_that_nobody_holds_locks_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_appears_as_a_whole_is_locked_beside_it(tmp_path: Path) -> None:
    with locked(tmp_path / "file.pth", beside=True):
        assert [path.name for path in tmp_path.iterdir()] == [".file.pth.lock"]
        (tmp_path / "file.pth").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]
    with (
        written_elsewhere(lock_file(tmp_path / "file.pth", beside=True)),
        pytest.raises(InputError, match="file.pth is being written"),
        locked(tmp_path / "file.pth", beside=True),
    ):
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
def test_launched_processes_share_one_lock(tmp_path: Path, refused: bool) -> None:
    """They enter together, or all of them are told."""
    folder = tmp_path / "folder"
    with written_elsewhere(folder / LOCK_NAME) if refused else contextlib.nullcontext():
        assert enter_together(folder) == ([4, 4] if refused else [3, 3])


def enter_together(folder: Path) -> list[int]:
    """How two launched processes end: 3 after the lock, 4 if it is someone else's."""
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ["RANK"] = str(rank)
            place = {"init_method": f"file://{folder.parent}/store", "rank": rank, "world_size": 2}
            torch.distributed.init_process_group("gloo", **place)
            try:
                with locked(folder):
                    holder = Holder.read(folder / LOCK_NAME)
                    assert holder is not None and (holder.pid == os.getpid()) == (rank == 0)
                    torch.distributed.barrier()
                os._exit(3)
            except InputError as error:
                os._exit(4 if "'rpg other', process" in str(error) else 5)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_a_function_runs_with_the_lock_of_its_folder(tmp_path: Path) -> None:
    @locks(lambda folder, write=True: folder if write else None)
    def names(folder: Path, write: bool = True) -> list[str]:
        """Names in a folder."""
        return [path.name for path in folder.iterdir()]

    assert names(tmp_path) == [LOCK_NAME] and names(tmp_path, write=False) == []
    assert names.__doc__ == "Names in a folder."
