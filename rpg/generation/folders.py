"""Where a generator folder is: inside a run, by itself, or on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rpg.generation.text_encoder import TEXTS_FILE
from tokenization.errors import InputError
from tokenization.files import recover_folder
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.spectral.layout import BASIS_FILE
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.metric import MetricScale

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
