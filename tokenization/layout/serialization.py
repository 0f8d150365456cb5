"""A layout on disk, and the statistics that a zoo keeps from one fit to the next."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import DTYPES, read_json
from tokenization.checkpoint.structure import Structure
from tokenization.errors import InputError
from tokenization.files import publish_text
from tokenization.layout.normalization import MemorySource, Statistics, TensorSource, mean_dtype, mean_name
from tokenization.layout.placement import Layer, TokenOptions
from tokenization.layout.statistics import fit_statistics
from tokenization.layout.writer import TensorFile, TensorSpec
from tokenization.lora.canonical import CACHE_FOLDER, Canonical, find_pairs, reference_name
from tokenization.zoo.zoo import Zoo

if TYPE_CHECKING:
    from tokenization.layout.layout import TokenLayout

FORMAT, VERSION = "rpg.layout", 1
LAYOUT_FILE, STATISTICS_FILE = "layout.json", "statistics.safetensors"
CONSTANT_PREFIX = "constant."
NUMBERS = ("layer.centre", "layer.scale", "layer.variance_mean")
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def save(layout: TokenLayout, folder: Path) -> None:
    """Write ``layout.json`` and ``statistics.safetensors``, the former last: a folder with it is complete."""
    statistics = layout.statistics
    specs = _specs(layout.layers, statistics.normalization)
    specs |= {CONSTANT_PREFIX + name: spec for name, spec in layout.constant_specs.items()}
    specs |= _reference_specs(layout.canonical)
    metadata = {"format": FORMAT, "version": str(VERSION)}
    with TensorFile(folder / STATISTICS_FILE, specs, metadata) as file:
        _write_numbers(file, statistics)
        if statistics.means is not None:
            for layer in layout.layers:
                file.write(mean_name(layer.name), 0, statistics.means.flat(mean_name(layer.name)))
                statistics.release(layer.name)
        for name in layout.constant_specs:
            file.write(CONSTANT_PREFIX + name, 0, layout.constant(name))
        if layout.canonical is not None and layout.canonical.reference is not None:
            for name in _reference_specs(layout.canonical):
                file.write(name, 0, layout.canonical.reference.flat(name))
    publish_text(folder / LAYOUT_FILE, json.dumps(_to_json(layout), indent=1) + "\n")


def load(folder: Path) -> dict[str, Any]:
    """Read what ``save`` wrote.

    Returns:
        the arguments of ``TokenLayout``.

    Raises:
        InputError: a file is missing, damaged, or of another version.
    """
    path = folder / LAYOUT_FILE
    if not path.is_file():
        raise InputError(str(path), "no such file", "the layout of a generator", "check the folder")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(str(path), "something else", f"JSON with format {FORMAT!r}", "check the folder")
    if content.get("version") != VERSION:
        raise InputError(
            str(path),
            f"version {content.get('version')!r}",
            f"version {VERSION}",
            "use the rpg that wrote it, or train anew",
        )
    try:
        arguments = _from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            str(path), f"a malformed entry ({error!r})", "the file as it was saved", "copy it again"
        ) from error
    source = Checkpoint.open(folder / STATISTICS_FILE)
    layers, options = arguments["layers"], arguments["options"]
    specs = _specs(layers, arguments["normalization"])
    specs |= {CONSTANT_PREFIX + name: spec for name, spec in arguments["constant_specs"].items()}
    _require_specs(source, specs)
    statistics = _statistics(source, arguments.pop("normalization"))
    assert isinstance(options, TokenOptions)
    return {
        **arguments,
        "statistics": statistics,
        "constant_source": source,
        "constant_prefix": CONSTANT_PREFIX,
        "canonical": _canonical(source, layers, options),
    }


def _canonical(source: Checkpoint, layers: Sequence[Layer], options: TokenOptions) -> Canonical | None:
    pairs = find_pairs(layers) if options.lora_canonical != "none" else ()
    if not pairs:
        return None
    canonical = Canonical(options.lora_canonical, pairs, source if options.lora_canonical == "aligned" else None)
    _require_specs(source, _reference_specs(canonical))
    return canonical


def _reference_specs(canonical: Canonical | None) -> dict[str, TensorSpec]:
    if canonical is None or canonical.reference is None:
        return {}
    return {reference_name(layer.name): (torch.float32, layer.shape) for layer in canonical.layers}


def _to_json(layout: TokenLayout) -> dict[str, Any]:
    tensors: list[dict[str, Any]] = []
    layers = {layer.name: layer for layer in layout.layers}
    for name in layout.names:
        if name in layout.ties:
            tensors.append({"name": name, "role": "tie", "of": layout.ties[name]})
            continue
        dtype, shape = layout.spec(name)
        entry = {"name": name, "role": "constant", "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}
        if layer := layers.get(name):
            runs = {field: getattr(layer, field) for field in ("start", "num_runs", "run_length", "run_stride")}
            entry |= {"role": "layer", **runs}
        tensors.append(entry)
    return {
        "format": FORMAT,
        "version": VERSION,
        "options": dataclasses.asdict(layout.options),
        "normalization": layout.statistics.normalization,
        "num_tokens": layout.num_tokens,
        "tensors": tensors,
    }


def _from_json(content: Mapping[str, Any]) -> dict[str, Any]:
    # A layout from before there was the option has its pairs as they were trained.
    options = TokenOptions(**{"lora_canonical": "none", **content["options"]})
    names, layers, ties, constants = [], [], {}, {}
    for entry in content["tensors"]:
        name = entry["name"]
        names.append(name)
        if entry["role"] == "tie":
            ties[name] = entry["of"]
            continue
        spec = (_DTYPE_NAMES[entry["dtype"]], tuple(int(size) for size in entry["shape"]))
        if entry["role"] == "constant":
            constants[name] = spec
            continue
        runs = (int(entry[field]) for field in ("start", "num_runs", "run_length", "run_stride"))
        layers.append(Layer(name, *spec, *runs))
    num_tokens = int(content["num_tokens"])
    _require_runs(layers, num_tokens * options.size)
    if len(set(names)) < len(names) or any(of not in names or of in ties for of in ties.values()):
        raise ValueError("names or ties contradict each other")
    return {
        "options": options,
        "normalization": TokenOptions(normalization=content["normalization"]).normalization,
        "names": names,
        "layers": layers,
        "num_tokens": num_tokens,
        "ties": ties,
        "constant_specs": constants,
    }


def _require_runs(layers: Sequence[Layer], num_places: int) -> None:
    """Runs that left the buffer or overlapped would read and write foreign memory."""
    end = 0
    for layer in layers:
        inside = layer.num_runs > 0 and layer.run_length > 0 and layer.run_stride >= layer.run_length
        if not inside or layer.start < end or layer.num_values != math.prod(layer.shape):
            raise ValueError(f"tensor {layer.name!r} has runs that do not fit")
        end = layer.end
    if not layers or end > num_places:
        raise ValueError("the tensors do not fit into the tokens")


def _specs(layers: Sequence[Layer], normalization: str) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {name: (torch.float64, (len(layers),)) for name in NUMBERS}
    if normalization == "residual":
        specs |= {mean_name(layer.name): (mean_dtype(layer), layer.shape) for layer in layers}
    return specs


def _require_specs(source: Checkpoint, specs: Mapping[str, TensorSpec]) -> None:
    for name, (dtype, shape) in specs.items():
        info = source.tensors.get(name)
        found = "no such tensor" if info is None else f"{info.dtype} of shape {list(info.shape)}"
        if info is None or (info.dtype, info.shape) != (dtype, shape):
            raise InputError(
                f"{source.path}: tensor {name!r}", found, f"{dtype} of shape {list(shape)}", "copy it again"
            )


def _write_numbers(file: TensorFile, statistics: Statistics) -> None:
    for name, numbers in zip(NUMBERS, (statistics.centre, statistics.scale, statistics.variance_mean), strict=True):
        file.write(name, 0, numbers)


def _statistics(source: TensorSource, normalization: Any) -> Statistics:
    centre, scale, variance_mean = (source.flat(name).clone() for name in NUMBERS)
    return Statistics(normalization, centre, scale, variance_mean, source if normalization == "residual" else None)


def open_base(zoo: Zoo, base: str | None) -> Checkpoint | None:
    """The checkpoint that ``tokens.base`` names: a file of the zoo, or a path. It must fit the zoo's structure."""
    if base is None:
        return None
    for index, entry in enumerate(zoo.entries):
        if entry.file == base:
            return zoo.checkpoint(index)
    checkpoint = Checkpoint.open(base)
    zoo.structure.require(Structure.of_checkpoint(checkpoint), f"tokens.base: {base}")
    return checkpoint


