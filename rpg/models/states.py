"""Permutation states: which training run, or which checkpoint, weights came from, and how new ones are drawn.

A state is a learned embedding, or a code: measured (`rpg.models.centre`), or what the checkpoint's task is. New ones
come from a density of the zoo's in closed form, or from the prior over codes.

Letters: n checkpoints, G of a batch, B codes, S values of a state, m of a code, r directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rpg.models.code_prior import CodePrior
from rpg.models.conditioning import StateConfig
from rpg.models.kernel_regression import FittedBuffers
from rpg.seeding import derive_seed, in_turns, make_rng
from tokenization.errors import InputError

SMALLEST_SPREAD = 1e-5
"""Where tasks differ by no more than this, it is rounding error, not to be scaled up to unit size."""


class CodeTable(FittedBuffers):
    """The codes of the training checkpoints: a table of permutation states that is measured, not learned.

    Their size m is cut to n - 1. New ones are drawn in neighbourhoods of so many ``neighbours`` of a class, if any.
    """

    weight: Tensor
    classes: Tensor | None
    spread: Tensor | None

    def __init__(self, num_states: int, size: int, neighbours: int | None = None) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.register_buffer("weight", torch.zeros(num_states, max(1, min(size, num_states - 1))))
        # Of whom codes are, and how far the zoo reaches along each direction: what neighbourhoods are told by.
        self.register_buffer("classes", torch.zeros(num_states, dtype=torch.long) if neighbours else None)
        self.register_buffer("spread", torch.ones(self.weight.shape[1]) if neighbours else None)

    @property
    def num_embeddings(self) -> int:
        """n."""
        return len(self.weight)

    @property
    def embedding_dim(self) -> int:
        """m."""
        return self.weight.shape[1]

    def forward(self, states: Tensor) -> Tensor:
        """Codes ``[G, m]`` of states ``[G]``."""
        return self.weight[states]

    def among_neighbours(self, classes: Tensor, numbers: Tensor, temperature: float) -> Tensor:
        """New codes ``[G, m]`` of classes ``[G]``, from standard normal numbers ``[G, 1 + neighbours]``."""
        assert self.classes is not None and self.spread is not None and self.neighbours is not None
        density = Neighbourhoods(self.weight * self.spread, self.classes, self.neighbours)
        return density.draw(classes, torch.special.ndtr(numbers[:, 0]), temperature * numbers[:, 1:]) / self.spread


class TaskTable(CodeTable):
    """Codes that are what the zoo says of each checkpoint's task, m numbers, standardised: new tasks have them, too."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_states: int, size: int) -> None:
        super().__init__(num_states, size)
        self.fill(weight=torch.zeros(num_states, size))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def measure(self, tasks: Tensor) -> None:
        """Take the checkpoints' tasks ``[n, m]`` as codes."""
        self.fill(mean=tasks.mean(0), std=tasks.std(0).clamp(min=SMALLEST_SPREAD))
        self.fill(weight=self.codes(tasks))

    def codes(self, tasks: Tensor) -> Tensor:
        """Codes ``[B, m]`` of tasks ``[B, m]``."""
        return (tasks - self.mean) / self.std


def permutation_state(config: StateConfig, num_states: int, width: int) -> tuple[nn.Embedding | CodeTable, nn.Module]:
    """The table of states, and what maps them to the width of the backbone."""
    if config.of in ("code", "task"):
        size, near = config.width or width, config.neighbours
        codes = TaskTable(num_states, size) if config.of == "task" else CodeTable(num_states, size, near)
        first = nn.Linear(codes.embedding_dim, width)
        return codes, first if config.linear else nn.Sequential(first, nn.SiLU(), nn.Linear(width, width))
    table = nn.Embedding(num_states, config.width or width)
    if config.initial == "constant":
        nn.init.constant_(table.weight, 1 / table.embedding_dim)
    return table, nn.Linear(config.width, width) if config.width else nn.Identity()


def stored_states(seed: int, networks: Sequence[int], num_states: int) -> list[int]:
    """Which of the stored permutation states each network of a seed is made of, whatever else is asked for.

    They come in turns: where states are of checkpoints, independent draws would name some several times, and a zoo's
    spread rests on its few outermost.
    """
    return in_turns(networks, num_states, seed, "states")


