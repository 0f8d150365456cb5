"""The layouts that a configuration may ask for: tokens of values, or of coefficients along the zoo's directions.

Letters as in `tokenization.layout.directions`.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import TensorSpec
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.compressed.form import Compressed, CompressedWriter
from tokenization.errors import InputError
from tokenization.files import empty_huge
from tokenization.layout.canonical import Canonical
from tokenization.layout.description import LayerGroup
from tokenization.layout.directions import DIRECTIONS, NUMBERS, Basis, FittedBasis, basis_specs, fit_basis
from tokenization.layout.layout import TokenLayout, require_shape
from tokenization.layout.normalization import InMemory
from tokenization.layout.placement import Layer, TokenOptions
from tokenization.layout.rows import CheckpointWriter, TokenReader, values_of
from tokenization.zoo.zoo import Zoo

BASIS_FILE = "basis.safetensors"


def _of_cut(name: str) -> Any:
    """What a `SpectralLayout` has from its cut."""
    return property(operator.attrgetter(f"cut.{name}"))


class SpectralLayout:
    """Cuts checkpoints as `TokenLayout` does and gives every token by its coefficients; the same interface.

    ``decode(encode(x))`` is ``x`` without what lies outside the directions: for a checkpoint of the zoo nothing once
    k reaches n - 1 and directions are kept in fp32, up to rounding. The arithmetic of values is float32 here.

    Attributes:
        cut: cuts and normalises, ``[L, D]``.
        basis: the directions of its tokens.
        fitted: where the zoo's checkpoints lie, as measured; only of a layout that `fit` made.
        indices: the entries of the zoo that were measured.
    """

    def __init__(
        self, cut: TokenLayout, basis: Basis, fitted: FittedBasis | None = None, indices: Sequence[int] = ()
    ) -> None:
        self.cut, self.basis, self.fitted, self.indices = cut, basis, fitted, tuple(indices)

    @classmethod
    def fit(cls, zoo: Zoo, options: TokenOptions, indices: Sequence[int] | None = None) -> SpectralLayout:
        """Measure a zoo: `TokenLayout.fit`, then the directions of every token. Errors as there and in `fit_basis`."""
        chosen = list(range(len(zoo))) if indices is None else [int(index) for index in indices]
        cut = TokenLayout.fit(zoo, options, chosen)
        fitted = fit_basis(cut, zoo, chosen, options)
        return cls(cut, fitted.basis, fitted, chosen)

    @classmethod
    def without_statistics(cls, checkpoint: Checkpoint, options: TokenOptions, num_checkpoints: int) -> SpectralLayout:
        """The sizes of a layout that is not fitted: its directions have no values. ``auto`` counts as all of them."""
        cut = TokenLayout.without_statistics(checkpoint, options)
        most = max(1, num_checkpoints - 1)
        rank = most if options.rank in (None, "auto") else min(int(options.rank or 1), most)
        specs = basis_specs(cut.num_tokens, rank, options)
        numbers = [torch.ones(specs[name][1], dtype=torch.float64) for name in NUMBERS]
        return cls(cut, Basis(InMemory({}), specs[DIRECTIONS][1], *numbers))  # type: ignore[arg-type]

    options: TokenOptions = _of_cut("options")
    names: tuple[str, ...] = _of_cut("names")
    layers: tuple[Layer, ...] = _of_cut("layers")
    num_values: int = _of_cut("num_values")
    padding_share: float = _of_cut("padding_share")
    ties: dict[str, str] = _of_cut("ties")
    constant_specs: dict[str, TensorSpec] = _of_cut("constant_specs")
    canonical: Canonical | None = _of_cut("canonical")
    compressed: Compressed | None = _of_cut("compressed")
    copied: tuple[str, ...] = _of_cut("copied")
    copied_note: str = _of_cut("copied_note")
    spec: Callable[[str], TensorSpec] = _of_cut("spec")
    checkpoint: Callable[[Zoo, int], Checkpoint] = _of_cut("checkpoint")
    describe: Callable[[], list[LayerGroup]] = _of_cut("describe")

    def shares(self) -> list[tuple[str, float, float]]:
        """Of each layer (by its tokens' first values): name, part of the zoo's variance, part of that which is kept."""
        layers = self.cut.positions[:, 0]
        total, kept = (torch.zeros(len(self.layers), dtype=torch.float64) for _ in range(2))
        total.index_add_(0, layers, self.basis.total)
        kept.index_add_(0, layers, self.basis.kept)
        parts, shares = total / total.sum().clamp(min=1e-300), torch.where(total > 0, kept / total, 1.0)
        return list(zip((layer.name for layer in self.layers), parts.tolist(), shares.tolist(), strict=True))

    @property
    def token_size(self) -> int:
        """Width of a token: k directions."""
        return self.basis.shape[1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.basis.scale)

    @property
    def positions(self) -> Tensor:
        """(layer, token in the layer), ``[T, 2]`` long; of a network's basis zeros."""
        return self.cut.positions if self.basis.kind == "token" else torch.zeros(1, 2, dtype=torch.long)

    @property
    def num_coordinates(self) -> int:
        """How many numbers a checkpoint is: directions of all tokens."""
        return int(self.basis.alive.sum())

    @property
    def token_weight(self) -> Tensor:
        """``[T]`` float64: what a unit of each token's coefficients is in normalised values."""
        return self.basis.scale

    @property
    def mask(self) -> Tensor:
        """True where a token has a direction, ``[T, k]`` bool."""
        return self.basis.alive

    def mask_rows(self, token_ids: Tensor | Sequence[int]) -> Tensor:
        """The rows ``token_ids`` (any shape ``[...]``) of ``mask``, ``[..., k]``."""
        return self.basis.alive[torch.as_tensor(token_ids, device="cpu")]

    def encode(self, source: Checkpoint | Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Coefficients ``[T, k]`` of a checkpoint or a state dict: it is projected. Raises as `TokenLayout.encode`."""
        return (self.basis.project(self.cut.encode(source)) * self.basis.alive).to(dtype)

    def decode(self, tokens: Tensor) -> dict[str, Tensor]:
        """Coefficients ``[T, k]`` → the whole state dict on the CPU. Raises ValueError for another shape."""
        require_shape(self, tokens.shape)
        stored = {layer.name: empty_huge((layer.num_values,), layer.real_dtype) for layer in self.cut.layers}
        for first, rows in self.expand(tokens.detach().cpu(), 0, self.num_tokens):
            for name, place, values in values_of(self.cut, first, rows, exact=False):
                stored[name][place : place + len(values)] = values
        return self.cut.finished({layer.name: layer.stored(stored[layer.name]) for layer in self.cut.layers})

    def decode_batch(self, tokens: Tensor, *, constants: bool = False) -> dict[str, Tensor]:
        """Coefficients ``[..., T, k]`` → the tokenised tensors ``[..., *shape]``; see `TokenLayout.decode_batch`."""
        require_shape(self, tokens.shape[-2:])
        blocks = [rows for _, rows in self.basis.expand(tokens, 0, self.cut.num_tokens)]
        return self.cut.decode_batch(torch.cat(blocks, -2), constants=constants)

    def expand(self, rows: Tensor, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Tokens of the cut from spectral tokens ``first`` to ``last``, ``[n, k]``: (the first, rows ``[m, D]``)."""
        span = (first, last) if self.basis.kind == "token" else (0, self.cut.num_tokens)
        for tokens, wide in self.basis.expand(rows, *span):
            yield tokens.start, wide

    def save(self, folder: Path | str) -> None:
        """Write the cut's files and ``basis.safetensors``. Raises InputError when the disk refuses."""
        specs = basis_specs(self.cut.num_tokens, self.token_size, self.options)
        with TensorFile(Path(folder) / BASIS_FILE, specs) as file:
            for name, values in zip(NUMBERS, self.basis.numbers, strict=True):
                file.write(name, 0, values.contiguous())
            for tokens, directions in self.basis.blocks(0, self.cut.num_tokens):
                file.write(DIRECTIONS, tokens.start * directions[0].numel(), directions)
        self.cut.save(folder)

    @classmethod
    def load(cls, folder: Path | str) -> SpectralLayout:
        """Read what ``save`` wrote; directions stay in the file until they are used. Raises as `TokenLayout.load`."""
        cut = TokenLayout.load(folder)
        source = Checkpoint.open(Path(folder) / BASIS_FILE)
        rank = source.info(DIRECTIONS).shape[1] if DIRECTIONS in source.tensors else 1
        specs = basis_specs(cut.num_tokens, rank, cut.options)
        source.require(specs)
        return cls(cut, Basis.read(source, specs))


class SpectralReader:
    """Reads coefficients of a zoo's checkpoints: those that the basis was found from are in memory.

    Other checkpoints are projected when they are first asked for, and kept. Thread-safe.
    """

    def __init__(self, zoo: Zoo, layout: SpectralLayout) -> None:
        self.zoo, self.layout = zoo, layout
        self._known: dict[int, Tensor] = {}
        if layout.fitted is not None:
            self._known = dict(zip(layout.indices, layout.fitted.coefficients, strict=True))
        self._lock = threading.Lock()

    def read(self, checkpoint_ids: Tensor | Sequence[int], token_ids: Tensor | Sequence[int]) -> Tensor:
        """Rows ``[B, N, k]`` float32; arguments as of `TokenReader.read`. Raises IndexError for an id out of range."""
        ids = torch.as_tensor(token_ids, device="cpu")
        numbers = [int(number) for number in checkpoint_ids]
        if any(not 0 <= number < len(self.zoo) for number in numbers):
            raise IndexError(f"checkpoint_ids {numbers} must lie in 0 to {len(self.zoo) - 1}")
        whole = torch.stack([self._coefficients(number) for number in numbers])  # [B, T, k]
        if ids.dim() == 1:
            return whole[:, ids]
        return whole.gather(1, ids[..., None].expand(-1, -1, whole.shape[-1]))

    def _coefficients(self, number: int) -> Tensor:
        with self._lock:
            if number not in self._known:
                self._known[number] = self.layout.encode(self.layout.checkpoint(self.zoo, number))
            return self._known[number]


class SpectralWriter(CheckpointWriter):
    """`CheckpointWriter` for coefficients: they become tokens block by block on their way to the file."""

    def __init__(self, path: Path | str, layout: SpectralLayout, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(path, layout.cut, metadata, exact=False)
        self.spectral = layout

    def write(self, first_token: int, rows: Tensor) -> None:
        """Write spectral tokens ``first_token …``, ``[n, k]``. Raises ValueError if they do not fit into ``[T, k]``."""
        layout = self.spectral
        if rows.shape[1:] != (layout.token_size,) or not 0 <= first_token <= layout.num_tokens - len(rows):
            what = f"rows from token {first_token} on have shape {list(rows.shape)}"
            raise ValueError(f"{what}, which does not fit the layout")
        for first, wide in layout.expand(rows.detach().cpu(), first_token, first_token + len(rows)):
            super().write(first, wide)


Layout = TokenLayout | SpectralLayout
Reader = TokenReader | SpectralReader
Writer = CheckpointWriter | SpectralWriter | CompressedWriter


def fit_layout(zoo: Zoo, options: TokenOptions, indices: Sequence[int] | None = None) -> Layout:
    """Measure a zoo; `TokenLayout.fit` or, with ``options.rank``, `SpectralLayout.fit`."""
    return (TokenLayout if options.rank is None else SpectralLayout).fit(zoo, options, indices)


def layout_without_statistics(checkpoint: Checkpoint, options: TokenOptions, num_checkpoints: int) -> Layout:
    """The sizes of the layout of a zoo of that many checkpoints like this one."""
    if options.rank is None:
        return TokenLayout.without_statistics(checkpoint, options)
    return SpectralLayout.without_statistics(checkpoint, options, num_checkpoints)


def load_layout(folder: Path | str) -> Layout:
    """Read a layout from a generator's folder. Raises InputError when a file is missing or damaged."""
    layout = TokenLayout.load(folder)
    return layout if layout.options.rank is None else SpectralLayout.load(folder)


def token_reader(zoo: Zoo, layout: Layout) -> Reader:
    """Random access to the zoo's tokens."""
    return SpectralReader(zoo, layout) if isinstance(layout, SpectralLayout) else TokenReader(zoo, layout)


def checkpoint_writer(path: Path | str, layout: Layout, metadata: Mapping[str, str] | None = None) -> Writer:
    """A file that tokens are streamed into."""

    def opened(file: Path | str) -> SpectralWriter | CheckpointWriter:
        kind = SpectralWriter if isinstance(layout, SpectralLayout) else CheckpointWriter
        return kind(file, layout, metadata)  # type: ignore[arg-type]

    return opened(path) if layout.compressed is None else CompressedWriter(path, layout.compressed, opened, metadata)


def with_sparsity(layout: Layout, sparsity: float | None) -> Layout:
    """The layout, that stores pruned weights of another share of zeros; None for the zoo's own.

    Raises InputError if nothing is pruned, or it is not a share.
    """
    if sparsity is None:
        return layout
    if layout.compressed is None or layout.compressed.zoo_sparsity is None:
        raise InputError("this generator's networks are not pruned; leave the sparsity out")
    compressed = layout.compressed.with_sparsity(sparsity)
    if isinstance(layout, SpectralLayout):
        cut = replace(layout.cut, compressed=compressed)
        return SpectralLayout(cut, layout.basis, layout.fitted, layout.indices)
    return replace(layout, compressed=compressed)


def cached_bytes(layout: Layout, num_checkpoints: int) -> int:
    """Bytes that a training run's reader keeps in memory."""
    if isinstance(layout, SpectralLayout):
        return 4 * num_checkpoints * layout.num_tokens * layout.token_size
    return TokenReader.cached_bytes(num_checkpoints, layout)
