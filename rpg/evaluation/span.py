"""Where networks lie relative to a zoo's checkpoints, and stacked networks as flat vectors.

Values count in units of their layer's root mean square deviation from the zoo's mean. Everything asked of a network
follows from its deviation's square and its inner products with the checkpoints' deviations, computed one tensor at a
time, so that no more than the zoo's mean and one network is ever in memory. n checkpoints, N networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, StateDict

BLOCK = 1 << 16
"""Values of each checkpoint that are looked at together."""

GROUP_VALUES = 1 << 20
"""Values of networks that are placed together."""

TWINS = 1e-6
"""Distance of two copies of one network at most, in the checkpoints' distance from their mean: what rounding leaves."""


HELD_VALUES = 1 << 26
"""Values of all checkpoints together up to which they are held in memory."""


@dataclass(frozen=True)
class Projections:
    """Where networks lie, seen from the zoo's mean, in normalised values.

    Attributes:
        squares: squared length of each network's deviation, float64 ``[N]``.
        products: its inner product with each checkpoint's deviation, float64 ``[N, n]``.
    """

    squares: Tensor
    products: Tensor

    @classmethod
    def join(cls, parts: Sequence[Projections]) -> Projections:
        """All of them, one after the other."""
        squares, products = ([getattr(each, name) for each in parts] for name in ("squares", "products"))
        return cls(torch.cat(squares), torch.cat(products))


class ZooSpan:
    """The mean of a zoo, the layers' scales and the inner products of the checkpoints' deviations.

    One pass over the zoo; kept is one float32 number a value, and small zoos are kept whole.

    Args:
        checkpoints: the zoo, at least one, read from their memory maps.
        names: floating-point tensors that count; all that averages are of use of when None.
        runs: which training run each checkpoint is of; all of one when None.
        by: what tensors are divided by: their root mean square ``deviation`` from the zoo's mean, or the ``spread`` of
            their values, by which hidden units are matched.

    Attributes:
        means: mean of each tensor, flat.
        scales: what each tensor that varies is divided by.
        spreads: standard deviation of all values of each tensor that varies.
        gram: inner products of the deviations, float64 ``[n, n]``.
        members: the checkpoints of each run.
        held: the values of each tensor in all checkpoints, float32 ``[n, values]``; empty of a large zoo.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        names: Sequence[str] | None = None,
        runs: Sequence[int] | None = None,
        by: Literal["deviation", "spread"] = "deviation",
    ) -> None:
        self.checkpoints = list(checkpoints)
        if names is None:
            names = [name for name, info in self.checkpoints[0].tensors.items() if info.averaged]
        self.members: dict[int, list[int]] = {}
        for place, run in enumerate(runs or [0] * len(self.checkpoints)):
            self.members.setdefault(run, []).append(place)
        self.held: dict[str, Tensor] = {}
        size = sum(self.checkpoints[0].flat(name).numel() for name in names)
        if size * len(self.checkpoints) <= HELD_VALUES:
            self.held = {name: torch.cat([values for _, values in self._read(name)], 1) for name in names}
        self.means: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}
        self.spreads: dict[str, float] = {}
        count = len(self.checkpoints)
        self.gram = torch.zeros(count, count, dtype=torch.float64)
        for name in names:
            mean = torch.empty(self.checkpoints[0].flat(name).numel())
            gram = torch.zeros_like(self.gram)
            centre = float(self.checkpoints[0].flat(name)[0])  # near the values: their squares must not cancel
            total = squares = 0.0
            for block, values in self.blocks(name):
                mean[block] = values.mean(0, dtype=torch.float64).float()
                deviations = values - mean[block]
                gram += _products(deviations, deviations)
                total += (values - centre).sum(dtype=torch.float64).item()
                squares += (values - centre).double().square().sum().item()
            square = gram.trace().item() / (count * len(mean))
            self.means[name] = mean
            if square > 0:
                number = count * len(mean)
                self.spreads[name] = max(squares / number - (total / number) ** 2, square) ** 0.5
                self.scales[name] = square**0.5 if by == "deviation" else self.spreads[name]
                self.gram += gram / self.scales[name] ** 2

    @property
    def num_values(self) -> int:
        """Values of a network."""
        return sum(map(len, self.means.values()))

    def vector(self, network: StateDict) -> Tensor:
        """A network's normalised deviation from the mean, ``[values]``."""
        return torch.cat([(network[n].detach().flatten().float() - self.means[n]) / s for n, s in self.scales.items()])

    def vectors(self) -> Tensor:
        """Those of the checkpoints of a small zoo, ``[n, values]``."""
        return torch.cat([(self.held[n] - self.means[n]) / s for n, s in self.scales.items()], 1)

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Stretches of a tensor in all checkpoints, float32 ``[n, values]``, and where they lie in it."""
        if name in self.held:
            yield slice(0, self.held[name].shape[1]), self.held[name]
        else:
            yield from self._read(name)

    def _read(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        flats = [checkpoint.flat(name) for checkpoint in self.checkpoints]
        for first in range(0, flats[0].numel(), BLOCK):
            block = slice(first, first + BLOCK)
            yield block, torch.stack([flat[block].float() for flat in flats])
            for checkpoint in self.checkpoints:
                checkpoint.release(name, first, first + BLOCK)

    def project(self, networks: Iterable[StateDict]) -> Projections:
        """Where networks lie; they are taken one at a time where they are large, small ones in groups."""
        size = max(1, GROUP_VALUES // max(1, self.num_values))
        remaining = iter(networks)
        found = [self._project([])]
        while group := list(itertools.islice(remaining, size)):
            found.append(self._project(group))
            group.clear()  # the next one may need their memory
        return Projections.join(found)

    def _project(self, networks: Sequence[StateDict]) -> Projections:
        squares = torch.zeros(len(networks), dtype=torch.float64)
        products = torch.zeros(len(networks), len(self.checkpoints), dtype=torch.float64)
        for name, scale in self.scales.items() if networks else ():
            flats = [network[name].detach().flatten() for network in networks]
            for block, values in self.blocks(name):
                mean = self.means[name][block]
                deviations = torch.stack([flat[block].float() for flat in flats]) - mean
                squares += deviations.double().square().sum(1) / scale**2
                products += _products(deviations, values - mean) / scale**2
        return Projections(squares, products)

    def project_combinations(self, weights: Tensor) -> Projections:
        """Where the networks mean + Σ weights · deviations lie, float64 ``[N, n]``: exact, and no value is read."""
        products = weights @ self.gram
        return Projections((products * weights).sum(1), products)

    def distances(self, projections: Projections) -> Tensor:
        """Distance of each network to each checkpoint, float64 ``[N, n]``."""
        squares = projections.squares[:, None] + self.gram.diagonal() - 2 * projections.products
        return squares.clamp(min=0).sqrt()

    def distance(self, network: StateDict, checkpoint: Checkpoint) -> float:
        """Distance of a network to any checkpoint, which need not be one of the zoo's."""
        square = 0.0
        for name, scale in self.scales.items():
            own, other = network[name].detach().flatten(), checkpoint.flat(name)
            for first in range(0, len(own), BLOCK):
                block = slice(first, first + BLOCK)
                square += (own[block].float() - other[block].float()).double().square().sum().item() / scale**2
                checkpoint.release(name, first, first + BLOCK)
        return square**0.5

    def principal_axes(self) -> tuple[Tensor, float]:
        """The zoo's first two principal components, and the share of its variance that they hold; 0 without any.

        Returns:
            float64 ``[n, 2]``: the products of a network's place times these are its coordinates, in units of the
            zoo's spread in each component (a second one that a zoo of two lacks is 0), and the share.
        """
        count = len(self.checkpoints)
        values, vectors = torch.linalg.eigh(self.gram)
        values = values.clamp(min=0).flip(0)
        if count < 2 or not values.sum() > 0:
            return torch.zeros(count, 2, dtype=torch.float64), 0.0
        # a component's length over the networks is sqrt(value), its spread sqrt(value / (n - 1))
        held = values[:2] > 1e-12 * values[0]
        scaled = vectors.flip(1)[:, :2] / values[:2].where(held, 1.0) * (count - 1) ** 0.5 * held
        return scaled, (values[:2].sum() / values.sum()).item()

    def unit(self) -> float:
        """Median distance of a checkpoint to its nearest neighbour that is another network; 0 where there is none."""
        among = self.distances(Projections(self.gram.diagonal(), self.gram)).fill_diagonal_(float("inf"))
        among[among <= TWINS * self.mean_square**0.5] = float("inf")
        near = among.amin(1)
        return near[near.isfinite()].median().item() if bool(near.isfinite().any()) else 0.0

    @property
    def mean_square(self) -> float:
        """Mean squared length of the checkpoints' deviations."""
        return self.gram.trace().item() / len(self.checkpoints)