@dataclass(frozen=True)
class NewStates:
    """Draws the states of generated networks, each from (seed, number of the network) alone.

    Attributes:
        table: the zoo's states.
        density: of the table, fitted when it is first asked for.
    """

    config: StateConfig
    table: Any
    prior: CodePrior | None

    @cached_property
    def density(self) -> CodeDensity:
        """Of the table of states."""
        return CodeDensity.fit(self.table.weight.detach(), whitened=type(self.table) is CodeTable)

    def draw(
        self, how: str, seed: int, networks: Sequence[int], temperature: float, conditions: Tensor | None = None
    ) -> Tensor:
        """States ``[G, S]``: of the table, of a density fitted to it, or of the prior; one row if all share it.

        Args:
            how: a value of ``generate.state``.
            conditions: ``[G, C]`` of the networks, for the prior and for neighbourhoods.

        Raises:
            InputError: there is no prior.
        """
        table = self.table.weight.detach()
        if len(table) == 1:
            return table
        if how == "stored":
            return table[torch.tensor(stored_states(seed, networks, len(table)), device=table.device)]
        rngs = [make_rng(seed, "state", network) for network in networks]
        if how == "prior":
            if self.prior is None:
                raise InputError("This generator has no prior over codes; ask for states stored, density or gaussian.")
            if self.prior.config.draws == "even":
                noise = even_noise(derive_seed(seed, "state"), networks, table.shape[1])
            else:
                noise = torch.stack([torch.randn(table.shape[1], generator=rng) for rng in rngs])
            begun = None
            if self.prior.config.start is not None:
                begun = self._among_neighbours(rngs, temperature, conditions)
            return self.prior.sample(temperature * noise.to(table.device), conditions, rngs=rngs, begun=begun)
        if how == "density" and self.config.neighbours:
            return self._among_neighbours(rngs, temperature, conditions)
        if how == "density":
            size = 1 + len(self.density.directions)
            numbers = even_noise(derive_seed(seed, "state"), networks, size).to(table.device)
            return self.density.draw(torch.special.ndtr(numbers[:, 0]), numbers[:, 1:], temperature)
        centred = table - table.mean(0)  # [n, S]
        # A combination of the table's own deviations with weights N(0, 1/n) has exactly their covariance.
        weights = torch.stack([torch.randn(len(table), generator=rng) for rng in rngs]).to(table.device)
        return table.mean(0) + temperature * (weights @ centred) / len(table) ** 0.5

    def _among_neighbours(self, rngs: Sequence[torch.Generator], temperature: float, conditions: Any) -> Tensor:
        """Codes ``[G, S]`` of the classes asked for, each from numbers of its own one of G ``rngs``."""
        numbers = torch.stack([torch.randn(1 + self.table.neighbours, generator=rng) for rng in rngs])
        return self.table.among_neighbours(conditions[:, 0].round().long(), numbers.to(conditions.device), temperature)


