"""The exact plan state dict ⇄ tokens ``[L, D]``.

Letters: B examples, L tokens of a checkpoint, D token width, N chosen tokens, K layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.layout import serialization as layout_file
from tokenization.layout.normalization import LayerStatistics, Statistics, TensorSource
from tokenization.layout.placement import BLOCK_VALUES, Layer, RunTable, TokenOptions, choose_layers, place_layers
from tokenization.layout.reader import TokenReader
from tokenization.layout.summary import LayerGroup, group_layers
from tokenization.layout.writer import TensorSpec
from tokenization.lora.canonical import Canonical, find_pairs
from tokenization.pages import empty_huge, release_pages
from tokenization.zoo.zoo import Zoo

__all__ = ["Layer", "TokenLayout", "TokenOptions"]


class TokenLayout:
    """Cuts checkpoints of one structure into tokens and puts tokens together again.

    Exactness. Through float64 tokens, ``decode(encode(x)) == x`` bit for bit for zero (but for its sign), for every
    float16 value, for float32 where ``|x| >= 2^-24 |c|`` and for bfloat16 where ``|x| >= 2^-40 |c|``. ``c`` is the
    centre (a parameter's or a layer's mean), or 5 % of the layer's mean for a running variance. A smaller value, which
    no number ``x - c`` can hold beside a large ``c``, is off by at most ``2^-46 |c|``, and a float64 value by at most
    ``2^-46 max(|x|, |c|)``. Through float32 tokens zeros stay zeros, and the error is below 1.5 units in the last place
    (of the stored dtype or of float32, whichever is coarser) of ``max(|x|, |x - c|)``, for a running variance about
    ten times that. Normalization ``none`` is bit exact in every dtype that the tokens' can hold; so is, in any mode, a
    layer that does not vary in the zoo.

    Attributes:
        options: how the tokens are cut.
        names: every key of the state dict, in order.
        layers: the tokenised tensors, in order.
        num_tokens: L.
        ties: ``{alias: name}``.
        statistics: the normalisation.
        constant_specs: ``{name: (dtype, shape)}`` of the tensors outside the tokens.
        canonical: the form that LoRA pairs are brought into before they are cut, if any; ``decode`` gives that form.
    """

    def __init__(
        self,
        options: TokenOptions,
        names: Sequence[str],
        layers: Sequence[Layer],
        num_tokens: int,
        ties: Mapping[str, str],
        constant_specs: Mapping[str, TensorSpec],
        statistics: Statistics,
        constant_source: TensorSource,
        constant_prefix: str = "",
        canonical: Canonical | None = None,
    ) -> None:
        self.options = options
        self.names = tuple(names)
        self.layers = tuple(layers)
        self.num_tokens = num_tokens
        self.ties = dict(ties)
        self.constant_specs = dict(constant_specs)
        self.statistics = statistics
        self._constant_source = constant_source
        self._constant_prefix = constant_prefix
        self.canonical = canonical
        self._reader: TokenReader | None = None

    @classmethod
    def fit(cls, zoo: Zoo, options: TokenOptions, indices: Sequence[int] | None = None) -> TokenLayout:
        """Plan the tokens of a zoo and measure its statistics in one streaming pass.

        The statistics are kept in the zoo's folder ``cache`` (which may be deleted at any time), under the digest of
        the zoo. Memory stays below a few blocks a checkpoint, whatever the checkpoints' size.

        Args:
            zoo: the checkpoints.
            options: how to cut and normalise.
            indices: entries to measure; all of them when None.

        Raises:
            InputError: no checkpoints, broken or differing ones, NaN or infinity, patterns that fit nothing.
        """
        indices = list(range(len(zoo))) if indices is None else [int(index) for index in indices]
        if not indices:
            raise InputError(str(zoo.path), "no checkpoint to measure", "at least one", "collect some")
        first = zoo.checkpoint(indices[0])
        layout = cls._planned(first, options, layout_file.open_base(zoo, options.base) or first)
        layout.canonical = Canonical.fit(zoo, indices, layout.layers, options)
        checkpoints = [layout.checkpoint(zoo, index) for index in indices]
        form = layout.canonical.key if layout.canonical else None
        layout.statistics = layout_file.fitted_statistics(zoo, indices, checkpoints, layout.layers, options, form)
        return layout

    @classmethod
    def plan(cls, checkpoint: Checkpoint, options: TokenOptions) -> TokenLayout:
        """The layout of a single checkpoint, without statistics: as with normalization ``none``.

        Raises:
            InputError: patterns that fit nothing, a tensor of a dtype that cannot be tokenised.
        """
        layout = cls._planned(checkpoint, options, checkpoint)
        pairs = find_pairs(layout.layers) if options.lora_canonical != "none" else ()
        layout.canonical = Canonical("svd", pairs, None) if pairs else None  # the only one: nothing to align it with
        return layout

    @classmethod
    def _planned(cls, checkpoint: Checkpoint, options: TokenOptions, base: Checkpoint) -> TokenLayout:
        layers, num_tokens = place_layers(choose_layers(checkpoint, options), options)
        tokenised = {layer.name for layer in layers}
        specs = {info.name: (info.dtype, info.shape) for info in base.tensors.values() if info.name not in tokenised}
        statistics = Statistics.identity(len(layers))
        return cls(options, checkpoint.order, layers, num_tokens, checkpoint.ties, specs, statistics, base)

    @property
    def token_size(self) -> int:
        """Token width D."""
        return self.options.size

    @property
    def num_values(self) -> int:
        """How many values of a checkpoint are in its tokens."""
        return sum(layer.num_values for layer in self.layers)

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

    def checkpoint(self, zoo: Zoo, index: int) -> Checkpoint:
        """An entry of a zoo as it is cut into tokens: the zoo's own, its LoRA pairs in canonical form."""
        return zoo.checkpoint(index) if self.canonical is None else self.canonical.checkpoint(zoo, index)

    def encode(self, source: Checkpoint | Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Cut a checkpoint or a state dict into normalised tokens ``[L, D]`` of ``dtype``; padding is 0.

        LoRA pairs are brought into the layout's canonical form first.

        Raises:
            InputError: a tensor is missing or has another shape, or differs in a layer that does not vary in the zoo
                (such a layer decodes to the zoo's values).
        """
        tokens = empty_huge((self.num_tokens, self.token_size), dtype)
        source = source if self.canonical is None else self.canonical.apply(source)
        self.encode_into(tokens, source)
        for index, layer in enumerate(self.layers):
            statistics = self.layer_statistics(index)
            if statistics.identity or statistics.scale:
                continue
            values = self._values(source, layer)
            for first in range(0, layer.num_values, BLOCK_VALUES):
                block = slice(first, first + BLOCK_VALUES)
                expected = statistics.denormalize(torch.zeros(1), statistics.centre_at(block))
                if not bool((values[block] == expected.to(layer.dtype)).all()):
                    raise InputError(
                        f"tensor {layer.name!r}", "values unlike the zoo's", "those that all its checkpoints share",
                        "fit the layout with this checkpoint too, or list the tensor in tokens.exclude",
                    )  # fmt: skip
        return tokens

    def encode_into(self, tokens: Tensor, source: Checkpoint | Mapping[str, Tensor]) -> None:
        """``encode`` into ``tokens`` (``[L, D]``, contiguous), a layer that does not vary becoming 0 in any case.

        LoRA pairs are taken to be in canonical form, as those of ``checkpoint`` are.
        """
        # All rows with padding are cleared first; that is cheaper than finding every gap.
        num_values = self.runs.num_values(np.arange(self.num_tokens))
        tokens[torch.from_numpy(np.flatnonzero(num_values < self.token_size))] = 0
        buffer = tokens.view(-1)
        for index, layer in enumerate(self.layers):
            statistics = self.layer_statistics(index)
            values = self._values(source, layer).view(layer.num_runs, layer.run_length)
            window = layer.window(buffer)
            centres = statistics.centre_window(layer.num_runs, layer.run_length)
            for block in layer.blocks():
                window[block] = statistics.normalize(values[block], centres(block)).to(tokens.dtype)
            self._release(source, layer)

    def decode(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens ``[L, D]`` of any float dtype and device → the whole state dict on the CPU.

        Order, shapes and stored dtypes are the checkpoints'; an alias is the very tensor it is tied to; tensors outside
        the tokens are copies of the base checkpoint's.

        Raises:
            ValueError: tokens of another shape.
        """
        self._require_shape(tokens.shape)
        buffer = tokens.detach().cpu().contiguous().view(-1)
        stored: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            statistics = self.layer_statistics(index)
            values = empty_huge((layer.num_runs, layer.run_length), layer.dtype)
            window = layer.window(buffer)
            centres = statistics.centre_window(layer.num_runs, layer.run_length)
            for block in layer.blocks():
                values[block] = statistics.denormalize(window[block], centres(block)).to(layer.dtype)
            stored[layer.name] = values.view(layer.shape)
            self._release(None, layer)
        stored |= {name: self.constant(name).clone() for name in self.constant_specs}
        return {name: stored[self.ties.get(name, name)] for name in self.names}

    def decode_batch(self, tokens: Tensor, *, constants: bool = False) -> dict[str, Tensor]:
        """Tokens ``[..., L, D]`` → the tokenised tensors ``[..., *shape]`` in the tokens' dtype and on their device.

        Differentiable. Aliases are included.

        Args:
            tokens: of any float dtype and device.
            constants: add the tensors outside the tokens, ``[..., *shape]`` too, in their own dtype; no copy is made
                for each network.

        Raises:
            ValueError: tokens of another shape.
        """
        self._require_shape(tokens.shape[-2:])
        batch = tokens.shape[:-2]
        buffer = tokens.reshape(*batch, self.num_tokens * self.token_size)
        stored: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            statistics = self.layer_statistics(index)
            span = buffer[..., layer.start : layer.start + layer.num_runs * layer.run_stride]
            values = span.unflatten(-1, (layer.num_runs, layer.run_stride))[..., : layer.run_length]
            values = values.reshape(*batch, *layer.shape)
            centre = statistics.centre
            if isinstance(centre, Tensor):
                centre = centre.to(tokens.device, tokens.dtype).reshape(layer.shape)
            stored[layer.name] = statistics.denormalize_as(values, centre)
        for name in self.constant_specs if constants else ():
            value = self.constant(name)
            stored[name] = value.to(tokens.device).expand(*batch, *value.shape)
        names = [name for name in self.names if self.ties.get(name, name) in stored]
        return {name: stored[self.ties.get(name, name)] for name in names}

    @property
    def constants(self) -> dict[str, Tensor]:
        """The tensors outside the tokens, aliases included, as the base checkpoint has them."""
        stored = {name: self.constant(name) for name in self.constant_specs}
        return {name: stored[self.ties.get(name, name)] for name in self.names if self.ties.get(name, name) in stored}

    def constant(self, name: str) -> Tensor:
        """One tensor outside the tokens, in the memory map it is read from."""
        return self._constant_source.flat(self._constant_prefix + name).view(self.constant_specs[name][1])

    def read_tokens(
        self, zoo: Zoo, checkpoint_ids: Tensor | Sequence[int], token_ids: Tensor | Sequence[int]
    ) -> Tensor:
        """Rows of the zoo's tokens, ``[B, N, D]`` float32, read without touching the rest; see `TokenReader.read`."""
        if self._reader is None or self._reader.zoo is not zoo:
            self._reader = TokenReader(zoo, self, cache_bytes=0)
        return self._reader.read(checkpoint_ids, token_ids)

    def describe(self) -> list[LayerGroup]:
        """The layers by kind: how many tensors, values and tokens, and how much padding."""
        return group_layers(self.layers, self.num_tokens, self.token_size)

    def spec(self, name: str) -> TensorSpec:
        """Stored dtype and shape of a key of the state dict."""
        name = self.ties.get(name, name)
        layer = self._layer_by_name.get(name)
        return self.constant_specs[name] if layer is None else (layer.dtype, layer.shape)

    def save(self, folder: Path | str) -> None:
        """Write ``layout.json`` and ``statistics.safetensors``. Raises InputError when the disk refuses."""
        layout_file.save(self, Path(folder))

    @classmethod
    def load(cls, folder: Path | str) -> TokenLayout:
        """Read what ``save`` wrote; means and constants stay in the file until they are used.

        Raises:
            InputError: a file is missing, damaged, or of another version.
        """
        return cls(**layout_file.load(Path(folder)))

    @cached_property
    def _layer_by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def _values(self, source: Checkpoint | Mapping[str, Tensor], layer: Layer) -> Tensor:
        """All values of a layer, flat, checked."""
        where = f"tensor {layer.name!r}"
        if isinstance(source, Checkpoint):
            shape, values = source.info(layer.name).shape, source.flat(layer.name)
        else:
            names = [layer.name, *(alias for alias, name in self.ties.items() if name == layer.name)]
            tensor = next((source[name] for name in names if name in source), None)
            if tensor is None:
                raise InputError(where, "no such tensor in the state dict", f"one of shape {list(layer.shape)}")
            shape, values = tuple(tensor.shape), tensor.detach().cpu().reshape(-1)
        if tuple(shape) != layer.shape or not values.is_floating_point():
            raise InputError(where, f"{values.dtype} of shape {list(shape)}", f"{layer.dtype} of {list(layer.shape)}")
        return values

    def _release(self, source: Any, layer: Layer) -> None:
        if isinstance(source, Checkpoint):
            release_pages(source, layer.name)
        self.statistics.release(layer.name)

    def _require_shape(self, shape: Sequence[int]) -> None:
        if tuple(shape) != (self.num_tokens, self.token_size):
            raise ValueError(f"tokens: found shape {list(shape)}, expected [{self.num_tokens}, {self.token_size}]")

    def __getstate__(self) -> dict[str, Any]:
        hidden = {"runs", "_layer_by_name", "_reader"}
        return {**{key: value for key, value in self.__dict__.items() if key not in hidden}, "_reader": None}
