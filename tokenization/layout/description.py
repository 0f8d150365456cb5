"""What a layout consists of (tensors in the tokens, places of their values, normalisation), and its files.

``layout.json`` says where every value lies, ``statistics.safetensors`` holds the numbers.
Letters: L tokens of a checkpoint, D token width."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import DTYPES_BY_NAME, TensorSpec, dtype_name, read_json
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.compressed.form import Compressed
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.layout.canonical import Canonical, find_pairs
from tokenization.layout.normalization import LayerStatistics, Statistics, TensorSource, mean_name, statistics_specs
from tokenization.layout.placement import Layer, RunTable, TokenOptions
from tokenization.zoo.cache import Form
from tokenization.zoo.zoo import Zoo

FORMAT, VERSION, COMPRESSED_VERSION = "rpg.layout", 1, 2
LAYOUT_FILE, STATISTICS_FILE = "layout.json", "statistics.safetensors"
CONSTANT_PREFIX = "constant."


@dataclass(eq=False, repr=False)
class LayoutDescription:
    """All that ``layout.json`` and ``statistics.safetensors`` hold, and what follows from it.

    Attributes:
        names: every key of the state dict, in order.
        layers: the tokenised tensors, in order.
        num_tokens: L.
        ties: ``{alias: name}``.
        constant_specs: ``{name: (dtype, shape)}`` of the tensors outside the tokens.
        canonical: the form that LoRA pairs are brought into before they are cut, if any; ``decode`` gives that form.
        compressed: pruned and quantised weights, if any: the names above are of their tokens, ``decode`` stores them.
        copied: constants that differ in the zoo, and of which every network has the base's.
    """

    options: TokenOptions
    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    num_tokens: int
    ties: dict[str, str]
    constant_specs: dict[str, TensorSpec]
    statistics: Statistics
    constant_source: TensorSource
    constant_prefix: str = ""
    canonical: Canonical | None = None
    compressed: Compressed | None = None
    copied: tuple[str, ...] = ()

    @property
    def token_size(self) -> int:
        """Token width D."""
        return self.options.size

    @property
    def num_values(self) -> int:
        """How many values of a checkpoint are in its tokens."""
        return sum(layer.num_values for layer in self.layers)

    @property
    def num_coordinates(self) -> int:
        """How many numbers a checkpoint is: its values."""
        return self.num_values

    @property
    def token_weight(self) -> Tensor:
        """``[L]`` float64: what a unit of each token is in normalised values, 1."""
        return torch.ones(self.num_tokens, dtype=torch.float64)

    @property
    def padding_share(self) -> float:
        """The part of ``L * D`` that holds nothing."""
        return 1 - self.num_values / (self.num_tokens * self.token_size)

    @cached_property
    def runs(self) -> RunTable:
        """What every single token is made of."""
        return RunTable(self.layers, self.token_size)

    @property
    def positions(self) -> Tensor:
        """(layer, token in the layer) of each token's first value, ``[L, 2]`` long; all different."""
        return torch.from_numpy(self.runs.positions(np.arange(self.num_tokens)))

    @property
    def mask(self) -> Tensor:
        """True where a token holds a value, ``[L, D]`` bool."""
        return self.mask_rows(torch.arange(self.num_tokens))

    def mask_rows(self, token_ids: Tensor | Sequence[int]) -> Tensor:
        """The rows ``token_ids`` (any shape ``[...]``) of ``mask``, ``[..., D]``, without making the rest of it."""
        ids = torch.as_tensor(token_ids, device="cpu")
        num_values = torch.from_numpy(self.runs.num_values(ids.reshape(-1).numpy())).reshape(ids.shape)
        return torch.arange(self.token_size) < num_values.unsqueeze(-1)

    def layer_statistics(self, index: int) -> LayerStatistics:
        """The normalisation of one layer."""
        return self.statistics.layer(index, self.layers[index].name)

    @property
    def form(self) -> Form | None:
        """The form in which checkpoints are cut, if it is not their own."""
        return self.compressed or self.canonical

    def checkpoint(self, zoo: Zoo, index: int) -> Checkpoint:
        """An entry of a zoo as it is cut into tokens: the zoo's own, or in its other form."""
        return zoo.checkpoint(index) if self.form is None else self.form.checkpoint(zoo, index)

    def finished(self, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of decoded layers: with the constants and aliases, as the zoo's checkpoints are stored."""
        constants = {name: self.constant(name).clone() for name in self.constant_specs}
        state_dict = self.with_aliases({**layers, **constants})
        return state_dict if self.compressed is None else self.compressed.compress(state_dict)

    def constant(self, name: str) -> Tensor:
        """One tensor outside the tokens, in the memory map it is read from."""
        return self.constant_source.flat(self.constant_prefix + name).view(self.constant_specs[name][1])

    @property
    def copied_note(self) -> str:
        """What a user must know of ``copied``, as a sentence; empty where there is none."""
        if not self.copied:
            return ""
        shown = ", ".join(f"`{name}`" for name in self.copied[:6])
        more = f" and {len(self.copied) - 6} more" if len(self.copied) > 6 else ""
        source = "the zoo's first checkpoint" if self.options.base is None else self.options.base
        return f"Not learned but copied from {source}: {shown}{more}."

    def with_aliases(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors under every key that stands for one of them, in the order of the state dict."""
        return {name: stored[self.ties.get(name, name)] for name in self.names if self.ties.get(name, name) in stored}

    def spec(self, name: str) -> TensorSpec:
        """Stored dtype and shape of a key of the state dict."""
        name = self.ties.get(name, name)
        layer = self._layer_by_name.get(name)
        return self.constant_specs[name] if layer is None else (layer.dtype, layer.shape)

    @cached_property
    def _layer_by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def describe(self) -> list[LayerGroup]:
        """The layers by kind: how many tensors, values and tokens, and how much padding."""
        groups: dict[str, LayerGroup] = {}
        size, ends = self.token_size, [layer.start for layer in self.layers[1:]] + [self.num_tokens * self.token_size]
        for layer, end in zip(self.layers, ends, strict=True):
            kind = kind_of(layer.name, layer.shape)
            group = groups.setdefault(kind, LayerGroup(kind))
            group.tensors += 1
            group.values += layer.num_values
            group.tokens += -(-end // size) - -(-layer.start // size)
            group.padding += end - layer.start - layer.num_values
        return list(groups.values())

    def save(self, folder: Path | str) -> None:
        """Write ``layout.json`` (last) and ``statistics.safetensors``. Raises InputError if the disk refuses."""
        statistics, canonical = self.statistics, self.canonical
        reference = canonical.reference if canonical is not None else None
        specs = statistics_specs(self.layers, statistics.normalization)
        specs |= canonical.reference_specs if canonical is not None and reference is not None else {}
        specs |= {CONSTANT_PREFIX + name: spec for name, spec in self.constant_specs.items()}
        with TensorFile(Path(folder) / STATISTICS_FILE, specs, {"format": FORMAT, "version": str(VERSION)}) as file:
            statistics.write_numbers(file)
            if statistics.means is not None:
                for layer in self.layers:
                    file.write(mean_name(layer.name), 0, statistics.means.flat(mean_name(layer.name)))
                    statistics.release(layer.name)
            for name in self.constant_specs:
                file.write(CONSTANT_PREFIX + name, 0, self.constant(name))
            if canonical is not None and reference is not None:
                for name in canonical.reference_specs:
                    file.write(name, 0, reference.flat(name))
        write_text(Path(folder) / LAYOUT_FILE, json.dumps(_to_json(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what ``save`` wrote; means and constants stay in the file until they are used.

        Raises InputError if a file is missing, damaged, or of another version.
        """
        path = Path(folder) / LAYOUT_FILE
        if not path.is_file():
            raise InputError(f"{path} does not exist; name the folder of a generator")
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path} is not a layout: its format is not {FORMAT!r}; name the folder of a generator")
        if content.get("version") != (COMPRESSED_VERSION if "compressed" in content else VERSION):
            what = f"{path} has version {content.get('version')!r}, and this rpg reads version {VERSION}"
            raise InputError(f"{what}; use the rpg that wrote it, or train again")
        try:
            arguments = _from_json(content)
            compressed = Compressed.from_json(content["compressed"]) if "compressed" in content else None
            normalization = TokenOptions(normalization=content["normalization"]).normalization
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} has a malformed entry ({error!r}); copy the folder again") from error
        source = Checkpoint.open(Path(folder) / STATISTICS_FILE)
        source.require(statistics_specs(arguments["layers"], normalization))
        source.require({CONSTANT_PREFIX + name: spec for name, spec in arguments["constant_specs"].items()})
        return cls(
            **arguments,
            statistics=Statistics.read(source, normalization),
            constant_source=source,
            constant_prefix=CONSTANT_PREFIX,
            canonical=None if compressed else _canonical(source, arguments["layers"], arguments["options"]),
            compressed=compressed,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("runs", "_layer_by_name")}