def measure_span(
    zoo: ZooSpan, projections: Projections, asked: Sequence[int], accuracy: float | None = None
) -> dict[str, float | None] | None:
    """How near networks are to the checkpoints that they were asked to be, and whether they spread as much.

    Args:
        asked: the place in the zoo of the checkpoint that each was asked to be.

    Returns:
        ``cosine`` of a deviation from the zoo's mean with the asked checkpoint's, mean; ``spread``, the mean squared
        deviation, generated over asked; ``accuracy`` as it was given; ``num`` networks that were measured. None where
        the zoo has no spread, nothing was asked, or a network has values that are not finite.
    """
    if not len(asked) or not zoo.mean_square > 0:
        return None
    rows = torch.arange(len(asked))
    squares = zoo.gram.diagonal()[list(asked)]
    lengths = (projections.squares * squares).sqrt()
    cosines = projections.products[rows, list(asked)] / lengths.clamp(min=1e-300)  # the mean itself points nowhere: 0
    cosine, spread = cosines.mean().item(), (projections.squares.sum() / squares.sum()).item()
    if not (math.isfinite(cosine) and math.isfinite(spread)):  # JSON has no NaN
        return None
    return {"cosine": cosine, "spread": spread, "accuracy": accuracy, "num": len(asked)}


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of rows, ``[A, values]``, ``[B, values]`` → float64 ``[A, B]``."""
    return first.double() @ second.double().T


class FlatSpace:
    """Stacked weights of T networks as vectors ``[T, P]`` and back.

    Args:
        like: tensors ``[T, *shape]`` by name, for any T.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.shapes = {name: value.shape[1:] for name, value in like.items()}
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, weights: Mapping[str, Tensor]) -> Tensor:
        """``[T, P]``."""
        return torch.cat([weights[name].flatten(1) for name in self.shapes], 1)

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Stacked weights that share the vectors' memory."""
        parts = vectors.split([shape.numel() for shape in self.shapes.values()], 1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
