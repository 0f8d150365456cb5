"""New codes of whole checkpoints: from a diffusion prior, or in closed form from a density of the zoo's.

The prior is flow matching (arXiv 2210.02747) in the velocity form, or a preconditioned denoiser (EDM, arXiv
2206.00364), on vectors ``[B, m]``, given the condition: an adaLN residual MLP (arXiv 2212.09748). Once it has chosen a
code, the tokens that are made from it belong to one network.

Letters: B codes, m code values, W width; of the density n checkpoints, S values of a state, r directions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.models.denoiser.base import TimeEmbedding
from rpg.section import Section


class CodePriorConfig(Section):
    """The diffusion over codes."""

    objective: Literal["flow", "edm"] = Field("flow", description="flow matching, or EDM's preconditioned denoiser")
    whitened: bool = Field(
        True, description="all directions of the codes count the same; false: each by its variance in the zoo"
    )
    width: int = Field(384, ge=1, description="width of its residual stream")
    depth: int = Field(4, ge=1, description="residual blocks")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the blocks: zoos are small")
    batch_size: int = Field(192, ge=1, description="codes a training step, over all processes")
    steps: int = Field(30, ge=1, description="sampling steps (Heun)")
    draws: Literal["independent", "even"] = Field(
        "independent",
        description="noise of a seed's networks: independent, or the points of a scrambled Sobol sequence, which cover "
        "what a condition leaves open more evenly, so that a set of networks more surely holds a good one",
    )
    churn: float = Field(
        0.0,
        ge=0,
        description="of EDM: fresh noise while sampling (its S_churn), which corrects errors of earlier steps",
    )

    start: float | None = Field(
        None,
        gt=0,
        description="of EDM: the noise level at which sampling sets out, from a draw of the neighbourhoods' density "
        "(state.neighbours) and noise of that size; null: from noise alone",
    )

    @model_validator(mode="after")
    def _flow_has_no_churn(self) -> CodePriorConfig:
        if (self.churn or self.start) and self.objective != "edm":
            raise ValueError("churn and start need objective: edm")
        if self.churn and self.draws == "even":
            raise ValueError("churn adds independent noise; set draws: independent")
        return self


LOG_NOISE_MEAN, LOG_NOISE_STD = -1.2, 1.2
"""Of EDM's training noise levels (table 1); codes have unit mean square, so that its sigma_data is 1."""
LEAST_NOISE, MOST_NOISE, SPACING = 0.01, 40.0, 7.0
"""EDM's sampling noise levels (equation 5)."""
MOST_CHURN = 2**0.5 - 1
"""The share by which a step raises the noise level at most: new noise is no more than there was."""
LEAST_CHURNED, MOST_CHURNED = 0.05, 5.0
"""Noise levels between which noise is added anew (its S_tmin and S_tmax)."""


