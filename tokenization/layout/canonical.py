"""Adapters whose LoRA pairs all have one form, so that the runs of a zoo compare value by value.

The factors are computed once and kept in the zoo's folder ``cache``. A pair keeps its product ``B A`` up to the
rounding of the stored dtype; whatever else an adapter holds (DoRA magnitudes, biases) stays as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, StateDict
from tokenization.checkpoint.progress import steps
from tokenization.checkpoint.safetensors import TensorSpec, tensor_at
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.errors import InputError
from tokenization.layout.normalization import TensorSource
from tokenization.layout.placement import CanonicalForm, Layer, TokenOptions
from tokenization.lora.adapter import CONFIG_NAME, align_factors, balanced_factors, partner_of, read_adapter_config
from tokenization.zoo.cache import MARK, Form, cached_tensors
from tokenization.zoo.zoo import Zoo

VERSION = 1
NO_PRODUCT = ("target_parameters", "kasa_config", "use_bdlora")
"""Fields of PEFT's configuration under which an update is not ``B A``: stacked experts, a diagonal, blocks."""

REFERENCE_CHECKPOINTS, REFERENCE_ROUNDS = 32, 3
"""Of how many adapters, spread over the zoo, the reference is the mean, and how often they are aligned to it anew."""


def reference_name(layer_name: str) -> str:
    """Under which name a layer of the reference is stored."""
    return f"reference.{layer_name}"


Pair = tuple[Layer, Layer]
"""The layers ``(A [r, in], B [out, r])`` of a LoRA update."""


def find_pairs(layers: Sequence[Layer], options: TokenOptions) -> tuple[Pair, ...]:
    """The pairs to bring into one form: each LoRA update of a linear or embedding layer, unless options say ``none``.

    In grouped convolutions components cannot mix.
    """
    if options.lora_canonical == "none":
        return ()
    by_name = {layer.name: layer for layer in layers}
    pairs = []
    for a in layers:
        side, partner = partner_of(a.name) or ("", "")
        b = by_name.get(partner)
        if side == "A" and b is not None and len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]:
            pairs.append((a, b))
    return tuple(pairs)


def no_product(zoo: Zoo) -> str | None:
    """The field of PEFT's configuration by which pairs of a zoo's adapters are not simply multiplied; None without."""
    config = read_adapter_config(zoo.path) if (zoo.path / CONFIG_NAME).is_file() else {}
    return next((field for field in NO_PRODUCT if config.get(field)), None)


