"""Where every value of a checkpoint lies among its tokens.

All tokens of a checkpoint are one flat buffer ``[L * D]``. A layer occupies it as a strided run ``(start, num_runs,
run_length, run_stride)``: run ``r`` holds the layer's values ``[r * run_length, (r + 1) * run_length)`` at buffer
positions ``start + r * run_stride …``. One run is RPG's within-layer tokens (arXiv 2501.11587, section 3.1); a run for
each output channel and runs that ignore token borders are the alternatives it compares.

Letters: L tokens of a checkpoint, D token width, N chosen tokens, K layers.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch

from tokenization.checkpoint.checkpoint import Checkpoint, TensorInfo, fits
from tokenization.errors import InputError

Normalization = Literal["residual", "layer", "none"]
Flatten = Literal["layer", "channel", "flat"]
CanonicalForm = Literal["svd", "aligned", "none"]

BLOCK_VALUES = 1 << 15
"""Values handled at a time: a block and its float64 copies stay in the processor's cache."""


@dataclass(frozen=True)
class TokenOptions:
    """The ``tokens`` section of a configuration: which tensors become tokens, and how.

    Attributes:
        size: token width D, in values.
        normalization: ``residual`` (deviation from the zoo's per-parameter mean, by the layer's RMS deviation),
            ``layer`` (the paper's: by mean and standard deviation of the layer), ``none``.
        include: glob patterns of the tensors that may become tokens.
        exclude: glob patterns of those that may not; every network has those of the base checkpoint.
        pack: let consecutive layers smaller than a token share one.
        flatten: ``layer`` (a token never crosses a layer), ``channel`` (nor an output channel), ``flat`` (crosses all).
        base: checkpoint that the tensors outside the tokens come from, a file of the zoo or a path; the zoo's first
            when null.
        lora_canonical: one form for the factors of each LoRA pair, its product unchanged: ``svd`` (balanced, by
            singular values), ``aligned`` (that rotated towards the zoo's mean), ``none`` (as they were trained).
        rank: of spectral tokens: how many of the zoo's directions a token is given by, in place of its values; ``auto``
            for as many as hold ``rank_share`` of the variance; null for tokens of values.
        rank_share: with ``rank: auto``, the part of the zoo's variance to keep.
        basis: ``token`` (every token has directions of its own) or ``network`` (one set for the whole network).
        basis_dtype: ``bf16`` or ``fp32``, in which the directions are kept.
        centre: what a token's coefficients are deviations from: the ``zoo``'s mean, or their regression on the
            ``condition``.
        pruned: glob patterns of tensors whose zeros are pruned weights; masks that are stored are found by themselves.

    Raises:
        ValueError: an impossible value.
    """

    # Read by pydantic when the options are embedded in a configuration tree.
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    size: int = 128
    normalization: Normalization = "residual"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    pack: bool = False
    flatten: Flatten = "layer"
    base: str | None = None
    lora_canonical: CanonicalForm = "aligned"
    rank: int | Literal["auto"] | None = None
    rank_share: float = 0.99
    basis: Literal["token", "network"] = "token"
    basis_dtype: Literal["bf16", "fp32"] = "bf16"
    centre: Literal["zoo", "condition"] = "zoo"
    pruned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size is {self.size!r}; give a whole number of values, 1 or more")
        for field, kind in (("normalization", Normalization), ("flatten", Flatten), ("lora_canonical", CanonicalForm)):
            if getattr(self, field) not in get_args(kind):
                raise ValueError(f"{field} is {getattr(self, field)!r}; choose one of {', '.join(get_args(kind))}")
        for field in ("include", "exclude", "pruned"):
            patterns = getattr(self, field)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"{field} is {patterns!r}; give a list of glob patterns")
            object.__setattr__(self, field, tuple(patterns))
        if not self.include:
            raise ValueError("include is empty; leave it out to include every tensor")
        if self.rank is not None:
            self._check_rank()
        if self.pack and self.flatten == "flat":
            raise ValueError("flatten 'flat' leaves nothing to pack; set pack to false")

    def _check_rank(self) -> None:
        if self.rank != "auto" and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank is {self.rank!r}; give a number of directions from 1 on, auto or null")
        if not 0 < self.rank_share <= 1:
            raise ValueError(f"rank_share is {self.rank_share!r}; give a part above 0 and up to 1")
        if self.normalization != "residual":
            raise ValueError(
                f"rank {self.rank!r} keeps directions of deviations from the zoo's mean, which normalization "
                f"{self.normalization!r} does not make; set normalization to residual"
            )

    @property
    def cut(self) -> dict[str, Any]:
        """What decides which values lie in which token, and the directions: JSON values."""
        unlike = ("rank", "rank_share", "centre", *(() if self.pruned else ("pruned",)))
        return {name: value for name, value in asdict(self).items() if name not in unlike}

    def written(self) -> dict[str, Any]:
        """As a layout's file says them: without what belongs to directions where there are none."""
        unsaid = {"pruned"} if not self.pruned else set()
        if self.rank is None:
            unsaid |= {"rank", "rank_share", "basis", "basis_dtype", *(("centre",) if self.centre == "zoo" else ())}
        return {name: value for name, value in asdict(self).items() if name not in unsaid}


