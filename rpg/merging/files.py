"""Checkpoints of one network, or adapters of one base, merged into one file.

Checkpoints are merged a tensor at a time. A weighted sum of adapters ``c₁ B₁ A₁ + c₂ B₂ A₂`` is the product of
``[c₁ B₁, c₂ B₂]`` and ``[A₁; A₂]``, whose rank is the sum of theirs: one adapter that computes the merged update.
Linear, SLERP and Model Stock are such sums. TIES and DARE pick single values of the updates, and what they leave has
no low rank.

G groups of a grouped convolution or experts (1 otherwise), r rank within one."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.merging.parts import COMBINATIONS, METADATA_KEY, Digests, Merge, Part, combination, merge_values
from rpg.seeding import make_rng
from tokenization.checkpoint.safetensors import ORDER_KEY, TIES_KEY, tensor_at
from tokenization.checkpoint.tensor_file import TensorFile, header_of, save_checkpoint
from tokenization.checkpoint.weights import AS_FOUND, Chosen
from tokenization.errors import InputError
from tokenization.files import atomic_folder, write_text
from tokenization.lora.adapter import (
    CONFIG_NAME,
    changes_base,
    check_adapter_tensors,
    conversion,
    experts_of,
    module_of,
    partner_of,
    rank_of,
    read_adapter_config,
    scaling_of,
)

COUNTER = "num_batches_tracked"
"""Ending of integers that may differ: batch normalisation's counters, of which the largest is kept."""