def fitted_statistics(
    zoo: Zoo,
    indices: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    layers: Sequence[Layer],
    options: TokenOptions,
    form: str | None,
) -> Statistics:
    """The statistics of a zoo, from its cache or measured now. Arguments and errors as in ``TokenLayout.fit``.

    ``form`` is the key of the canonical form that the checkpoints are in, if any.
    """
    specs = _specs(layers, options.normalization)
    subject = [VERSION, zoo.digest(), list(indices), options.normalization, [layer.name for layer in layers]]
    subject += [form] if form else []
    key = hashlib.sha256(json.dumps(subject).encode()).hexdigest()
    path = zoo.path / CACHE_FOLDER / f"statistics-{key[:16]}.safetensors"
    with contextlib.suppress(InputError):  # whatever is wrong with a cache, it is made again
        return _open_cached(path, specs, key, options)
    try:
        path.parent.mkdir(exist_ok=True)
        file = TensorFile(path, specs, {"key": key})
    except (OSError, InputError):  # a zoo that may not be written, or a full disk: then in memory
        means = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in specs.items() if name not in NUMBERS}

        def keep(name: str, first: int, values: Tensor) -> None:
            means[name].view(-1)[first : first + len(values)] = values

        numbers = fit_statistics(checkpoints, layers, options.normalization, keep)
        return _statistics(MemorySource({**means, **dict(zip(NUMBERS, numbers, strict=True))}), options.normalization)
    with file:
        dtypes = {name: dtype for name, (dtype, _) in specs.items()}
        numbers = fit_statistics(
            checkpoints, layers, options.normalization,
            lambda name, first, values: file.write(name, first, values.to(dtypes[name])),
        )  # fmt: skip
        _write_numbers(file, Statistics(options.normalization, *numbers))
    return _open_cached(path, specs, key, options)


def _open_cached(path: Path, specs: Mapping[str, TensorSpec], key: str, options: TokenOptions) -> Statistics:
    source = Checkpoint.open(path)
    _require_specs(source, specs)
    if source.metadata.get("key") != key:
        raise InputError(str(path), "statistics of another zoo", "those of this one")
    return _statistics(source, options.normalization)
