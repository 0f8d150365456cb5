"""The exact way between a state dict and tokens ``[L, D]``, and the constants that tokens do not hold.

Letters: B examples, L tokens of a checkpoint, D token width, N chosen tokens, K layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, Structure, digest_of, is_counter
from tokenization.checkpoint.progress import steps
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.compressed.form import Compressed
from tokenization.errors import InputError
from tokenization.files import empty_huge
from tokenization.layout.canonical import Canonical, find_pairs
from tokenization.layout.description import LayoutDescription
from tokenization.layout.normalization import Statistics, fitted_statistics
from tokenization.layout.placement import (
    BLOCK_VALUES,
    Layer,
    TokenOptions,
    as_reals,
    choose_layers,
    is_left_out,
    place_layers,
    rounded,
)
from tokenization.zoo.cache import cached_tensors
from tokenization.zoo.comparison import varying_constant
from tokenization.zoo.zoo import Zoo

__all__ = ["Layer", "TokenLayout", "TokenOptions"]


class TokenLayout(LayoutDescription):
    """Cuts checkpoints of one structure into tokens and puts tokens together again.

    Exactness. Through float64 tokens, ``decode(encode(x)) == x`` bit for bit for zero (but for its sign), for every
    float16 value, for float32 where ``|x| >= 2^-24 |c|`` and for bfloat16 where ``|x| >= 2^-40 |c|``. ``c`` is the
    centre (a parameter's or a layer's mean), or 5 % of the layer's mean for a running variance. A smaller value, which
    no number ``x - c`` can hold beside a large ``c``, is off by at most ``2^-46 |c|``, and a float64 value by at most
    ``2^-46 max(|x|, |c|)``. Through float32 tokens zeros stay zeros, and the error is below 1.5 units in the last place
    (of the stored dtype or of float32, whichever is coarser) of ``max(|x|, |x - c|)``, for a running variance about
    ten times that. Normalization ``none`` is bit exact in every dtype that the tokens' can hold; so is, in any mode, a
    layer that does not vary in the zoo.
    """

    @classmethod
    def fit(cls, zoo: Zoo, options: TokenOptions, indices: Sequence[int] | None = None) -> TokenLayout:
        """Place the tokens of a zoo and measure its statistics in one streaming pass, or take them from its cache.

        Memory stays below a few blocks a checkpoint, whatever the checkpoints' size.

        Args:
            indices: entries to measure; all of them when None.

        Raises:
            InputError: no checkpoints, broken or differing ones, NaN or infinity, patterns that fit nothing, a tensor
                that differs and cannot be learned.
        """
        indices = list(range(len(zoo))) if indices is None else [int(index) for index in indices]
        if not indices:
            raise InputError(f"{zoo.path} has no checkpoint to measure; collect some with `rpg collect`")
        compressed = Compressed.find(zoo.checkpoint(indices[0]), options.pruned)
        compressed = compressed and compressed.measured(zoo, indices)
        first = compressed.checkpoint(zoo, indices[0]) if compressed else zoo.checkpoint(indices[0])
        layout = cls._placed(first, options, _open_base(zoo, options.base, compressed) or first)
        layout.compressed = compressed
        layout.canonical = Canonical.fit(zoo, indices, layout.layers, options) if compressed is None else None
        opened = steps("bringing checkpoints into one form", indices) if layout.form else indices
        checkpoints = [layout.checkpoint(zoo, index) for index in opened]
        layout.copied = copied_constants(zoo, indices, checkpoints, layout.layers, options)
        key = None if layout.form is None else layout.form.key
        layout.statistics = fitted_statistics(zoo, indices, checkpoints, layout.layers, options.normalization, key)
        return layout

    @classmethod
    def without_statistics(cls, checkpoint: Checkpoint, options: TokenOptions) -> TokenLayout:
        """The layout of a single checkpoint, not measured, as with normalization ``none``; errors as of ``fit``."""
        compressed = Compressed.find(checkpoint, options.pruned)
        checkpoint = checkpoint if compressed is None else compressed.describe(checkpoint)
        layout = cls._placed(checkpoint, options, checkpoint)
        layout.compressed = compressed
        pairs = find_pairs(layout.layers, options)
        layout.canonical = Canonical("svd", pairs, None) if pairs else None  # the only one: nothing to align it with
        return layout

    @classmethod
    def _placed(cls, checkpoint: Checkpoint, options: TokenOptions, base: Checkpoint) -> TokenLayout:
        layers, num_tokens = place_layers(choose_layers(checkpoint, options), options)
        tokenised = {layer.name for layer in layers}
        specs = {name: spec for name, spec in base.specs.items() if name not in tokenised}
        statistics = Statistics.identity(len(layers))
        return cls(options, tuple(checkpoint.order), layers, num_tokens, checkpoint.ties, specs, statistics, base)

    def encode(self, source: Checkpoint | Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Cut a checkpoint or a state dict into normalised tokens ``[L, D]`` of ``dtype``; padding is 0.

        LoRA pairs are brought into the layout's canonical form first, compressed weights into that of their tokens.
        Raises InputError if a tensor is missing, has another shape, or differs in a layer that does not vary in the zoo
        (such a layer decodes to the zoo's values).
        """
        tokens = empty_huge((self.num_tokens, self.token_size), dtype)
        source = source if self.form is None else self.form.apply(source)
        self.encode_into(tokens, source)
        for index, layer in enumerate(self.layers):
            statistics = self.layer_statistics(index)
            if statistics.identity or statistics.scale:
                continue
            values = self._values(source, layer)
            for first in range(0, layer.num_values, BLOCK_VALUES):
                block = slice(first, first + BLOCK_VALUES)
                expected = statistics.denormalize(torch.zeros(1), statistics.centre_at(block))
                if not bool((values[block] == rounded(expected, layer.real_dtype)).all()):
                    what = f"tensor {layer.name!r} has values unlike the zoo's, whose checkpoints all share the same"
                    cure = "fit the layout with this checkpoint too, or list the tensor in tokens.exclude"
                    raise InputError(f"{what}; {cure}")
        return tokens

    def encode_into(self, tokens: Tensor, source: Checkpoint | Mapping[str, Tensor]) -> None:
        """``encode`` into ``tokens`` (``[L, D]``, contiguous) of what is in the form of ``checkpoint``, unchecked."""
        # All rows with padding are cleared first; that is cheaper than finding every gap.
        num_values = self.runs.num_values(np.arange(self.num_tokens))
        tokens[torch.from_numpy(np.flatnonzero(num_values < self.token_size))] = 0
        buffer = tokens.view(-1)
        for index, layer in enumerate(self.layers):
            statistics = self.layer_statistics(index).in_runs(layer)
            values = self._values(source, layer).view(layer.num_runs, layer.run_length)
            window = layer.window(buffer)
            for block in layer.blocks():
                window[block] = statistics.normalize(values[block], statistics.centre_at(block)).to(tokens.dtype)
            self._release(source, layer)

    def decode(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens ``[L, D]`` of any float dtype and device → the whole state dict on the CPU.

        An alias is the very tensor it is tied to; tensors outside the tokens are copies of the base checkpoint's.
        Raises ValueError for tokens of another shape.
        """
        require_shape(self, tokens.shape)
        buffer = tokens.detach().cpu().contiguous().view(-1)
        stored: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            statistics = self.layer_statistics(index).in_runs(layer)
            values = empty_huge((layer.num_runs, layer.run_length), layer.real_dtype)
            window = layer.window(buffer)
            for block in layer.blocks():
                made = statistics.denormalize(window[block], statistics.centre_at(block))
                values[block] = rounded(made, layer.real_dtype)
            stored[layer.name] = layer.stored(values.view(-1))
            self._release(None, layer)
        return self.finished(stored)

    def decode_batch(self, tokens: Tensor, *, constants: bool = False) -> dict[str, Tensor]:
        """Tokens ``[..., L, D]`` → the tokenised tensors ``[..., *shape]``, aliases too, differentiable.

        Dtype and device are the tokens'. With ``constants`` also the tensors outside the tokens, ``[..., *shape]`` in
        their own dtype, expanded and not copied.

        Raises:
            ValueError: tokens of another shape.
            InputError: of compressed weights, which no gradient goes through.
        """
        require_shape(self, tokens.shape[-2:])
        if self.compressed is not None:
            raise InputError("losses on data need dense networks, and the zoo's are pruned or quantised; drop the loss")
        batch = tokens.shape[:-2]
        buffer = tokens.reshape(*batch, self.num_tokens * self.token_size)
        stored: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            statistics = self.layer_statistics(index)
            span = buffer[..., layer.start : layer.start + layer.num_runs * layer.run_stride]
            values = span.unflatten(-1, (layer.num_runs, layer.run_stride))[..., : layer.run_length]
            values = values.reshape(*batch, layer.num_values)
            centre = statistics.centre
            if isinstance(centre, Tensor):
                centre = centre.to(tokens.device, tokens.dtype)
            stored[layer.name] = layer.stored(statistics.denormalize_as(values, centre))
        for name in self.constant_specs if constants else ():
            value = self.constant(name)
            stored[name] = value.to(tokens.device).expand(*batch, *value.shape)
        return self.with_aliases(stored)

    def _values(self, source: Checkpoint | Mapping[str, Tensor], layer: Layer) -> Tensor:
        """All values of a layer, flat, checked."""
        if isinstance(source, Checkpoint):
            shape, values = source.info(layer.name).shape, source.flat(layer.name)
        else:
            names = [layer.name, *(alias for alias, name in self.ties.items() if name == layer.name)]
            tensor = next((source[name] for name in names if name in source), None)
            if tensor is None:
                what = f"tensor {layer.name!r} of shape {list(layer.shape)} is missing from the state dict"
                raise InputError(f"{what}; encode a network of the zoo's structure")
            shape, values = tuple(tensor.shape), tensor.detach().cpu().reshape(-1)
        number = values.is_floating_point() or values.is_complex()
        if tuple(shape) != layer.shape or not number or values.is_complex() != layer.dtype.is_complex:
            what = f"tensor {layer.name!r} is {values.dtype} of shape {list(shape)}"
            expected = f"the zoo's is {layer.dtype} of shape {list(layer.shape)}"
            raise InputError(f"{what}, but {expected}; encode a network of the zoo's structure")
        return as_reals(values.resolve_conj())

    def _release(self, source: Any, layer: Layer) -> None:
        if isinstance(source, Checkpoint):
            source.release(layer.name)
        self.statistics.release(layer.name)


def require_shape(layout: Any, shape: Sequence[int]) -> None:
    """Raise ValueError unless ``shape`` is that of a network's tokens in a layout of any kind."""
    if tuple(shape) != (layout.num_tokens, layout.token_size):
        raise ValueError(f"tokens of shape {list(shape)} must be [{layout.num_tokens}, {layout.token_size}]")


def _open_base(zoo: Zoo, base: str | None, compressed: Compressed | None) -> Checkpoint | None:
    """The checkpoint that ``tokens.base`` names: a file of the zoo, or a path. It must fit the zoo's structure."""
    if base is None:
        return None
    for index, entry in enumerate(zoo.entries):
        if entry.file == base:
            return compressed.checkpoint(zoo, index) if compressed else zoo.checkpoint(index)
    checkpoint, ties = Checkpoint.open(base), zoo.structure.ties
    zoo.structure.require(Structure.of_checkpoint(checkpoint), f"tokens.base: {base}", {*ties, *ties.values()})
    checkpoint = checkpoint.arranged(ties, zoo.structure.not_finite)
    return compressed.open(zoo, checkpoint, digest_of(checkpoint)) if compressed else checkpoint


VERSION = 1
VARIES = "varies"
_CHUNK_BYTES = 1 << 24


def copied_constants(
    zoo: Zoo,
    indices: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    layers: Sequence[Layer],
    options: TokenOptions,
) -> tuple[str, ...]:
    """The tensors, counters apart, that the options keep out of the tokens although checkpoints differ in them.

    Raises InputError that names a tensor which differs and is not left out, and two files.
    """
    first, tokenised = checkpoints[0], {layer.name for layer in layers}
    names = [name for name in first.tensors if name not in tokenised and first.tensors[name].num_values]
    if not names or len(checkpoints) < 2:
        return ()

    def write(file: TensorFile) -> None:
        flags = [any(_differ(first, other, name) for other in checkpoints[1:]) for name in names]
        file.write(VARIES, 0, torch.tensor(flags, dtype=torch.uint8))

    key = [VERSION, zoo.digest(), list(indices), names]
    flags = cached_tensors(zoo, "constants", key, {VARIES: (torch.uint8, (len(names),))}, write).flat(VARIES)
    copied = []
    for name, varies in zip(names, flags.tolist(), strict=True):
        info = first.tensors[name]
        if not varies or is_counter(name, info.dtype, info.num_values):
            continue
        if not is_left_out(first, name, options):
            other = next(place for place, each in enumerate(checkpoints) if place and _differ(first, each, name))
            files = (zoo.entries[indices[place]].source or str(checkpoints[place].path) for place in (0, other))
            raise InputError(varying_constant(name, info.dtype, *files))
        copied.append(name)
    return tuple(copied)


def _differ(first: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether two checkpoints have different bytes there; reads no further than to the first that differs."""
    chunks = (each.flat(name).view(torch.uint8).split(_CHUNK_BYTES) for each in (first, other))
    found = any(not torch.equal(left, right) for left, right in zip(*chunks, strict=True))
    first.release(name)
    other.release(name)
    return found
