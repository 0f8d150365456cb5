"""Where a generator folder is: inside a run, by itself, or on the Hugging Face hub."""

from __future__ import annotations

import contextlib
from pathlib import Path

from rpg.generation.text_encoder import TEXTS_FILE
from tokenization.errors import InputError
from tokenization.files import recover_folder
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.spectral.layout import BASIS_FILE

FILES = ("config.yaml", "layout.json", "statistics.safetensors", "model.safetensors")
OPTIONAL_FILES = (CONFIG_NAME, TEXTS_FILE, BASIS_FILE)
"""What only some generators have: PEFT's configuration if they write adapters, texts if they take them, directions."""


def find_folder(path: Path | str) -> Path:
    """The generator folder of a run, of itself or of a hub repository. Raises InputError if there is none."""
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
        return Path(snapshot_download(str(path), allow_patterns=[*FILES, *OPTIONAL_FILES, "README.md"]))
    except Exception as error:  # the hub has many errors for what it does not have or cannot send
        reason = type(error).__name__
        raise InputError(f"{path} is neither a folder nor a hub repository that can be reached ({reason}).") from None
