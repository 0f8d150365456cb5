"""The directions of a zoo, and the way from coefficients to tokens and back.

A zoo of n checkpoints spans at most n - 1 directions in every token, whatever the token's width. Along the k leading
ones a network of hundreds of millions of values is ``[L, k]`` numbers, and a small generator can learn it.
With the rows ``X`` ``[n, D]`` of one token (or of all together), ``X Xᵀ = V Λ Vᵀ`` gives the directions ``Λ^-½ Vᵀ X``
and the checkpoints' coefficients ``V Λ^½`` (principal components by the method of snapshots, Sirovich 1987). D × D
never appears.

Letters: n checkpoints, L tokens of the cut, D token width, k directions, T spectral tokens (L, or 1 where one set of
directions serves the whole network).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.progress import steps
from tokenization.checkpoint.safetensors import TensorSpec
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout
from tokenization.layout.normalization import TensorSource
from tokenization.layout.placement import TokenOptions
from tokenization.layout.rows import read_rows
from tokenization.zoo.cache import cached_tensors
from tokenization.zoo.zoo import Zoo

DIRECTIONS = "basis.directions"
NUMBERS = ("basis.scale", "basis.variance", "basis.kept", "basis.total")

BLOCK_VALUES = 1 << 22
"""Values of directions that are widened to float32 at a time: few enough to stay in the processor's cache."""


BASIS_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def basis_specs(num_tokens: int, rank: int, options: TokenOptions) -> dict[str, TensorSpec]:
    """Dtypes and shapes of the tensors of a basis of ``rank`` directions on disk."""
    num_spectral = num_tokens if options.basis == "token" else 1
    shapes = ((num_spectral,), (num_spectral, rank), (num_tokens,), (num_tokens,))
    numbers = {name: (torch.float64, shape) for name, shape in zip(NUMBERS, shapes, strict=True)}
    return {DIRECTIONS: (BASIS_DTYPES[options.basis_dtype], (num_tokens, rank, options.size)), **numbers}