def even_noise(seed: int, networks: Sequence[int], size: int) -> Tensor:
    """Standard normal noise ``[len(networks), size]``: of network i the i-th point of the seed's Sobol sequence.

    Any 2ᵏ networks in a row from a multiple of 2ᵏ are as evenly spread as the sequence's first 2ᵏ.
    """
    first = min(networks)
    engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed % 2**31).fast_forward(first)
    points = engine.draw(max(networks) - first + 1, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    return torch.special.ndtri(points)[[each - first for each in networks]].float()


BANDWIDTHS = tuple(0.02 * 1.6**place for place in range(9))
"""Of a kernel, in the codes' standard deviation; shrunk kernels need less than 1."""
MOST_LEADING, MOST_COMPARED = 64, 500
"""Directions that may have kernels, and checkpoints by which the choice is made, all pairs of them."""


@dataclass(frozen=True)
class CodeDensity:
    """A density over codes.

    Attributes:
        centres: ``[n, m]`` codes, of zero mean and unit variance in every direction.
        directions: ``[m, S]``, by which a code becomes a state.
        mean: ``[S]``, the states' mean.
        leading: r, how many directions have kernels.
    """

    centres: Tensor
    directions: Tensor
    mean: Tensor
    leading: int
    bandwidth: float

    @classmethod
    def fit(cls, table: Tensor, *, whitened: bool) -> CodeDensity:
        """Fit to the states ``[n, S]`` of n ≥ 2 checkpoints.

        If ``whitened`` they are codes already, the direction of the largest variance first.
        """
        mean = table.mean(0)
        centres, directions = table - mean, torch.eye(table.shape[1], device=table.device)
        if not whitened:
            left, lengths, right = torch.linalg.svd(centres, full_matrices=False)
            kept = int((lengths > 1e-5 * lengths[0]).sum())
            centres = left[:, :kept] * len(table) ** 0.5
            directions = lengths[:kept, None] / len(table) ** 0.5 * right[:kept]
        compared = centres[:MOST_COMPARED].double()
        rest = -compared.square().mean(0).flip(0).cumsum(0).flip(0) / 2  # of the directions from each on
        rest = torch.cat([rest, rest.new_zeros(1)])
        best = rest[0].item(), 0, 1.0
        products = compared.new_zeros(len(compared), len(compared))
        for leading in range(1, min(len(rest) - 1, MOST_LEADING) + 1):
            products.addr_(compared[:, leading - 1], compared[:, leading - 1])
            for bandwidth in BANDWIDTHS:
                score = left_out_likelihood(products, leading, bandwidth) + rest[leading].item()
                best = max(best, (score, leading, bandwidth))
        return cls(centres, directions, mean, best[1], best[2])

    def draw(self, places: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """States ``[B, S]`` from standard normal noise ``[B, m]``.

        ``places`` ``[B]`` in 0 … 1 say which checkpoint each is drawn around, these sorted by their first direction.
        """
        num, r = len(self.centres), self.leading
        order = self.centres[:, 0].argsort()
        around = self.centres[order[(places * num).long().clamp(max=num - 1)], :r]
        codes = temperature * noise
        codes[:, :r] = (1 - self.bandwidth**2) ** 0.5 * around + self.bandwidth * codes[:, :r]
        return self.mean + codes @ self.directions


def left_out_likelihood(products: Tensor, size: int, bandwidth: float) -> float:
    """Mean log-likelihood of each of n codes under the shrunk kernels of the others, up to r log(2π) / 2.

    ``products`` ``[n, n]`` are the inner products of the codes, ``size`` is r, the values of one.
    """
    precision, shrink = bandwidth**-2, (1 - bandwidth**2) ** 0.5
    halves = products.diagonal() * (precision / 2)
    exponent = (-(shrink**2) * halves).add(products, alpha=shrink * precision).fill_diagonal_(-math.inf)
    near = (torch.logsumexp(exponent, 1) - halves).mean()  # of squared distances to the shrunk codes
    return (near - math.log(len(products) - 1) - size * math.log(bandwidth)).item()


DRAWN_IN = 0.7
"""How far draws move from a checkpoint to its neighbourhood's Gaussian; chosen on validation digits and shapes."""


@dataclass(frozen=True)
class Neighbourhoods:
    """A density over codes of classes: of each checkpoint the Gaussian of those of its class that are nearest to it.

    Around the checkpoints themselves that would be manifold Parzen windows (Vincent and Bengio, 2002), which are wider
    than what they are fitted to; these are drawn in to each neighbourhood's mean by as much as its Gaussian adds.

    Attributes:
        codes: ``[n, m]``, distances between which count.
        classes: ``[n]`` long.
        num: how many are a neighbourhood, the checkpoint itself included.
    """

    codes: Tensor
    classes: Tensor
    num: int

    def draw(self, classes: Tensor, places: Tensor, noise: Tensor) -> Tensor:
        """Codes ``[B, m]`` of classes ``[B]`` (long) that have checkpoints, from standard normal noise ``[B, num]``.

        ``places`` ``[B]`` in 0 … 1 say which of a class's checkpoints each is drawn around.
        """
        members = {label: self.codes[self.classes == label] for label in classes.unique().tolist()}
        drawn = []
        for label, place, numbers in zip(classes.tolist(), places.tolist(), noise, strict=True):
            known = members[label]
            around = known[min(int(place * len(known)), len(known) - 1)]
            near = known[(known - around).square().sum(1).topk(min(self.num, len(known)), largest=False).indices]
            mean, moved = near.mean(0), deviation(near, numbers[: len(near)])
            drawn.append(mean + (1 - DRAWN_IN**2) ** 0.5 * (around - mean) + DRAWN_IN * moved)
        return torch.stack(drawn)


def deviation(members: Tensor, noise: Tensor) -> Tensor:
    """A draw ``[m]`` of the Gaussian of mean 0 with the covariance of ``members`` ``[n, m]``, from noise ``[n]``."""
    return noise @ (members - members.mean(0)) / len(members) ** 0.5