class _Block(nn.Module):
    """Modulated layer norm, two linear layers, gate, residual."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.hidden = nn.Linear(width, 2 * width)
        self.output = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map ``[B, W]`` to ``[B, W]`` given ``[B, W]``."""
        shift, scale, gate = self.modulation(context).chunk(3, dim=-1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return x + gate * self.output(self.dropout(F.silu(self.hidden(y))))


class CodePrior(nn.Module):
    """Draws codes; ``build_condition`` makes the encoder of conditions for a width, if there are any."""

    def __init__(
        self, config: CodePriorConfig, code_size: int, build_condition: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.code_size = code_size
        self.input = nn.Linear(code_size, config.width)
        self.time = TimeEmbedding(config.width)
        self.condition = None if build_condition is None else build_condition(config.width)
        self.blocks = nn.ModuleList(_Block(config.width, config.dropout) for _ in range(config.depth))
        self.output = nn.Linear(config.width, code_size)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.spread: Tensor | None
        # What the directions are multiplied by; a generator of whitened codes stores none.
        self.register_buffer("spread", None if config.whitened else torch.ones(code_size))

    def forward(self, x: Tensor, time: Tensor, conditions: Tensor | None = None) -> Tensor:
        """What the network says of noisy codes ``[B, m]`` at the time ``[B]`` in 0 … 1, given ``[B, C]``: ``[B, m]``.

        In flow matching that is the velocity.
        """
        context = self.time(time * 1000)  # [B, W]
        if self.condition is not None:
            context = context + self.condition(conditions)
        context = F.silu(context)
        hidden = self.input(x)
        for block in self.blocks:
            hidden = block(hidden, context)
        return self.output(hidden)

    def loss(self, codes: Tensor, noise: Tensor, time: Tensor, conditions: Tensor | None = None) -> Tensor:
        """Mean squared error over a batch of codes ``[B, m]``, noise alike, logit-normal time ``[B]``.

        With it that of the codes which an encoder of examples tells, if it tells any.
        """
        error = self._diffusion_loss(codes, noise, time, conditions)
        told = getattr(self.condition, "told", None)
        return error if told is None else error + (told.float() - codes).square().mean()

    def _diffusion_loss(self, codes: Tensor, noise: Tensor, time: Tensor, conditions: Tensor | None) -> Tensor:
        if self.spread is not None:
            codes = codes * self.spread
        if self.config.objective == "edm":
            level = torch.exp(torch.logit(time) * LOG_NOISE_STD + LOG_NOISE_MEAN)  # [B]
            noisy = codes + level[:, None] * noise
            keep, out = _preconditioning(level)
            said = self._denoiser_output(noisy, level, conditions)
            return (said - (codes - keep * noisy) / out).square().mean()
        at = time[:, None]
        velocity = self((1 - at) * codes + at * noise, time, conditions)
        return (velocity.float() - (noise - codes)).square().mean()

    def sample(
        self, noise: Tensor, conditions: Tensor | None = None, watch: Callable[[Tensor], None] | None = None,
        rngs: Sequence[torch.Generator] = (), begun: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Codes ``[B, m]`` from standard normal noise, by Heun's method; its last step is Euler's.

        With churn that is EDM's algorithm 2, and each code's noise comes from its own one of B ``rngs``.
        ``watch`` is told, at every step, the codes ``[B, m]`` that one step from there to the end would give.
        With ``begun``, codes ``[B, m]``, sampling sets out from those, as noisy as the configuration's start.
        """
        if self.config.objective == "edm":
            most = MOST_NOISE if begun is None or self.config.start is None else self.config.start
            ramp = torch.linspace(most ** (1 / SPACING), LEAST_NOISE ** (1 / SPACING), self.config.steps)
            times, x = [*(ramp**SPACING).tolist(), 0.0], most * noise
            if begun is not None:
                x = x + (begun if self.spread is None else begun * self.spread)
        else:
            times, x = torch.linspace(1, 0, self.config.steps + 1).tolist(), noise
        for level, after in itertools.pairwise(times):
            now = level
            if self.config.churn and LEAST_CHURNED <= level <= MOST_CHURNED:
                now = level * (1 + min(self.config.churn / self.config.steps, MOST_CHURN))
                fresh = torch.stack([torch.randn(self.code_size, generator=rng) for rng in rngs]).to(x.device)
                x = x + (now**2 - level**2) ** 0.5 * fresh
            slope = self._slope(x, now, conditions)
            if watch is not None:
                watch((x - now * slope) / (1 if self.spread is None else self.spread))
            ahead = x + (after - now) * slope
            if after > 0:
                ahead = x + (after - now) * (slope + self._slope(ahead, after, conditions)) / 2
            x = ahead
        return x if self.spread is None else x / self.spread

    def _slope(self, x: Tensor, time: float, conditions: Tensor | None) -> Tensor:
        """dx / dt at one time (of EDM: one noise level) for all of ``[B, m]``."""
        times = x.new_full((len(x),), time)
        if self.config.objective == "flow":
            return self(x, times, conditions).float()
        keep, out = _preconditioning(times)
        return (x - keep * x - out * self._denoiser_output(x, times, conditions)) / time

    def _denoiser_output(self, noisy: Tensor, level: Tensor, conditions: Tensor | None) -> Tensor:
        """EDM's F ``[B, m]``: what the network says of scaled input; its time runs over all noise levels."""
        scaled = noisy / (1 + level[:, None].square()).sqrt()
        return self(scaled, (level.log() + 5) / 10, conditions).float()


def even_noise(seed: int, networks: Sequence[int], size: int) -> Tensor:
    """Standard normal noise ``[len(networks), size]``: of network i the i-th point of the seed's Sobol sequence.

    Any 2ᵏ networks in a row from a multiple of 2ᵏ are as evenly spread as the sequence's first 2ᵏ.
    """
    first = min(networks)
    engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed % 2**31).fast_forward(first)
    points = engine.draw(max(networks) - first + 1, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    return torch.special.ndtri(points)[[each - first for each in networks]].float()


def _preconditioning(level: Tensor) -> tuple[Tensor, Tensor]:
    """What of noisy codes and of the network's output makes the clean codes, ``[B, 1]`` each (EDM, table 1)."""
    variance = level[:, None].square()
    return 1 / (1 + variance), (variance / (1 + variance)).sqrt()


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