@dataclass(frozen=True)
class Basis:
    """k directions for every token.

    Attributes:
        directions: ``[L, k, D]`` under the name `DIRECTIONS`, orthonormal in each spectral token, from a memory map.
        shape: (L, k, D).
        scale: ``[T]`` float64, the root mean square of a token's coefficients over the zoo, by which they are divided.
        variance: ``[T, k]`` float64, along each direction, descending; 0 where the zoo has no further direction.
        kept: ``[L]`` float64, each token's mean squared deviation along the directions.
        total: ``[L]`` float64, each token's mean squared deviation in all directions, kept or not.
    """

    directions: TensorSource
    shape: tuple[int, int, int]
    scale: Tensor
    variance: Tensor
    kept: Tensor
    total: Tensor

    @classmethod
    def read(cls, source: Checkpoint, specs: Mapping[str, TensorSpec]) -> Basis:
        """From a file that has the tensors of `basis_specs`."""
        num_tokens, rank, size = specs[DIRECTIONS][1]
        numbers = (source.flat(name).clone().view(specs[name][1]) for name in NUMBERS)
        return cls(source, (num_tokens, rank, size), *numbers)

    @property
    def kind(self) -> Literal["token", "network"]:
        """``token``: each token has directions of its own; ``network``: one set, whose parts the tokens hold."""
        return "token" if len(self.scale) == self.shape[0] else "network"

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is stored under `NUMBERS`."""
        return self.scale, self.variance, self.kept, self.total

    @property
    def share(self) -> float:
        """The part of the zoo's variance that the directions hold."""
        total = float(self.total.sum())
        return float(self.kept.sum()) / total if total else 1.0

    @cached_property
    def alive(self) -> Tensor:
        """``[T, k]`` bool: where there is a direction."""
        return self.variance > 0

    def blocks(self, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        """Tokens ``first`` to ``last`` in blocks: (which, their directions ``[m, k, D]`` as stored)."""
        _, rank, size = self.shape
        flat = self.directions.flat(DIRECTIONS)
        step = max(1, BLOCK_VALUES // (rank * size))
        for start in range(first, last, step):
            tokens = slice(start, min(start + step, last))
            span = slice(tokens.start * rank * size, tokens.stop * rank * size)
            yield tokens, flat[span].view(-1, rank, size)
            if isinstance(self.directions, Checkpoint):
                self.directions.release(DIRECTIONS, span.start, span.stop)

    def expand(self, coefficients: Tensor, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        """Tokens ``first`` to ``last`` from their coefficients ``[..., m, k]``, or from a network's ``[..., 1, k]``.

        Yields, in blocks, which tokens, and their rows ``[..., m', D]`` float32, on the same device. Differentiable.
        """
        scale = self.scale.to(coefficients.device, torch.float32)
        scaled = coefficients.float() * (scale[first:last, None] if self.kind == "token" else scale)
        batch = scaled.flatten(0, -3) if scaled.dim() > 2 else scaled[None]  # [B, m or 1, k]
        for tokens, directions in self.blocks(first, last):
            wide = directions.to(scaled.device, torch.float32)  # [m', k, D]
            own = batch[:, tokens.start - first : tokens.stop - first] if self.kind == "token" else batch
            rows = torch.bmm(own.expand(-1, len(wide), -1).transpose(0, 1), wide).transpose(0, 1)  # [B, m', D]
            yield tokens, rows.reshape(*scaled.shape[:-2], len(wide), -1)

    def project(self, rows: Tensor) -> Tensor:
        """Coefficients ``[T, k]`` float32 of tokens ``[L, D]``: what is orthogonal to all directions is lost."""
        parts = []
        for tokens, directions in self.blocks(0, self.shape[0]):
            parts.append(torch.bmm(directions.float(), rows[tokens].float()[..., None])[..., 0])  # [m, k]
        coefficients = torch.cat(parts)
        if self.kind == "network":
            coefficients = coefficients.sum(0, keepdim=True)
        return coefficients / self.scale.float()[:, None]


VERSION = 1
COEFFICIENTS, GRAM, SPECTRUM = "zoo.coefficients", "zoo.gram", "zoo.spectrum"

BLOCK_BYTES = 128 << 20
"""Memory of the rows of all checkpoints that are looked at together, in float64."""

SMALLEST = 1e-13
"""A direction whose variance is a smaller part of its token's is rounding."""


@dataclass(frozen=True)
class FittedBasis:
    """A basis and where the zoo lies in it.

    Attributes:
        coefficients: ``[n, T, k]`` float32, of the checkpoints that were measured, of root mean square 1 in each token.
        gram: ``[n, n]`` float64, the inner products of whole checkpoints' deviations.
    """

    basis: Basis
    coefficients: Tensor
    gram: Tensor


def fit_basis(layout: TokenLayout, zoo: Zoo, indices: Sequence[int], options: TokenOptions) -> FittedBasis:
    """The leading directions of a zoo, from its cache or found now. Raises InputError for a single checkpoint."""
    if len(indices) < 2:
        raise InputError(f"{zoo.path} has one checkpoint, which varies in no direction; tokens.rank needs two or more")
    subject = [VERSION, zoo.digest(), list(indices), options.cut]
    vectors, rank = None, options.rank
    most = len(indices) - 1 if options.basis == "network" else min(len(indices) - 1, options.size)
    if options.basis == "network" or rank == "auto":
        spectrum = _spectrum(layout, zoo, indices, subject)
        rank = min(_enough(spectrum[SPECTRUM], options.rank_share) if rank == "auto" else int(rank or 1), most)
        vectors = _leading(spectrum[GRAM], rank) if options.basis == "network" else None
    rank = min(int(rank or 1), most)
    specs = basis_specs(layout.num_tokens, rank, options)
    dtype, num_spectral = specs[DIRECTIONS][0], specs["basis.scale"][1][0]
    more = {
        COEFFICIENTS: (torch.float32, (len(indices), num_spectral, rank)),
        GRAM: (torch.float64, (len(indices), len(indices))),
    }

    def write(file: TensorFile) -> None:
        found = _Found(num_spectral, rank, len(indices), layout.num_tokens)
        for tokens, rows in _row_blocks(layout, zoo, indices):
            directions = found.add(tokens, rows, vectors)  # [m, k, D]
            file.write(DIRECTIONS, tokens.start * rank * options.size, directions.to(dtype))
        if vectors is not None:
            found.keep(slice(0, 1), *(each[None] for each in vectors))
        for name, values in found.tensors().items():
            file.write(name, 0, values.contiguous())

    source = cached_tensors(zoo, "basis", [*subject, rank], {**specs, **more}, write)
    coefficients, gram = (source.flat(name).clone().view(more[name][1]) for name in (COEFFICIENTS, GRAM))
    return FittedBasis(Basis.read(source, specs), coefficients, gram)


def fitting_bytes(num: int, shape: tuple[int, int, int]) -> int:
    """About the most memory that `fit_basis` takes of a zoo of ``num`` checkpoints; ``shape`` is (L, k, D)."""
    num_tokens, rank, size = shape
    block = min(num_tokens, _tokens_a_block(num, size))
    rows, directions = num * block * size, rank * block * size
    # The last block's rows are still there while the next ones are read.
    return (4 + 8 * (1 if block == num_tokens else 2)) * rows + (8 + 2) * directions


class _Found:
    """What the pass over the zoo leaves besides the directions."""

    def __init__(self, num_spectral: int, rank: int, num: int, num_tokens: int) -> None:
        self.rank, self.num = rank, num
        self.scale = torch.ones(num_spectral, dtype=torch.float64)
        self.variance = torch.zeros(num_spectral, rank, dtype=torch.float64)
        self.kept, self.total = (torch.zeros(num_tokens, dtype=torch.float64) for _ in range(2))
        self.coefficients = torch.zeros(num, num_spectral, rank)
        self.gram = torch.zeros(num, num, dtype=torch.float64)

    def add(self, tokens: slice, rows: Tensor, network: tuple[Tensor, Tensor] | None) -> Tensor:
        """Directions ``[m, k, D]`` of rows ``[m, n, D]``; of the network's, given (vectors, values), their part."""
        gram = rows @ rows.transpose(1, 2)  # [m, n, n]
        self.gram += gram.sum(0)
        self.total[tokens] = gram.diagonal(dim1=1, dim2=2).sum(1) / self.num
        vectors, values = network if network is not None else _leading(gram, self.rank)  # [(m,) n, k], [(m,) k]
        if network is None:
            self.keep(tokens, vectors, values)
        weights = vectors.mT * values.clamp(min=1e-300).rsqrt()[..., None] * (values > 0)[..., None]
        directions = weights @ rows
        self.kept[tokens] = (directions.square().sum(2) * values).sum(-1) / self.num
        return directions

    def keep(self, tokens: slice, vectors: Tensor, values: Tensor) -> None:
        """Take scale, variance and coefficients of spectral tokens from eigenvectors ``[m, n, k]`` and values."""
        alive = (values > 0).sum(1).clamp(min=1)  # [m]
        scale = (values.sum(1) / (alive * self.num)).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        self.scale[tokens], self.variance[tokens] = scale, values / self.num
        coefficients = vectors * values.sqrt()[:, None] / scale[:, None, None]  # [m, n, k]
        self.coefficients[:, tokens] = coefficients.transpose(0, 1).float()

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by its name in the file."""
        numbers = dict(zip(NUMBERS, (self.scale, self.variance, self.kept, self.total), strict=True))
        return {**numbers, COEFFICIENTS: self.coefficients, GRAM: self.gram}


def _row_blocks(layout: TokenLayout, zoo: Zoo, indices: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of tokens with all checkpoints' rows, ``[m, n, D]`` float64."""
    step = _tokens_a_block(len(indices), layout.token_size)
    for first in steps("finding directions", range(0, layout.num_tokens, step)):
        tokens = slice(first, min(first + step, layout.num_tokens))
        rows = read_rows(layout, zoo, indices, range(tokens.start, tokens.stop))  # [n, m, D]
        yield tokens, rows.transpose(0, 1).to(torch.float64)


def _tokens_a_block(num: int, size: int) -> int:
    return max(1, BLOCK_BYTES // (8 * num * size))


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` leading eigenvectors ``[..., n, k]`` and eigenvalues ``[..., k]``, descending, of ``[..., n, n]``.

    A value that is rounding is 0. A vector's sign makes its largest entry positive, so that neighbouring tokens, in
    which the same checkpoints stand out, get coefficients of the same signs.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(-1)[..., :rank], vectors.flip(-1)[..., :rank]
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    values = torch.where(values > SMALLEST * total, values, 0.0)
    largest = vectors.abs().argmax(-2, keepdim=True)
    return vectors * vectors.gather(-2, largest).sign(), values


def _spectrum(layout: TokenLayout, zoo: Zoo, indices: Sequence[int], subject: list) -> dict[str, Tensor]:
    """The variance along each direction, summed over tokens, ``[n]`` descending; and the Gram matrix ``[n, n]``."""
    num = len(indices)
    specs = {SPECTRUM: (torch.float64, (num,)), GRAM: (torch.float64, (num, num))}

    def write(file: TensorFile) -> None:
        gram = torch.zeros(num, num, dtype=torch.float64)
        values = torch.zeros(num, dtype=torch.float64)
        for _, rows in _row_blocks(layout, zoo, indices):
            each = rows @ rows.transpose(1, 2)
            gram += each.sum(0)
            if layout.options.basis == "token":
                values += torch.linalg.eigvalsh(each).clamp(min=0).sum(0).flip(0)
        if layout.options.basis == "network":
            values = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)
        file.write(SPECTRUM, 0, values)
        file.write(GRAM, 0, gram)

    source = cached_tensors(zoo, "spectrum", subject, specs, write)
    return {name: source.flat(name).clone().view(shape) for name, (_, shape) in specs.items()}


def _enough(spectrum: Tensor, share: float) -> int:
    """The smallest number of directions that hold ``share`` of the variance."""
    kept = spectrum.cumsum(0) / spectrum.sum().clamp(min=1e-300)
    return int((kept < share).sum()) + 1
