"""Where a generator folder is: inside a run, by itself, or on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rpg.config import Config
from rpg.generation.request import KNOWN_FILE
from rpg.generation.text_encoder import TEXTS_FILE
from tokenization.errors import InputError
from tokenization.files import atomic_folder, file_digest, recover_folder, write_text
from tokenization.layouts import Layout
from tokenization.lora.adapter import CONFIG_NAME, check_adapter_tensors, partner_of, read_adapter_config
from tokenization.spectral.layout import BASIS_FILE
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.hub import pull
from tokenization.zoo.metric import MetricScale

FILES = ("config.yaml", "layout.json", "statistics.safetensors", "model.safetensors")
OPTIONAL_FILES = (CONFIG_NAME, TEXTS_FILE, BASIS_FILE, KNOWN_FILE)
"""What only some generators have: PEFT's configuration if they write adapters, texts if they take them, directions,
errors by distance."""


SHIPPED = ("sensors",)
"""Generators that come with the package; ``rpg:NAME`` where a folder has the same name."""
SHIPPED_FOLDER, SHIPPED_PREFIX = Path(__file__).parent.parent / "generators", "rpg:"


def holds_generator(folder: Path) -> bool:
    """Whether a folder is a run or a generator, whole or not."""
    return (folder / "generator").is_dir() or (folder / FILES[0]).is_file()


def shipped_folder(path: Path | str) -> Path | None:
    """The package's own generator of a name; None for other names, and where a folder of that name holds one."""
    name = str(path).removeprefix(SHIPPED_PREFIX)
    if name not in SHIPPED or (name == str(path) and holds_generator(Path(path))):
        return None
    return SHIPPED_FOLDER / name


def which_generator(path: Path | str) -> str | None:
    """In one line, whether a name that the package and a folder may share means the one or the other; else None."""
    name = str(path).removeprefix(SHIPPED_PREFIX)
    if name not in SHIPPED:
        return None
    if shipped_folder(path) is None:
        return f"{path} is the folder here; {SHIPPED_PREFIX}{name} is the generator that comes with rpg"
    beside = f" (the folder {name} here holds none)" if name == str(path) and Path(name).is_dir() else ""
    return f"{path} is the generator that comes with rpg{beside}"


def load_config(folder: Path) -> Config:
    """The configuration of a generator folder; a zoo that is not where it says is looked for beside the folder's own.

    A run names its zoo as it was seen from where it was trained, for example ``runs/zoos/digits``; from elsewhere that
    is in one of the folders that the run lies in. Raises as `Config.load`.
    """
    config = Config.load(folder / "config.yaml")
    if not Path(config.zoo).exists():
        for parent in folder.resolve().parents:
            if (parent / config.zoo / "zoo.json").is_file():
                return config.model_copy(update={"zoo": str(parent / config.zoo)})
    return config


def find_folder(path: Path | str, **options: Any) -> Path:
    """The generator folder of a run, of itself or of a hub repository.

    Args:
        path: a folder, the name of one of the package's own, or an id ``name/generator``, also with a revision:
            ``name/generator@v1``.
        options: of the hub, as `tokenization.zoo.hub.pull` takes them.

    Raises:
        InputError: there is none, or the hub cannot give it.
    """
    folder = Path(path)
    if (own := shipped_folder(path)) is not None:
        return own
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
    """Raise InputError if a generator folder is not whole; it names the first file that is missing."""
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
            ConditionSpec.from_json(spec, str(path)) if spec else None,
            num_states,
            dict(metadata["facts"]),
            MetricScale(**metric) if metric else None,
        )
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); train again or copy the folder again.") from None


def folder_digest(folder: Path) -> str:
    """SHA-256 over the digests of a generator folder's files, in the order of ``FILES``, then ``OPTIONAL_FILES``."""
    digest = hashlib.sha256()
    for name in FILES + OPTIONAL_FILES:
        path = folder / name
        if path.is_file():
            digest.update((_tensors_digest(path) if path.suffix == ".safetensors" else file_digest(path)).encode())
    return digest.hexdigest()


def _tensors_digest(path: Path) -> str:
    """SHA-256 of a safetensors file, its header sorted: the format's writer puts metadata into any order."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"


def adapter_config_of(folder: Path, layout: Layout) -> str | None:
    """PEFT's configuration in ``folder`` as it is written there, if ``layout`` cuts adapters; else None.

    Raises:
        InputError: the configuration is broken, or of another adapter than the layout's.
    """
    if not (folder / CONFIG_NAME).is_file() or not any(partner_of(name) for name in layout.names):
        return None
    config = read_adapter_config(folder)
    check_adapter_tensors({name: layout.spec(name)[1] for name in layout.names}, config, folder)
    return (folder / CONFIG_NAME).read_text(encoding="utf-8")


def write_side_files(folder: Path, config: str, metadata: Mapping[str, str]) -> None:
    """Write ``adapter_config.json``, and a model card that says what the weights' file does in its ``metadata``.

    Raises InputError when the disk refuses.
    """
    write_text(folder / CONFIG_NAME, config)
    write_text(folder / CARD_NAME, _card(json.loads(config), json.loads(metadata.get("rpg.provenance", "{}"))))


def _card(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    modules = config.get("target_modules")
    modules = ", ".join(sorted(map(str, modules))) if isinstance(modules, list) else modules
    rows = {"base model": base, "kind": f"{kind}, rank {config.get('r')}, on {modules}", **provenance}
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    return f"""---
{f"base_model: {json.dumps(base)}" if base else "tags: []"}
library_name: peft
---
# Generated {kind} adapter

Its weights were written by a generator of weights that had learned from trained adapters; they were not fine-tuned.

| | |
| --- | --- |
{table}

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "this/folder")
```

Nothing here says how good it is: measure it on your own task, beside adapters that were trained for it.
"""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").split())
