"""Adapters of one base merged into one: into a folder that PEFT loads, and as PEFT itself merges them, as baselines.

A weighted sum of adapters ``c₁ B₁ A₁ + c₂ B₂ A₂`` is the product of ``[c₁ B₁, c₂ B₂]`` and ``[A₁; A₂]``, whose rank is
the sum of theirs: one adapter that computes the merged update. Linear, SLERP and Model Stock are such sums. TIES and
DARE pick single values of the updates, and what they leave has no low rank.

G groups of a grouped convolution or experts (1 otherwise), r rank within one, n adapters."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpg.merging.files import METADATA_KEY, Digests, Part
from rpg.merging.methods import COMBINATIONS, Merge, NetworkMerges, chosen_of, combination, draw_shares, merge_values
from rpg.seeding import derive_seed
from tokenization.checkpoint.checkpoint import Checkpoint, StateDict
from tokenization.checkpoint.tensor_file import save_checkpoint
from tokenization.errors import InputError
from tokenization.files import atomic_folder, write_text
from tokenization.layout.canonical import NO_PRODUCT
from tokenization.lora.adapter import (
    CONFIG_NAME,
    balanced_factors,
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
        check_adapter_tensors({name: part.specs[name][1] for name in part.names}, config, part.path)
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
            dtype, _ = first.specs[name]
            factors = [
                _split(part.tensor(name).double(), part.tensor(partner).double(), rank_of(module, config))
                for part, config in zip(parts, configs, strict=True)
            ]
            scales = torch.tensor([scaling_of(module, config) for config in configs]).double()
            gram = scales * scales[:, None] * _gram(factors)
            shares = scales * combination(merge.method, gram, weights, options["normalize"])
            a = torch.cat([each for each, _ in factors], 1)
            b = torch.cat([share * each for share, (_, each) in zip(shares, factors, strict=True)], 2)
            shapes = [first.specs[each][1] for each in (name, partner)]
            made[name], made[partner] = (each.to(dtype) for each in _joined(a, b, *shapes))
            ranks[key] = a.shape[1] * (len(a) if len(shapes[1]) > 2 else 1)  # PEFT counts the ranks of all groups
            bias = partner.removesuffix("weight") + "bias"
            if bias in first.names:  # which PEFT scales, too
                total = sum(share * part.tensor(bias).double() for share, part in zip(shares, parts, strict=True))
                made[bias] = torch.as_tensor(total).to(first.specs[bias][0])
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
    dtype, shape = parts[0].specs[name]
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


PEFT_METHODS = ("peft_linear", "peft_svd", "peft_ties", "peft_dare_linear", "peft_dare_ties")
"""``peft_`` and PEFT's ``combination_type``."""

PEFT_DENSITY = 0.2
"""Share of the values that ties and dare keep: that of the TIES paper (arXiv 2306.01708) and of PEFT's guide."""

MERGED = "merged"


