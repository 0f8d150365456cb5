"""Where a generator folder is: inside a run, by itself, or on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rpg.generation.text_encoder import TEXTS_FILE
from tokenization.errors import InputError
from tokenization.files import atomic_folder, recover_folder
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.spectral.layout import BASIS_FILE
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.hub import pull
from tokenization.zoo.metric import MetricScale

FILES = ("config.yaml", "layout.json", "statistics.safetensors", "model.safetensors")
OPTIONAL_FILES = (CONFIG_NAME, TEXTS_FILE, BASIS_FILE)
"""What only some generators have: PEFT's configuration if they write adapters, texts if they take them, directions."""


def find_folder(path: Path | str, **options: Any) -> Path:
    """The generator folder of a run, of itself or of a hub repository.

    Args:
        path: a folder, or an id ``name/generator``, also with a revision: ``name/generator@v1``.
        options: of the hub, as `tokenization.zoo.hub.pull` takes them.

    Raises:
        InputError: there is none, or the hub cannot give it.
    """
    folder = Path(path)
    for each in (folder / "generator", folder):
        with contextlib.suppress(OSError):  # what cannot be mended is missing below
            recover_folder(each)
    if (folder / "generator").is_dir():
        return folder / "generator"
    if folder.is_dir():
        return folder
    is_local = not folder.exists() and len(folder.parts) > 1 and folder.parent.is_dir()
    runs = [each for each in sorted(folder.parent.iterdir()) if (each / "generator").is_dir()] if is_local else []
    if runs or folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/")):
        there = f"; in {folder.parent} are the runs {', '.join(each.name for each in runs[:5])}" if runs else ""
        cure = "" if runs else "; name a run, a generator folder or an id on the Hugging Face hub"
        raise InputError(f"there is no folder {path}{there}{cure}")
    repo, _, revision = str(path).partition("@")
    if revision:
        options["revision"] = revision
    try:
        return pull(repo, "model", [*FILES, *OPTIONAL_FILES, "README.md"], **options)
    except InputError as error:
        raise InputError(f"there is no folder {path} here, and of the hub: {error}") from error


def require_files(folder: Path) -> None:
    """Check that a generator folder is whole. Raises InputError that names the first file that is missing."""
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; train again or copy the whole generator folder.")


def copy_folder(path: Path | str, target: Path, **options: Any) -> None:
    """Copy a generator, found as `find_folder` does, into a new folder. Raises InputError if it is none."""
    source = find_folder(path, **options)
    require_files(source)
    with atomic_folder(target) as temporary:
        for file in source.iterdir():
            shutil.copyfile(file.resolve(), temporary / file.name)


@dataclass(frozen=True)
class SavedWeights:
    """What ``model.safetensors`` of a generator holds: the networks' tensors, and the rest as metadata."""

    tensors: dict[str, Tensor]
    condition: ConditionSpec | None
    num_states: int
    facts: dict[str, Any]
    metric: MetricScale | None


def read_weights(path: Path) -> SavedWeights:
    """Read the networks of a generator folder. Raises InputError if the file is damaged or not of a generator."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["rpg"])
        spec, metric, num_states = metadata["condition"], metadata.get("metric"), metadata["num_states"]
        if not isinstance(num_states, int) or not 0 < num_states < 1 << 31:
            raise ValueError(f"num_states is {num_states!r}")
        return SavedWeights(
            load_file(path),
            ConditionSpec(spec["kind"], spec["size"], tuple(spec["names"])) if spec else None,
            num_states,
            dict(metadata["facts"]),
            MetricScale(**metric) if metric else None,
        )
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); train again or copy the folder again.") from None
