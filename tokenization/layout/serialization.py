"""A layout on disk: ``layout.json`` says where every value lies, ``statistics.safetensors`` holds the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import DTYPES, read_json
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.compressed.form import Compressed
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.layout.canonical import Canonical, find_pairs
from tokenization.layout.description import LayoutDescription
from tokenization.layout.normalization import Statistics, mean_name, statistics_specs
from tokenization.layout.placement import Layer, TokenOptions

FORMAT, VERSION, COMPRESSED_VERSION = "rpg.layout", 1, 2
LAYOUT_FILE, STATISTICS_FILE = "layout.json", "statistics.safetensors"
CONSTANT_PREFIX = "constant."
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def save(layout: LayoutDescription, folder: Path) -> None:
    """Write ``layout.json`` and ``statistics.safetensors``, the former last: a folder with it is complete."""
    statistics, canonical = layout.statistics, layout.canonical
    specs = statistics_specs(layout.layers, statistics.normalization)
    specs |= canonical.reference_specs() if canonical is not None else {}
    specs |= {CONSTANT_PREFIX + name: spec for name, spec in layout.constant_specs.items()}
    with TensorFile(folder / STATISTICS_FILE, specs, {"format": FORMAT, "version": str(VERSION)}) as file:
        statistics.write_numbers(file)
        if statistics.means is not None:
            for layer in layout.layers:
                file.write(mean_name(layer.name), 0, statistics.means.flat(mean_name(layer.name)))
                statistics.release(layer.name)
        for name in layout.constant_specs:
            file.write(CONSTANT_PREFIX + name, 0, layout.constant(name))
        if canonical is not None and canonical.reference is not None:
            for name in canonical.reference_specs():
                file.write(name, 0, canonical.reference.flat(name))
    write_text(folder / LAYOUT_FILE, json.dumps(_to_json(layout), indent=1) + "\n")


def load(folder: Path) -> dict[str, Any]:
    """Read what ``save`` wrote.

    Returns:
        the arguments of `LayoutDescription`; means and constants stay in the file until they are used.

    Raises:
        InputError: a file is missing, damaged, or of another version.
    """
    path = folder / LAYOUT_FILE
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
    source = Checkpoint.open(folder / STATISTICS_FILE)
    source.require(statistics_specs(arguments["layers"], normalization))
    source.require({CONSTANT_PREFIX + name: spec for name, spec in arguments["constant_specs"].items()})
    return {
        **arguments,
        "statistics": Statistics.read(source, normalization),
        "constant_source": source,
        "constant_prefix": CONSTANT_PREFIX,
        "canonical": None if compressed else _canonical(source, arguments["layers"], arguments["options"]),
        "compressed": compressed,
    }


def _canonical(source: Checkpoint, layers: Sequence[Layer], options: TokenOptions) -> Canonical | None:
    pairs = find_pairs(layers) if options.lora_canonical != "none" else ()
    if not pairs:
        return None
    canonical = Canonical(options.lora_canonical, pairs, source if options.lora_canonical == "aligned" else None)
    source.require(canonical.reference_specs())
    return canonical


def _to_json(layout: LayoutDescription) -> dict[str, Any]:
    tensors: list[dict[str, Any]] = []
    layers = {layer.name: layer for layer in layout.layers}
    for name in layout.names:
        if name in layout.ties:
            tensors.append({"name": name, "role": "tie", "of": layout.ties[name]})
            continue
        dtype, shape = layout.spec(name)
        entry: dict[str, Any] = {
            "name": name,
            "role": "constant",
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
        }
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
        spec = (_DTYPE_NAMES[entry["dtype"]], tuple(int(size) for size in entry["shape"]))
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
        "names": names,
        "layers": layers,
        "num_tokens": num_tokens,
        "ties": ties,
        "constant_specs": constants,
        "copied": copied,
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