class PeftMerges:
    """Merges adapters of one structure.

    PEFT merges pairs alone: it leaves DoRA's magnitudes at the norms of the base, new biases at 0, and multiplies what
    it made of rsLoRA adapters by a further √rank. Here merged pairs have the scaling that PEFT means them to have, and
    whatever is not a pair is a weighted mean, which is right for biases; of DoRA's magnitudes it is an approximation.

    Args:
        config: text of PEFT's ``adapter_config.json``.
        adapters: n of them, as they were saved.
        finish: brings a merged adapter into the form that the others are compared in.
    """

    def __init__(
        self, config: str, adapters: Sequence[Checkpoint], finish: Callable[[StateDict], Any] | None = None
    ) -> None:
        self.config: dict[str, Any] = json.loads(config)
        self.adapters, self.finish = list(adapters), finish or dict
        tensors = self.adapters[0].tensors
        self.pairs = {  # A by B
            partner: name
            for name in tensors
            for side, partner in [partner_of(name) or ("", "")]
            if side == "A" and partner in tensors
        }
        self.is_grouped = any(tensors[b].shape[1] != tensors[a].shape[0] for b, a in self.pairs.items())
        self._models: dict[Any, Any] = {}

    @property
    def methods(self) -> tuple[str, ...]:
        """`PEFT_METHODS`; none for a single adapter or updates beyond ``B A`` (grouped convolutions are)."""
        several = len(self.adapters) > 1 and bool(self.pairs) and not self.is_grouped
        return PEFT_METHODS if several and not any(self.config.get(field) for field in NO_PRODUCT) else ()

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Equal shares ``[num, n]`` of a few random adapters."""
        return draw_shares([0] * len(self.adapters), num, generator)

    def merge(self, method: str, shares: Tensor, seed: int = 0, base: StateDict | None = None) -> StateDict:
        """One adapter, made by ``method`` of those with the largest positive shares.

        Args:
            shares: of all adapters, ``[n]``; those that count are scaled to add up to 1.
            base: makes no difference: adapters are deviations already.
        """
        rows, weights = chosen_of(shares)
        chosen = list(zip([self.adapters[row] for row in rows], weights.tolist(), strict=True))
        made: dict[str, Tensor] = {}
        for name, info in self.adapters[0].tensors.items():
            if name in self.pairs:
                a = self.pairs[name]
                given = [(each.tensor(a), each.tensor(name), value) for each, value in chosen]
                made[a], made[name] = self._pair(method, a, given, derive_seed(seed, method, name))
            elif name not in self.pairs.values():
                mean = sum(value * each.tensor(name).double() for each, value in chosen)
                made[name] = torch.as_tensor(mean).to(info.dtype)
            for each, _ in chosen:
                each.release(name)
        first = self.adapters[0]
        return self.finish({name: made[first.ties.get(name, name)] for name in first.order})

    def _pair(
        self, method: str, name: str, given: Sequence[tuple[Tensor, Tensor, float]], seed: int
    ) -> tuple[Tensor, Tensor]:
        """The merged factors, in the scaling of those that are given (PEFT's new adapters are scaled by other rules).

        PEFT's ``svd`` decomposes the whole update ``[out, in]``; its ``cat``, decomposed by its factors, is the same to
        rounding and some hundred times faster.
        """
        shapes = [each.shape for each in given[0][:2]]
        given = [(a.flatten(1), b.flatten(1), weight) for a, b, weight in given]  # of convolutions
        a, b, _ = given[0]
        scaling = scaling_of(module_of(name), self.config)
        kind = "cat" if method == "peft_svd" else method.removeprefix("peft_")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model, layer = self._model(a.shape[1], b.shape[0], a.shape[0], scaling, len(given))
            for number, (each_a, each_b, _) in enumerate(given):
                layer.lora_A[str(number)].weight.data = each_a.float()
                layer.lora_B[str(number)].weight.data = each_b.float()
            torch.manual_seed(seed)
            model.add_weighted_adapter(
                [str(number) for number in range(len(given))], [value for *_, value in given], MERGED, kind,
                density=PEFT_DENSITY,
            )  # fmt: skip
        new_a, new_b = layer.lora_A[MERGED].weight.data, layer.lora_B[MERGED].weight.data / scaling
        model.delete_adapter(MERGED)
        if kind == "cat":
            new_a, new_b = balanced_factors(new_a, new_b)
            new_a, new_b = new_a[: len(a)], new_b[:, : len(a)]
        return new_a.to(a.dtype).view(shapes[0]), new_b.to(b.dtype).view(shapes[1])

    def _model(self, size_in: int, size_out: int, rank: int, scaling: float, num: int) -> tuple[Any, Any]:
        """A network of one layer with ``num`` adapters, called ``0``, ``1``, …, and that layer."""
        from peft import LoraConfig, get_peft_model

        key = (size_in, size_out, rank, scaling, num)
        if key not in self._models:
            base = nn.Module()
            base.layer = nn.Linear(1, 1, bias=False)
            base.layer.in_features, base.layer.out_features = size_in, size_out
            base.layer.weight = nn.Parameter(torch.zeros(1, 1).expand(size_out, size_in), requires_grad=False)
            alpha: Any = scaling * rank
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"])
            model = get_peft_model(base, config, "0")  # type: ignore[arg-type]
            for number in range(1, num):
                model.add_adapter(str(number), config)
            self._models[key] = model, base.layer
        return self._models[key]


Merges = NetworkMerges | PeftMerges
"""Makes one network of a few of a zoo, by several methods."""