@dataclass
class LayerGroup:
    """All layers of one kind: how many tensors, their values, tokens that begin in them, places left empty after them.

    Over all groups, ``tokens`` add up to L and ``values + padding`` to ``L * D``.
    """

    kind: str
    tensors: int = 0
    values: int = 0
    tokens: int = 0
    padding: int = 0

    @property
    def padding_share(self) -> float:
        """The part of the group's places that holds nothing."""
        return self.padding / (self.values + self.padding)


def kind_of(name: str, shape: Sequence[int]) -> str:
    """A word for what a tensor does, judged by its name and number of dimensions."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("running_mean", "running_var"):
        return "batch statistics"
    if "lora" in name:
        return "adapter"
    if len(shape) > 1 and any(word in name for word in ("embed", "wte", "wpe")) and "proj" not in name:
        return "embedding"
    if len(shape) > 1:
        return "linear" if len(shape) == 2 else "convolution"
    return "bias" if leaf.endswith("bias") else "scale"


def _canonical(source: Checkpoint, layers: Sequence[Layer], options: TokenOptions) -> Canonical | None:
    if not (pairs := find_pairs(layers, options)):
        return None
    aligned = options.lora_canonical == "aligned"
    canonical = Canonical(options.lora_canonical, pairs, source if aligned else None)
    source.require(canonical.reference_specs if aligned else {})
    return canonical


def _to_json(layout: LayoutDescription) -> dict[str, Any]:
    tensors: list[dict[str, Any]] = []
    layers = {layer.name: layer for layer in layout.layers}
    for name in layout.names:
        if name in layout.ties:
            tensors.append({"name": name, "role": "tie", "of": layout.ties[name]})
            continue
        dtype, shape = layout.spec(name)
        entry: dict[str, Any] = {"name": name, "role": "constant", "dtype": dtype_name(dtype), "shape": list(shape)}
        if name in layout.copied:
            entry["varies"] = True
        if layer := layers.get(name):
            runs = {field: getattr(layer, field) for field in ("start", "num_runs", "run_length", "run_stride")}
            entry |= {"role": "layer", **runs}
        tensors.append(entry)
    # An older program would take the tokens' names for those of the checkpoint.
    compressed = {"compressed": layout.compressed.to_json()} if layout.compressed is not None else {}
    return {
        "format": FORMAT,
        "version": COMPRESSED_VERSION if compressed else VERSION,
        "options": layout.options.written(),
        "normalization": layout.statistics.normalization,
        "num_tokens": layout.num_tokens,
        "tensors": tensors,
        **compressed,
    }


def _from_json(content: Mapping[str, Any]) -> dict[str, Any]:
    options = TokenOptions(**content["options"])
    names, layers, ties, constants, copied = [], [], {}, {}, []
    for entry in content["tensors"]:
        name = entry["name"]
        if not isinstance(name, str):
            raise TypeError(f"a tensor is called {name!r}")
        names.append(name)
        if entry["role"] == "tie":
            ties[name] = entry["of"]
            continue
        spec = (DTYPES_BY_NAME[entry["dtype"]], tuple(int(size) for size in entry["shape"]))
        if entry["role"] == "constant":
            constants[name] = spec
            copied += [name] if entry.get("varies") else []
            continue
        runs = (int(entry[field]) for field in ("start", "num_runs", "run_length", "run_stride"))
        layers.append(Layer(name, *spec, *runs))
    num_tokens = int(content["num_tokens"])
    _require_runs(layers, num_tokens * options.size)
    if len(set(names)) < len(names) or any(of not in names or of in ties for of in ties.values()):
        raise ValueError("names or ties contradict each other")
    return {
        "options": options,
        "names": tuple(names),
        "layers": tuple(layers),
        "num_tokens": num_tokens,
        "ties": ties,
        "constant_specs": constants,
        "copied": tuple(copied),
    }


def _require_runs(layers: Sequence[Layer], num_places: int) -> None:
    """Runs that left the buffer or overlapped would read and write foreign memory."""
    end = 0
    for layer in layers:
        inside = layer.num_runs > 0 and layer.run_length > 0 and layer.run_stride >= layer.run_length
        if not inside or layer.start < end or layer.num_values != math.prod(layer.real_shape):
            raise ValueError(f"tensor {layer.name!r} has runs that do not fit")
        end = layer.end
    if not layers or end > num_places:
        raise ValueError("the tensors do not fit into the tokens")