@dataclass(frozen=True)
class Layer:
    """One tokenised tensor and its place in the flat token buffer; complex numbers are pairs of values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_runs: int
    run_length: int
    run_stride: int

    @property
    def num_values(self) -> int:
        """How many values the tensor holds."""
        return self.num_runs * self.run_length

    @property
    def real_dtype(self) -> torch.dtype:
        """That of its values: of a complex tensor that of its real and imaginary parts."""
        return self.dtype.to_real() if self.dtype.is_complex else self.dtype

    @property
    def real_shape(self) -> tuple[int, ...]:
        """The tensor's shape in values: a complex one's with 2 at its end."""
        return (*self.shape, 2) if self.dtype.is_complex else self.shape

    def stored(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``[..., num_values]`` in any shape as the tensor ``[..., *shape]``, complex where it is."""
        values = values.reshape((*values.shape[:-1], *self.real_shape))
        return torch.view_as_complex(values) if self.dtype.is_complex else values

    @property
    def end(self) -> int:
        """Buffer position after the layer's last value."""
        return self.start + (self.num_runs - 1) * self.run_stride + self.run_length

    def window(self, buffer: torch.Tensor) -> torch.Tensor:
        """The layer's values in a buffer ``[L * D]`` as a view ``[num_runs, run_length]``."""
        return buffer.as_strided(
            (self.num_runs, self.run_length), (self.run_stride, 1), buffer.storage_offset() + self.start
        )

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Cut ``[num_runs, run_length]`` into blocks of about ``BLOCK_VALUES`` values: (runs, places in the run)."""
        num_rows = max(1, BLOCK_VALUES // self.run_length)
        for row in range(0, self.num_runs, num_rows):
            for column in range(0, self.run_length, BLOCK_VALUES):
                yield slice(row, row + num_rows), slice(column, column + BLOCK_VALUES)


def place_layers(tensors: Sequence[TensorInfo], options: TokenOptions) -> tuple[tuple[Layer, ...], int]:
    """Give each tensor its strided run, in order. Returns the layers, and the number of tokens L they need."""
    size, layers, cursor = options.size, [], 0
    for tensor in tensors:
        num_values = tensor.num_values * (2 if tensor.dtype.is_complex else 1)
        num_runs = tensor.shape[0] if options.flatten == "channel" and len(tensor.shape) > 1 else 1
        run_length = num_values // num_runs
        run_stride = run_length if num_runs == 1 else math.ceil(run_length / size) * size
        room = -cursor % size
        shares = options.flatten == "flat" or (options.pack and num_runs == 1 and run_length <= room)
        start = cursor if shares else cursor + room
        layers.append(Layer(tensor.name, tensor.dtype, tuple(tensor.shape), start, num_runs, run_length, run_stride))
        cursor = layers[-1].end
    return tuple(layers), math.ceil(cursor / size)


def choose_layers(checkpoint: Checkpoint, options: TokenOptions) -> list[TensorInfo]:
    """The tensors that become tokens: those that can be learned and that the patterns let in, by any of their names.

    Raises InputError if a pattern fits no tensor, or nothing is left.
    """
    for field, patterns in (("include", options.include), ("exclude", options.exclude)):
        for pattern in patterns:
            if not any(fits(name, pattern, checkpoint.order) for name in checkpoint.order):
                near = difflib.get_close_matches(pattern, checkpoint.order, 1, 0.0)
                hint = f" (the nearest name is {near[0]!r})" if near else ""
                what = f"tokens.{field}: {pattern!r} fits no tensor of {checkpoint.path}{hint}"
                raise InputError(f"{what}; write glob patterns of tensor names")
    chosen = [
        info for info in checkpoint.tensors.values() if info.learned and not is_left_out(checkpoint, info.name, options)
    ]
    if not chosen:
        what = f"{checkpoint.path} has no float tensor to tokenise"
        raise InputError(f"{what}; check tokens.include and tokens.exclude")
    return chosen


def is_left_out(checkpoint: Checkpoint, name: str, options: TokenOptions) -> bool:
    """Whether the patterns keep a tensor out of the tokens, by any of its names."""
    names = [name, *(alias for alias, owner in checkpoint.ties.items() if owner == name)]
    known = checkpoint.tensors.keys() | checkpoint.ties.keys()

    def meant(patterns: Sequence[str]) -> bool:
        return any(fits(each, pattern, known) for each in names for pattern in patterns)

    return not meant(options.include) or meant(options.exclude)


def as_reals(values: torch.Tensor) -> torch.Tensor:
    """Flat values; complex numbers as their real and imaginary parts, one after the other. No copy is made."""
    return torch.view_as_real(values).view(-1) if values.is_complex() else values


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values in another dtype; what a float of 8 bits cannot hold becomes its largest, not NaN."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        values = values.clamp(-largest, largest)
    return values.to(dtype)


@dataclass(frozen=True)
class Pieces:
    """Contiguous stretches of single layers that tokens are made of; int64 arrays of one length.

    ``row`` is which of the asked tokens, ``layer`` the layer's index, ``source`` the first value, counted in the layer,
    ``target`` the first place in the token, ``length`` the number of values.
    """

    row: np.ndarray
    layer: np.ndarray
    source: np.ndarray
    target: np.ndarray
    length: np.ndarray

    def groups(self) -> list[tuple[int, int, int, np.ndarray, np.ndarray]]:
        """Pieces alike but for where they start: ``(layer, target, length, rows, sources)`` of each group."""
        order = np.lexsort((self.row, self.target, self.length, self.layer))
        layer, target, length = self.layer[order], self.target[order], self.length[order]
        changes = (np.diff(layer) != 0) | (np.diff(target) != 0) | (np.diff(length) != 0)
        starts = np.concatenate(([0], np.flatnonzero(changes) + 1, [len(order)])) if len(order) else np.zeros(1, int)
        row, source = self.row[order], self.source[order]
        return [
            (int(layer[a]), int(target[a]), int(length[a]), row[a:b], source[a:b])
            for a, b in itertools.pairwise(starts)
        ]

    def merged(self, size: int) -> Iterator[tuple[int, int, int, int]]:
        """``(layer, source, place, length)``, neighbours joined; ``place`` counts in the rows laid end to end."""
        place = self.row * size + self.target
        follows = (np.diff(self.layer) == 0) & (self.source[1:] == (self.source + self.length)[:-1])
        follows &= place[1:] == (place + self.length)[:-1]
        starts = np.flatnonzero(np.concatenate(([True], ~follows))) if len(place) else np.zeros(0, int)
        lengths = np.add.reduceat(self.length, starts) if len(starts) else starts
        for start, length in zip(starts, lengths, strict=True):
            yield int(self.layer[start]), int(self.source[start]), int(place[start]), int(length)


class RunTable:
    """Every run of every layer in buffer order, for questions about single tokens."""

    def __init__(self, layers: Sequence[Layer], size: int) -> None:
        self.size = size
        self.layer_start = np.array([layer.start for layer in layers], dtype=np.int64)
        counts = np.array([layer.num_runs for layer in layers], dtype=np.int64)
        length = np.array([layer.run_length for layer in layers], dtype=np.int64)
        stride = np.array([layer.run_stride for layer in layers], dtype=np.int64)
        self.layer = np.repeat(np.arange(len(layers)), counts)
        number = np.arange(len(self.layer)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.start = self.layer_start[self.layer] + number * stride[self.layer]
        self.end = self.start + length[self.layer]
        self.source = number * length[self.layer]

    def pieces(self, token_ids: np.ndarray) -> Pieces:
        """What the tokens ``token_ids`` (``[N]``, any order, repeats allowed) are made of, row by row."""
        begin = token_ids * self.size
        first = np.searchsorted(self.end, begin, "right")
        count = np.searchsorted(self.start, begin + self.size, "left") - first
        row = np.repeat(np.arange(len(token_ids)), count)
        run = np.arange(len(row)) - np.repeat(np.cumsum(count) - count - first, count)
        low = np.maximum(self.start[run], begin[row])
        high = np.minimum(self.end[run], begin[row] + self.size)
        return Pieces(row, self.layer[run], self.source[run] + low - self.start[run], low - begin[row], high - low)

    def num_values(self, token_ids: np.ndarray) -> np.ndarray:
        """How many values each token holds, ``[N]``. They are its first: padding is always at the end."""
        end = (token_ids + 1) * self.size
        last = np.searchsorted(self.start, end, "left") - 1
        return np.minimum(self.end[last], end) - token_ids * self.size

    def positions(self, token_ids: np.ndarray) -> np.ndarray:
        """(layer, token in the layer) of each token's first value, ``[N, 2]``; no two tokens have the same."""
        begin = token_ids * self.size
        layer = np.searchsorted(self.layer_start, begin, "right") - 1
        return np.stack([layer, token_ids - self.layer_start[layer] // self.size], axis=1)