def merge_files(
    paths: Sequence[Path],
    merge: Merge,
    output: Path,
    *,
    base: Path | None = None,
    chosen: Chosen = AS_FOUND,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Merge networks into a safetensors file, written whole or not at all. One tensor of each is held at a time.

    Args:
        paths: checkpoints of any kind that is read, of one structure.
        output: the file, ``*.safetensors``; it must not be there yet.
        base: what all of them began with, of methods that merge deviations.
        chosen: which weights of each file, where it holds several, and the prefix to cut off their names.

    Raises:
        InputError: names, shapes or dtypes differ; an integer tensor differs that is not a known counter; values are
            not finite; an option that the method does not have.
    """
    weights, options = merge.settled(len(paths))
    if merge.needs_base != (base is not None):
        what = "merges deviations from what all networks began with; name it with --base FILE"
        raise InputError(f"--method {merge.method} {what if merge.needs_base else 'has no use for --base'}")
    if output.suffix != ".safetensors" or output.exists():
        what = "already exists" if output.exists() else "does not end in .safetensors"
        raise InputError(f"{output} {what}; name another file with --output")
    parts = [Part.open(path, chosen) for path in paths]
    first, begun = parts[0], None if base is None else Part.open(base, chosen)
    for part in parts[1:]:
        part.require(first)
    if begun is not None:
        begun.require(first, dtypes=False)
    ties = {a: n for a, n in first.ties.items() if all(part.ties.get(a) == n for part in parts)}
    specs = {name: first.spec(name) for name in first.names if name not in ties}
    strings = {"format": "pt", ORDER_KEY: json.dumps(first.names), **({TIES_KEY: json.dumps(ties)} if ties else {})}
    with contextlib.closing(Digests([*parts, *([begun] if begun is not None else [])])) as digests:
        record = digests.record(merge, parts, weights, begun, wait=False)
        with TensorFile(output, specs, {**strings, METADATA_KEY: record}) as file:
            for done, name in enumerate(specs):
                made = _merged(name, parts, begun, merge, weights, options)
                file.write(name, 0, made)
                for part in [*parts, *([begun] if begun is not None else [])]:
                    part.release(name)
                if progress is not None:
                    progress(done + 1, len(specs))
            record = digests.record(merge, parts, weights, begun, wait=True)  # as long as the one without digests
            file.write_bytes(header_of(specs, {**strings, METADATA_KEY: record})[0], 0)
    return output


def _merged(
    name: str, parts: Sequence[Part], base: Part | None, merge: Merge, weights: Tensor, options: dict[str, object]
) -> Tensor:
    """One tensor of the merged network, in the stored dtype."""
    dtype, _ = parts[0].spec(name)
    if not dtype.is_floating_point or not parts[0].tensor(name).numel():
        return _agreed(name, parts)
    precision = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    if merge.method == "linear":
        made = torch.zeros(parts[0].tensor(name).numel(), dtype=precision)
        scaled = weights / weights.sum() if options["normalize"] else weights
        for part, weight in zip(parts, scaled.tolist(), strict=True):
            made.add_(part.tensor(name).reshape(-1).to(precision), alpha=weight)
    else:
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.stack([part.tensor(name).reshape(-1).to(precision) for part in parts])
        begun = None if base is None else base.tensor(name).reshape(-1).to(precision)
        made = merge_values(merge.method, values, begun, weights, make_rng(merge.seed, name), **options)  # type: ignore[arg-type]
        if name.endswith("running_var"):  # where signs are elected it may fall below 0
            made = made.clamp(min=float(values.min()))
    made = made.to(dtype)
    if not made.float().isfinite().all():
        return _agreed(name, parts)  # masks of -inf
    return made


def _agreed(name: str, parts: Sequence[Part]) -> Tensor:
    """A tensor that is not merged: the same in all of them, or a counter."""
    first = parts[0].tensor(name)
    other = next((part for part in parts[1:] if not _same(part.tensor(name), first)), None)
    if other is None:
        return first
    if name.endswith(COUNTER):
        return torch.stack([part.tensor(name) for part in parts]).amax(0)
    kind = "NaN or infinity after merging" if first.dtype.is_floating_point else f"values of {first.dtype}"
    what = f"{tensor_at(other.path, name)} differs from that of {parts[0].path}, and has {kind}, which are not merged"
    raise InputError(f"{what}; leave one of the two out")


def _same(tensor: Tensor, other: Tensor) -> bool:
    flat, expected = (each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, other))
    return torch.equal(flat, expected)


WEIGHTS_NAME = "adapter_model.safetensors"
VARIANTS = ("use_dora", "kasa_config", "use_bdlora", "arrow_config")
"""Fields of PEFT's configuration under which a sum of adapters is not an adapter."""


def merge_adapters(paths: Sequence[Path], merge: Merge, output: Path, *, base: str | None = None) -> Path:
    """Merge PEFT adapters into one that `PeftModel.from_pretrained` loads; written whole or not at all.

    Biases and modules that were saved whole replace the base's values, and are merged as those of networks are.

    Args:
        paths: PEFT folders; ranks and alphas may differ.
        output: the folder; it must not be there yet.
        base: the base of all of them, whatever path each names.

    Raises:
        InputError: the method's result, or a sum of such adapters, is not an adapter; they differ in what they adapt.
    """
    weights, options = merge.settled(len(paths))
    if merge.method not in COMBINATIONS:
        what = f"--method {merge.method} of adapters leaves updates of full rank, which no adapter holds"
        raise InputError(f"{what}; use linear, or merge networks that the adapters were merged into")
    if output.exists():
        raise InputError(f"{output} already exists; name another folder with --output")
    parts, configs = [Part.open(path) for path in paths], [read_adapter_config(path) for path in paths]
    for part, config in zip(parts, configs, strict=True):
        check_adapter_tensors({name: part.spec(name)[1] for name in part.names}, config, part.path)
        conversion(config, part.path, configs[0], paths[0], (), base)
        variant = next((field for field in VARIANTS if config.get(field)), None)
        if variant is not None or changes_base(config):
            found = f"{variant} set" if variant is not None else f"init_lora_weights {changes_base(config)!r}"
            what = f"{part.path} has {found}, and a sum of such adapters is not an adapter"
            raise InputError(f"{what}; merge networks that the adapters were merged into")
    made, ranks = _merged_adapters(parts, configs, merge, weights, options)
    with contextlib.closing(Digests(parts)) as digests, atomic_folder(output) as folder:
        metadata = {METADATA_KEY: digests.record(merge, parts, weights, None, wait=True)}
        save_checkpoint(folder / WEIGHTS_NAME, made, metadata, materialize_ties=True)
        write_text(folder / CONFIG_NAME, json.dumps(_config(configs[0], ranks, base), indent=2))
    return output


def _merged_adapters(
    parts: Sequence[Part],
    configs: Sequence[Mapping[str, Any]],
    merge: Merge,
    weights: Tensor,
    options: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The merged adapter's tensors, and its rank by module."""
    first = parts[0]
    for part in parts[1:]:
        part.require(first, ranks=False)
    made: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in first.names:
        side, partner = partner_of(name) or ("", "")
        if side == "A":
            module = module_of(name)
            key = ".".join([module, *experts_of(module, configs[0])[:1]])
            dtype, _ = first.spec(name)
            factors = [
                _split(part.tensor(name).double(), part.tensor(partner).double(), rank_of(module, config))
                for part, config in zip(parts, configs, strict=True)
            ]
            scales = torch.tensor([scaling_of(module, config) for config in configs]).double()
            gram = scales * scales[:, None] * _gram(factors)
            shares = scales * combination(merge.method, gram, weights, options["normalize"])
            a = torch.cat([each for each, _ in factors], 1)
            b = torch.cat([share * each for share, (_, each) in zip(shares, factors, strict=True)], 2)
            shapes = [first.spec(each)[1] for each in (name, partner)]
            made[name], made[partner] = (each.to(dtype) for each in _joined(a, b, *shapes))
            ranks[key] = a.shape[1] * (len(a) if len(shapes[1]) > 2 else 1)  # PEFT counts the ranks of all groups
            bias = partner.removesuffix("weight") + "bias"
            if bias in first.names:  # which PEFT scales, too
                total = sum(share * part.tensor(bias).double() for share, part in zip(shares, parts, strict=True))
                made[bias] = torch.as_tensor(total).to(first.spec(bias)[0])
    for name in first.names:
        if name not in made:
            made[name] = _replacing(name, parts, merge, weights)
    return {name: made[name] for name in first.names}, ranks


def _split(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of each group or expert: ``[G, r, in]`` and ``[G, out, r]``.

    Args:
        a: ``[G r, in]``, of experts one after the other; of convolutions ``[G r, in, …]``.
        b: of experts ``[out, r G]``, experts innermost; of convolutions ``[G out, r, 1, …]``.
        rank: of one expert; of convolutions that of all groups.
    """
    groups = len(a) // (b.shape[1] if b.dim() > 2 else rank)
    a = a.reshape(groups, len(a) // groups, -1)
    if b.dim() > 2:
        return a, b.reshape(groups, len(b) // groups, -1)
    return a, b.reshape(len(b), -1, groups).permute(2, 0, 1)


def _joined(a: Tensor, b: Tensor, like_a: Sequence[int], like_b: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`_split` undone, in the shapes of other factors but for the rank."""
    if len(like_b) > 2:
        return a.reshape(-1, *like_a[1:]), b.reshape(like_b[0], -1, *like_b[2:])
    return a.reshape(-1, *like_a[1:]), b.permute(1, 2, 0).reshape(like_b[0], -1)


def _gram(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Inner products of the products ``B A``, which are never made: ``[n, n]``."""
    rows = [[float(((b.mT @ other_b) * (a @ other_a.mT)).sum()) for other_a, other_b in factors] for a, b in factors]
    return torch.tensor(rows).double()


def _replacing(name: str, parts: Sequence[Part], merge: Merge, weights: Tensor) -> Tensor:
    """A tensor that replaces the base's."""
    dtype, shape = parts[0].spec(name)
    values = [part.tensor(name) for part in parts]
    if all(torch.equal(values[0], each) for each in values[1:]):
        return values[0]
    if merge.needs_base or not dtype.is_floating_point:
        what = f"{parts[0].path}: tensor {name!r} replaces one of the base, which --method {merge.method} would need"
        raise InputError(f"{what}; use linear, or merge networks that the adapters were merged into")
    stacked = torch.stack([each.double().flatten() for each in values])
    return merge_values(merge.method, stacked, None, weights).to(dtype).view(shape)


def _config(first: Mapping[str, Any], ranks: Mapping[str, int], base: str | None) -> dict[str, Any]:
    """PEFT's configuration of the merged adapter: a scaling of 1 whatever the ranks."""
    rank = max(ranks.values(), key=list(ranks.values()).count)
    others = {f"^{re.escape(module)}": each for module, each in ranks.items() if each != rank}
    settled = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "use_rslora": False}
    own = {} if base is None else {"base_model_name_or_path": base, "revision": None}
    return {**first, **settled, **own, "init_lora_weights": True}
