"""A layout whose tokens are coefficients along the zoo's directions, ``[T, k]`` with reader and writer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.tensor_file import TensorFile, TensorSpec
from tokenization.compressed.form import Compressed
from tokenization.files import empty_huge
from tokenization.layout.canonical import Canonical
from tokenization.layout.description import LayerGroup
from tokenization.layout.layout import TokenLayout
from tokenization.layout.placement import Layer, TokenOptions
from tokenization.layout.rows import CheckpointWriter, values_of
from tokenization.spectral.fit import BASIS_DTYPES, DIRECTIONS, NUMBERS, Basis, FittedBasis, basis_specs, fit_basis
from tokenization.zoo.zoo import Zoo

BASIS_FILE = "basis.safetensors"


class SpectralLayout:
    """Cuts checkpoints as `TokenLayout` does and gives every token by its coefficients; the same interface.

    ``decode(encode(x))`` is ``x`` without what lies outside the directions: for a checkpoint of the zoo nothing once
    k reaches n - 1 and directions are kept in fp32, up to rounding. The arithmetic of values is float32 here.

    Args:
        cut: cuts and normalises, ``[L, D]``.
        basis: the directions of its tokens.
        fitted: where the zoo's checkpoints lie, as measured; only of a layout that `fit` made.
        indices: the entries of the zoo that were measured.
    """

    def __init__(
        self, cut: TokenLayout, basis: Basis, fitted: FittedBasis | None = None, indices: Sequence[int] = ()
    ) -> None:
        self.cut = cut
        self.basis = basis
        self.fitted = fitted
        self.indices = tuple(indices)

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
        num_spectral = cut.num_tokens if options.basis == "token" else 1
        specs = basis_specs(cut.num_tokens, num_spectral, rank, options.size, BASIS_DTYPES[options.basis_dtype])
        numbers = [torch.ones(specs[name][1], dtype=torch.float64) for name in NUMBERS]
        return cls(cut, Basis(_NoValues(), specs[DIRECTIONS][1], *numbers))  # type: ignore[arg-type]

    # What is the cut's is asked of the cut.

    @property
    def options(self) -> TokenOptions:
        """How the tokens are cut."""
        return self.cut.options

    @property
    def names(self) -> tuple[str, ...]:
        """Every key of the state dict, in order."""
        return self.cut.names

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The tokenised tensors, in order."""
        return self.cut.layers

    @property
    def num_values(self) -> int:
        """How many values of a checkpoint are in its tokens."""
        return self.cut.num_values

    @property
    def padding_share(self) -> float:
        """The part of ``L * D`` that holds nothing."""
        return self.cut.padding_share

    @property
    def ties(self) -> dict[str, str]:
        """``{alias: name}``."""
        return self.cut.ties

    @property
    def constant_specs(self) -> dict[str, TensorSpec]:
        """Dtypes and shapes of the tensors outside the tokens."""
        return self.cut.constant_specs

    @property
    def canonical(self) -> Canonical | None:
        """The form that LoRA pairs are brought into before they are cut, if any."""
        return self.cut.canonical

    @property
    def compressed(self) -> Compressed | None:
        """Pruned and quantised weights, if any."""
        return self.cut.compressed

    @property
    def copied(self) -> tuple[str, ...]:
        """Those of them that differ in the zoo, and of which every network has the base's."""
        return self.cut.copied

    @property
    def copied_note(self) -> str:
        """What a user must know of ``copied``."""
        return self.cut.copied_note

    @property
    def constants(self) -> dict[str, Tensor]:
        """The tensors outside the tokens, aliases included, as the base checkpoint has them."""
        return self.cut.constants

    def spec(self, name: str) -> TensorSpec:
        """Stored dtype and shape of a key of the state dict."""
        return self.cut.spec(name)

    def shares(self) -> list[tuple[str, float, float]]:
        """Of each layer (by its tokens' first values): name, part of the zoo's variance, part of that which is kept."""
        layers = self.cut.positions[:, 0]
        total, kept = (torch.zeros(len(self.layers), dtype=torch.float64) for _ in range(2))
        total.index_add_(0, layers, self.basis.total)
        kept.index_add_(0, layers, self.basis.kept)
        parts, shares = total / total.sum().clamp(min=1e-300), torch.where(total > 0, kept / total, 1.0)
        return list(zip((layer.name for layer in self.layers), parts.tolist(), shares.tolist(), strict=True))

    def checkpoint(self, zoo: Zoo, index: int) -> Checkpoint:
        """An entry of a zoo as it is cut into tokens."""
        return self.cut.checkpoint(zoo, index)

    def describe(self) -> list[LayerGroup]:
        """The layers by kind."""
        return self.cut.describe()

    # What a spectral token is.

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
        self._require_shape(tokens.shape)
        stored = {layer.name: empty_huge((layer.num_values,), layer.real_dtype) for layer in self.cut.layers}
        for first, rows in self.expand(tokens.detach().cpu(), 0, self.num_tokens):
            for name, place, values in values_of(self.cut, first, rows, exact=False):
                stored[name][place : place + len(values)] = values
        stored = {layer.name: layer.stored(stored[layer.name]) for layer in self.cut.layers}
        constants = {name: self.cut.constant(name).clone() for name in self.cut.constant_specs}
        return self.cut.finished(self.cut.with_aliases({**stored, **constants}))

    def decode_batch(self, tokens: Tensor, *, constants: bool = False) -> dict[str, Tensor]:
        """Coefficients ``[..., T, k]`` → the tokenised tensors ``[..., *shape]``; see `TokenLayout.decode_batch`."""
        self._require_shape(tokens.shape[-2:])
        blocks = [rows for _, rows in self.basis.expand(tokens, 0, self.cut.num_tokens)]
        return self.cut.decode_batch(torch.cat(blocks, -2), constants=constants)

    def expand(self, rows: Tensor, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Tokens of the cut from spectral tokens ``first`` to ``last``, ``[n, k]``: (the first, rows ``[m, D]``)."""
        span = (first, last) if self.basis.kind == "token" else (0, self.cut.num_tokens)
        for tokens, wide in self.basis.expand(rows, *span):
            yield tokens.start, wide

    def _require_shape(self, shape: Sequence[int]) -> None:
        if tuple(shape) != (self.num_tokens, self.token_size):
            raise ValueError(f"tokens of shape {list(shape)} must be [{self.num_tokens}, {self.token_size}]")

    def save(self, folder: Path | str) -> None:
        """Write the cut's files and ``basis.safetensors``. Raises InputError when the disk refuses."""
        specs = basis_specs(self.cut.num_tokens, self.num_tokens, self.token_size, self.options.size, self.basis_dtype)
        path = Path(folder) / BASIS_FILE
        numbers = dict(zip(NUMBERS, self.basis.numbers, strict=True))
        with TensorFile(path, specs) as file:
            for name, values in numbers.items():
                file.write(name, 0, values.contiguous())
            for tokens, directions in self.basis.blocks(0, self.cut.num_tokens):
                file.write(DIRECTIONS, tokens.start * directions[0].numel(), directions)
        self.cut.save(folder)

    @property
    def basis_dtype(self) -> torch.dtype:
        """In which the directions are stored."""
        return BASIS_DTYPES[self.options.basis_dtype]

    @classmethod
    def load(cls, folder: Path | str) -> SpectralLayout:
        """Read what ``save`` wrote; directions stay in the file until they are used. Raises as `TokenLayout.load`."""
        cut = TokenLayout.load(folder)
        source = Checkpoint.open(Path(folder) / BASIS_FILE)
        options = cut.options
        rank = source.info(DIRECTIONS).shape[1] if DIRECTIONS in source.tensors else 1
        num_spectral = cut.num_tokens if options.basis == "token" else 1
        specs = basis_specs(cut.num_tokens, num_spectral, rank, options.size, BASIS_DTYPES[options.basis_dtype])
        source.require(specs)
        return cls(cut, Basis.read(source, specs))


class _NoValues:
    """Directions that were not measured."""

    def flat(self, name: str) -> Tensor:
        """There are none."""
        raise ValueError("a layout without statistics has no directions; fit it")


class SpectralReader:
    """Reads coefficients of a zoo's checkpoints: those that the basis was found from are in memory.

    Other checkpoints are projected when they are first asked for, and kept. Thread-safe.

    Args:
        zoo: the checkpoints.
        layout: as ``SpectralLayout.fit`` made it for this zoo.
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


class SpectralWriter:
    """`CheckpointWriter` for coefficients: they become tokens block by block on their way to the file.

    Raises:
        InputError: the disk is full or refuses; nothing is left behind.
    """

    def __init__(self, path: Path | str, layout: SpectralLayout, metadata: Mapping[str, str] | None = None) -> None:
        self.layout = layout
        self._writer = CheckpointWriter(path, layout.cut, metadata, exact=False)

    def write(self, first_token: int, rows: Tensor) -> None:
        """Write spectral tokens ``first_token …``, ``[n, k]``. Raises ValueError if they do not fit into ``[T, k]``."""
        layout = self.layout
        if rows.shape[1:] != (layout.token_size,) or not 0 <= first_token <= layout.num_tokens - len(rows):
            raise ValueError(
                f"rows from token {first_token} on have shape {list(rows.shape)}, which does not fit the layout"
            )
        for first, wide in layout.expand(rows.detach().cpu(), first_token, first_token + len(rows)):
            self._writer.write(first, wide)

    def close(self) -> None:
        """Put the file in place. Raises ValueError when a token was never written."""
        self._writer.close()

    def abort(self) -> None:
        """Drop all that was written."""
        self._writer.abort()

    def __enter__(self) -> SpectralWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close() if error is None else self.abort()