class Canonical(Form):
    """Brings the ``pairs`` of adapters of one structure into the form ``svd`` or ``aligned``.

    ``reference`` is what pairs are rotated to, float32 under `reference_name`; None for ``svd``.
    """

    def __init__(self, form: CanonicalForm, pairs: Sequence[Pair], reference: TensorSource | None) -> None:
        super().__init__()
        self.form = form
        self.pairs = tuple(pairs)
        self.reference = reference

    @classmethod
    def fit(cls, zoo: Zoo, indices: Sequence[int], layers: Sequence[Layer], options: TokenOptions) -> Canonical | None:
        """The form that ``options.lora_canonical`` names for a zoo; None without it, or where there are no pairs.

        Raises InputError if the adapters are of a variant of LoRA whose pairs are not simply multiplied.
        """
        if not (pairs := find_pairs(layers, options)):
            return None
        if (field := no_product(zoo)) is not None:
            what = f"tokens.lora_canonical: the pairs of adapters with {field} are not simply multiplied"
            raise InputError(f"{what}, so that they have no {options.lora_canonical!r} form; set it to 'none'")
        reference = _fitted_reference(zoo, indices, pairs) if options.lora_canonical == "aligned" else None
        return cls(options.lora_canonical, pairs, reference)

    @functools.cached_property
    def key(self) -> str:  # type: ignore[override]
        """SHA-256 (hexadecimal) of all that decides the form."""
        digest = hashlib.sha256(json.dumps([VERSION, self.form, [layer.name for layer in self.layers]]).encode())
        if self.reference is not None:
            for layer in self.layers:
                digest.update(self.reference.flat(reference_name(layer.name)).contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def layers(self) -> list[Layer]:
        """The layers of all pairs."""
        return [layer for pair in self.pairs for layer in pair]

    @property
    def reference_specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of the tensors of a reference, by name."""
        return {reference_name(layer.name): (torch.float32, layer.shape) for layer in self.layers}

    def _open(self, zoo: Zoo, index: int) -> Checkpoint:
        original = zoo.checkpoint(index)

        def write(file: TensorFile) -> None:
            for pair in self.pairs:
                for layer, factor in zip(pair, self._factors(pair, *_values(original, pair)), strict=True):
                    file.write(layer.name, 0, factor.to(layer.dtype))
                    original.release(layer.name)

        specs = {layer.name: (layer.dtype, layer.shape) for layer in self.layers}
        cached = cached_tensors(zoo, "canonical", [self.key, zoo.digest_of(index)], specs, write)
        tensors = {n: cached.tensors.get(n, info) for n, info in original.tensors.items()}
        sizes, metadata = {**original.sizes, **cached.sizes}, {**original.metadata, MARK: self.key}
        return replace(original, tensors=tensors, metadata=metadata, sizes=sizes)

    def expand(self, network: StateDict) -> dict[str, Tensor]:
        """An adapter in canonical form; a pair that is missing or of another shape is left alone."""
        result = dict(network)
        for pair in self.pairs:
            if all(layer.name in result and tuple(result[layer.name].shape) == layer.shape for layer in pair):
                values = [result[layer.name].detach().cpu() for layer in pair]
                for layer, factor in zip(pair, self._factors(pair, values), strict=True):
                    result[layer.name] = factor.to(layer.dtype)
        return result

    def _factors(self, pair: Pair, values: Sequence[Tensor], where: str = "") -> tuple[Tensor, Tensor]:
        """The canonical ``(A, B)`` of a pair's ``values``, float64."""
        for layer, tensor in zip(pair, values, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                what = tensor_at(where, layer.name) if where else f"tensor {layer.name!r}"
                raise InputError(f"{what} has NaN or infinite values; leave the checkpoint out of the zoo")
        a, b = balanced_factors(*values)
        if self.reference is None:
            return a, b
        return align_factors(a, b, *(self.reference.flat(reference_name(x.name)).view(x.shape) for x in pair))


def _fitted_reference(zoo: Zoo, indices: Sequence[int], pairs: Sequence[Pair]) -> Checkpoint:
    """The mean of aligned adapters (generalised Procrustes analysis, Gower 1975), from the cache or made now."""
    step = max(1, -(-len(indices) // REFERENCE_CHECKPOINTS))
    checkpoints = [zoo.checkpoint(index) for index in indices[::step]]
    form = Canonical("svd", pairs, None)

    def write(file: TensorFile) -> None:
        for pair in steps("aligning adapters", pairs):
            factors = [form._factors(pair, *_values(checkpoint, pair)) for checkpoint in checkpoints]
            for layer, mean in zip(pair, _mean_of_aligned(factors), strict=True):
                file.write(reference_name(layer.name), 0, mean.float())
                for checkpoint in checkpoints:
                    checkpoint.release(layer.name)

    digests = [zoo.digest_of(index) for index in indices[::step]]
    key = [VERSION, digests, [layer.name for layer in form.layers]]
    return cached_tensors(zoo, "reference", key, form.reference_specs, write)


def _values(checkpoint: Checkpoint, pair: Pair) -> tuple[list[Tensor], str]:
    return [checkpoint.flat(layer.name).view(layer.shape) for layer in pair], str(checkpoint.path)


def _mean_of_aligned(factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    mean_a, mean_b = factors[0]
    for _ in range(REFERENCE_ROUNDS):
        aligned = [align_factors(a, b, mean_a, mean_b) for a, b in factors]
        mean_a, mean_b = (torch.stack(side).mean(0) for side in zip(*aligned, strict=True))
    return mean_a, mean_b
