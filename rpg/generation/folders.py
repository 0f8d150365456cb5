"""The folders of generators, inside a run, by themselves or on the Hugging Face hub; and where generated tokens go.

Those go tile by tile into memory, or straight into their places in files and PEFT folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rpg.config import Config
from rpg.devices import Partition
from rpg.generation.request import KNOWN_FILE, PROVENANCE
from rpg.generation.sampler import Tile
from rpg.generation.text_encoder import TEXTS_FILE
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.files import atomic_folder, file_digest, recover_folder, write_text
from tokenization.layouts import BASIS_FILE, Layout, Writer, checkpoint_writer
from tokenization.lora.adapter import CONFIG_NAME, check_adapter_tensors, partner_of, read_adapter_config
from tokenization.zoo.condition import ConditionSpec, MetricScale
from tokenization.zoo.hub import pull
from tokenization.zoo.locks import locked

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


class MemorySink:
    """Collects tiles and decodes them into state dicts."""

    def __init__(self, layout: Layout, num: int) -> None:
        self.layout = layout
        self.tokens = torch.empty(num, layout.num_tokens, layout.token_size)

    def __enter__(self) -> MemorySink:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take(self, tile: Tile, rows: Tensor) -> None:
        """Keep the rows ``[G, n, D]`` of a tile."""
        self.tokens[tile.network : tile.network + tile.num_networks, tile.token : tile.token + tile.num_tokens] = rows

    def result(self) -> list[dict[str, Tensor]]:
        """One state dict a network."""
        return [self.layout.decode(tokens) for tokens in self.tokens]


def decoded_networks(layout: Layout, tiles: Iterable[tuple[Tile, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """One network after another from the tiles of them all, in their order; no more than a tile's are held at once."""
    sink = MemorySink(layout, 0)
    for tile, rows in tiles:
        if tile.token == 0:
            sink = MemorySink(layout, tile.num_networks)
        sink.take(replace(tile, network=0), rows.cpu())
        if tile.token + tile.num_tokens == layout.num_tokens:
            networks, sink = sink.result(), MemorySink(layout, 0)
            while networks:
                yield networks.pop(0)  # kept by whoever asked for it alone


class FolderSink:
    """Streams tiles into one safetensors file (adapters: one PEFT folder) a network, which appears when it is whole.

    Args:
        folder: where the files go; several processes must see the same one.
        metadata: gives the file metadata of network ``index``.
        adapter: text of ``adapter_config.json`` where the networks are adapters.
        shared: the networks whose tiles come from all processes; the first process makes and publishes their files.
        overwrite: whether networks of another generator or request may be replaced.
    """

    def __init__(
        self, layout: Layout, folder: Path, metadata: Callable[[int], dict[str, str]], num: int, adapter: str | None,
        partition: Partition, shared: range, overwrite: bool,
    ) -> None:  # fmt: skip
        self.layout, self.folder, self.metadata, self.num, self.adapter = layout, folder, metadata, num, adapter
        self.partition, self.shared, self.overwrite = partition, shared, overwrite
        self.open: dict[int, Writer] = {}
        self.adapters: dict[int, AbstractContextManager[Path]] = {}  # folders that are being filled
        self.lock = contextlib.ExitStack()

    def __enter__(self) -> FolderSink:
        _make_folder(self.folder)
        together = self.partition.size > 1
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder, together=together))
            if not self.overwrite and self.partition.rank == 0:
                self._keep_others()
            if together:
                from accelerate.utils import broadcast_object_list

                first = self.partition.rank == 0
                self.open = broadcast_object_list([{i: self._writer(i) for i in self.shared} if first else None])[0]
            self.lock = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with self.lock:
            if kind is not None:
                for writer in self.open.values():
                    writer.__exit__(kind, error, trace)
                for folder in self.adapters.values():  # an earlier adapter stays
                    with contextlib.suppress(InputError):
                        folder.__exit__(kind, error, trace)
            elif self.partition.size > 1:
                torch.distributed.barrier()  # every tile is written before a shared file is published
                for index in self.shared:
                    self._publish(index)
                torch.distributed.barrier()  # every file is there before any process says so

    def take(self, tile: Tile, rows: Tensor) -> None:
        """Write the rows ``[G, n, D]`` of a tile to their places."""
        for offset in range(tile.num_networks):
            index = tile.network + offset
            if index not in self.open:
                self.open[index] = self._writer(index)
            self.open[index].write(tile.token, rows[offset])
            if index not in self.shared and tile.token + tile.num_tokens == self.layout.num_tokens:
                self._publish(index)

    def result(self) -> list[Path]:
        """The files or folders of all networks, in their order."""
        return [self._path(index) for index in range(self.num)]

    def _publish(self, index: int) -> None:
        self.open.pop(index).close()
        if index in self.adapters:
            self.adapters.pop(index).__exit__(None, None, None)

    def _path(self, index: int) -> Path:
        return self.folder / (f"network-{index:05d}" + (".safetensors" if self.adapter is None else ""))

    def _keep_others(self) -> None:
        """Raise InputError where a network is there that this request would not make again."""
        for index in range(self.num):
            path = self._path(index)
            file = path / WEIGHTS_NAME if self.adapter is not None else path
            if file.is_file() and Checkpoint.open(file).metadata.get(PROVENANCE) != self.metadata(index)[PROVENANCE]:
                raise InputError(
                    f"{path} is another generator's or of another request; name another folder with --output, or "
                    "replace what is there with --overwrite"
                )

    def _writer(self, index: int) -> Writer:
        path = self._path(index)
        if self.adapter is not None:
            self.adapters[index] = atomic_folder(path)
            folder = self.adapters[index].__enter__()
            write_side_files(folder, self.adapter, self.metadata(index))
            path = folder / WEIGHTS_NAME
        return checkpoint_writer(path, self.layout, self.metadata(index))


def _make_folder(folder: Path) -> None:
    """Make a folder to write into. Raises InputError, before anything is computed, if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = "a file is there" if folder.is_file() else (error.strerror or str(error)).lower()
        raise InputError(f"The folder {folder} cannot be made ({found}); choose another with --output.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"The folder {folder} may not be written to; choose another with --output.")
