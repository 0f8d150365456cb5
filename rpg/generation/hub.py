"""Where a generator folder is: in a run folder, by itself, or on the Hugging Face hub."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tokenization.errors import InputError
from tokenization.files import recover_folder


def find_folder(path: Path | str, files: list[str]) -> Path:
    """The folder of a generator: a run's, the one that is named, or the ``files`` of a repository on the hub.

    Raises:
        InputError: there is none.
    """
    folder = Path(path)
    for each in (folder / "generator", folder):
        with contextlib.suppress(OSError):  # what cannot be mended is missing below
            recover_folder(each)
    if (folder / "generator").is_dir():
        return folder / "generator"
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/")):
        raise InputError(f"there is no folder {path}; name a run, a generator folder or an id on the Hugging Face hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=files))
    except Exception as error:  # the hub has many errors for what it does not have or cannot send
        reason = type(error).__name__
        raise InputError(f"{path} is neither a folder nor a hub repository that can be reached ({reason}).") from None
