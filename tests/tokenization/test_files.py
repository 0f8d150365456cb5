"""Folders are replaced whole: an error, or a kill at any moment, leaves the old one or the new one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tokenization.errors import InputError
from tokenization.files import atomic_folder, recover_folder, remove_leftovers


def fill(path: Path, text: str) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "a").write_text(text)


def content(path: Path) -> str:
    return (path / "part" / "a").read_text()


def test_a_folder_is_made_with_its_parents_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    fill(path, "old")
    (path / "more").write_text("goes with the old folder")
    fill(path, "new")
    assert content(path) == "new" and not (path / "more").exists()
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    fill(path, "old")
    with pytest.raises(KeyError), atomic_folder(path) as temporary:
        (temporary / "a").write_text("half")
        raise KeyError
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}"), atomic_folder(path) as temporary:
        (temporary / "missing" / "a").write_text("half")
    assert content(path) == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("num_renames", [0, 1, 2])
def test_a_kill_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_renames: int
) -> None:
    path = tmp_path / "folder"
    fill(path, "old")
    child = os.fork()
    if child == 0:
        renames = 0
        replace = os.replace

        def killed(source: Path, target: Path) -> None:
            nonlocal renames
            if renames == num_renames:
                os._exit(9)
            replace(source, target)
            renames += 1

        monkeypatch.setattr("os.replace", killed)
        monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: os._exit(9) if renames == 2 else None)
        fill(path, "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    recover_folder(path)
    assert content(path) == ("new" if num_renames == 2 else "old")
    fill(path, "newest")
    assert content(path) == "newest" and list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    fill(path, "old")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(InputError, match="No space left"):
        fill(path, "new")
    assert content(path) == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_way_and_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="there is a file of this name"):
        fill(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "mine"
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == "new"


def test_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".a.123.partial").write_text("")
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial" / "a").write_text("")
    (tmp_path / "kept").write_text("")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
