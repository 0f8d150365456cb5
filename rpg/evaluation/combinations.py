"""Simple baselines: a weighted sum of a zoo's checkpoints plus independent noise, or a merge; some for a condition.

A combination is the zoo's mean, plus a weighted sum of the checkpoints' deviations from it, plus noise. What lies in
the zoo's span needs no basis, as a principal direction is a weighted sum of checkpoints, too; networks of any size are
made from memory-mapped checkpoints. Small enough noise reaches any accuracy, so the kinds ``…_at_distance`` lie as far
from the zoo as the generated networks.

arXiv 2506.07998 finds that weight generators do not outperform noise and averages at making networks both new and good;
a generator is worth its compute only if it beats them. n checkpoints, N networks, W wanted ones, C condition values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rpg.config import EvaluateConfig
from rpg.evaluation.report import AT_DISTANCE
from rpg.evaluation.span import ZooSpan
from rpg.evaluation.two_sample import leading_directions
from rpg.generation.generator import Generator
from rpg.merging.adapters import Merges
from rpg.merging.methods import AFFORDABLE_MERGES
from rpg.models.conditioning import are_new, regression_inputs
from rpg.models.kernel_regression import KernelRidge, exact_distances
from rpg.seeding import derive_seed, make_rng
from tokenization.checkpoint.checkpoint import Checkpoint, StateDict
from tokenization.zoo.zoo import Zoo

LOW_RANK = 0.99
"""Share of the zoo's variance that the directions of the low-rank Gaussian hold."""

K = 16
"""Checkpoints in ``average_of_k``."""

PLAIN = (
    "noise", "run_average", "average_of_k", "interpolation", "coordinate_gaussian", "covariance_gaussian",
    "low_rank_gaussian",
)  # fmt: skip
MATCHED = (
    "noise", "coordinate_gaussian", "sharpened_gaussian", "covariance_gaussian", "low_rank_gaussian",
    "run_coordinate_gaussian", "run_sharpened_gaussian", "run_covariance_gaussian", "extrapolation",
)  # fmt: skip
NAMES = (*PLAIN, *(name + AT_DISTANCE for name in MATCHED))
"""What ``evaluate.baselines`` may name of any zoo; the average is always there."""

AFFORDABLE = ("run_average", "interpolation", "low_rank_gaussian", "low_rank_gaussian" + AT_DISTANCE)
"""The default for networks of more than `MANY_VALUES` values, where a network of each kind takes minutes to score."""

MANY_VALUES = 50_000_000

Unit = Literal["layer", "coordinate", "sharpened"]
Maker = Callable[[], StateDict]
"""Makes a network when it is called, where that is no sum."""


@dataclass(frozen=True)
class Combination:
    """One network.

    Attributes:
        weights: of the checkpoints' deviations, float64 ``[n]``.
        noise: standard deviation of the noise, in the ``unit``.
        unit: the standard deviation of each tensor's values, of each value over ``members``, or the square of the
            latter over the former, which leaves alone what hardly varies.
        members: checkpoints that a unit is of.
        seed: of the noise.
    """

    weights: Tensor
    noise: float = 0.0
    unit: Unit = "layer"
    members: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Family:
    """Networks on lines ``base + s · direction`` with one s for all: a sum of deviations, or noise of a unit."""

    base: Tensor
    direction: Tensor | None
    unit: Unit = "layer"
    members: tuple[tuple[int, ...], ...] = ()

    def at(self, strength: float, seeds: list[int]) -> list[Combination]:
        """The networks at one s."""
        if self.direction is not None:
            return [Combination(row) for row in self.base + strength * self.direction]
        rows = zip(self.base, self.members, seeds, strict=True)
        return [Combination(row, strength, self.unit, members, seed) for row, members, seed in rows]


def combine(zoo: ZooSpan, combination: Combination) -> StateDict:
    """The network of a combination, in the stored dtypes; variances stay above the zoo's smallest."""
    first, rows = zoo.checkpoints[0], list(combination.members)
    stored: dict[str, Tensor] = {}
    for name in first.tensors:
        if name not in zoo.scales:
            stored[name] = first.tensor(name).clone()
            continue
        rng = make_rng(combination.seed, "noise", name)
        values = torch.empty(zoo.means[name].shape, dtype=first.info(name).dtype)
        for block, checkpoints in zoo.blocks(name):
            mean = zoo.means[name][block]
            made = mean + combination.weights.float() @ (checkpoints - mean)
            if combination.noise:
                unit = _unit(zoo, name, checkpoints[rows], combination.unit)
                made += combination.noise * unit * torch.randn(made.shape, generator=rng)
            if name.endswith("running_var"):
                made.clamp_(min=float(checkpoints.min()))
            values[block] = made
        stored[name] = values.view(first.info(name).shape)
    return {name: stored[first.ties.get(name, name)] for name in first.order}


def _unit(zoo: ZooSpan, name: str, members: Tensor, unit: Unit) -> Tensor | float:
    if unit == "layer":
        return zoo.spreads[name]
    return members.std(0) if unit == "coordinate" else members.var(0) / zoo.spreads[name]


def make_baselines(
    zoo: ZooSpan, config: EvaluateConfig, num: int, distance: float | None, seed: int
) -> tuple[dict[str, list[Combination]], list[str]]:
    """The average and the baselines that are asked for or affordable, by the name under which they are reported.

    Args:
        distance: of the generated networks to the nearest checkpoint, in normalised values; None without any, which
            leaves out the kinds at their distance.

    Returns:
        The combinations, and what a reader must know of them.
    """
    count = len(zoo.checkpoints)
    made = {"average": [Combination(torch.zeros(count, dtype=torch.float64))]}
    if count < 2 or not zoo.mean_square > 0:
        return made, [] if count < 2 else ["All checkpoints are the same, so that every baseline would be, too."]
    default = AFFORDABLE if is_large(zoo) else NAMES
    names = default if config.baselines is None else [name for name in config.baselines if name in NAMES]
    collapsed = []
    for name in names:
        if name == "noise":
            for sigma in config.noise:
                made[f"noise_{sigma:g}"] = combinations(zoo, name, num, seed, sigma=sigma)
        elif not name.endswith(AT_DISTANCE):
            made[f"average_of_{min(K, count)}" if name == "average_of_k" else name] = combinations(zoo, name, num, seed)
        elif distance is not None and distance == distance and (found := combinations(zoo, name, num, seed, distance)):
            made[name] = found
            collapsed += [name] if distance > 0 and _is_collapsed(zoo, found, distance) else []
    notes = []
    if collapsed:
        notes.append(
            "The generated networks lie nearer to the originals than averages do, so that these baselines are averages "
            f"and lie farther out than they are named for: {', '.join(collapsed)}."
        )
    return {name: each for name, each in made.items() if each}, notes


def is_large(zoo: ZooSpan) -> bool:
    """Whether each network takes minutes."""
    return zoo.num_values > MANY_VALUES


def combinations(
    zoo: ZooSpan, name: str, num: int, seed: int, distance: float | None = None, *, sigma: float = 1.0
) -> list[Combination]:
    """``num`` networks of one kind; none where the zoo does not allow it (runs of one checkpoint).

    Args:
        zoo: at least two checkpoints.
        name: one of `NAMES`.
        distance: to the nearest checkpoint, of the kinds ``…_at_distance``, in normalised values.
        sigma: strength of ``noise``.
    """
    kind = name.removesuffix(AT_DISTANCE)
    rng = make_rng(seed, "combinations", kind)
    family = _family(zoo, kind, num, rng)
    if family is None:
        return []
    seeds = [derive_seed(seed, "combination", kind, repr(sigma), number) for number in range(len(family.base))]
    strength = sigma if kind == "noise" else 1.0
    if name != kind and distance is not None:
        strength = _strength(zoo, family, distance)
    return family.at(strength, seeds)


def _family(zoo: ZooSpan, kind: str, num: int, rng: torch.Generator) -> Family | None:
    count, everyone = len(zoo.checkpoints), tuple(range(len(zoo.checkpoints)))
    zeros = torch.zeros(num, count, dtype=torch.float64)
    if kind == "noise":
        order = torch.cat([torch.randperm(count, generator=rng) for _ in range(-(-num // count))])[:num]
        return Family(torch.eye(count, dtype=torch.float64)[order], None, "layer", (everyone,) * num)
    if kind in ("coordinate_gaussian", "sharpened_gaussian"):
        return Family(zeros, None, kind.removesuffix("_gaussian"), (everyone,) * num)  # type: ignore[arg-type]
    if kind in ("covariance_gaussian", "low_rank_gaussian"):
        directions = leading_directions(zoo.gram, LOW_RANK if kind == "low_rank_gaussian" else 1.0)  # [n, k]
        drawn = torch.randn(num, directions.shape[1], generator=rng, dtype=torch.float64) @ directions.T
        return Family(zeros, drawn / (count - 1) ** 0.5)
    if kind == "run_average":
        runs = list(zoo.members.values())
        return Family(_means(runs, count), zeros[:1]) if len(runs) > 1 else None
    if kind in ("average_of_k", "interpolation"):
        for row in zeros:
            order, place = torch.randperm(count, generator=rng), float(torch.rand((), generator=rng))
            if kind == "average_of_k":
                row[order[: min(K, count)]] = 1 / min(K, count)
            else:
                row[order[:2]] = torch.tensor([1 - place, place], dtype=torch.float64)
        return Family(zeros, torch.zeros_like(zeros))
    repeated = [members for members in zoo.members.values() if len(members) > 1]
    if not repeated or (len(repeated) < 2 and kind != "extrapolation"):
        return None
    chosen = [repeated[int(torch.randint(len(repeated), (), generator=rng))] for _ in range(num)]
    if kind == "extrapolation":
        pairs = [[members[i] for i in torch.randperm(len(members), generator=rng)[:2].tolist()] for members in chosen]
        first, second = (torch.eye(count, dtype=torch.float64)[[pair[i] for pair in pairs]] for i in (0, 1))
        return Family(first, second - first)
    if kind != "run_covariance_gaussian":
        unit: Unit = "coordinate" if "coordinate" in kind else "sharpened"
        return Family(_means(chosen, count), None, unit, tuple(map(tuple, chosen)))
    for row, members in zip(zeros, chosen, strict=True):
        drawn = torch.randn(len(members), generator=rng, dtype=torch.float64)
        row[members] = (drawn - drawn.mean()) / (len(members) - 1) ** 0.5
    return Family(_means(chosen, count), zeros)


def _means(groups: list[list[int]], count: int) -> Tensor:
    weights = torch.zeros(len(groups), count, dtype=torch.float64)
    for row, members in zip(weights, groups, strict=True):
        row[members] = 1 / len(members)
    return weights


def _strength(zoo: ZooSpan, family: Family, distance: float) -> float:
    """The s at which a family's median distance to the nearest checkpoint is ``distance``; 0 where s = 0 lies farther.

    |base + s·direction − checkpoint|² is a parabola in s for every pair, so that no network is made while searching.
    Independent noise is at right angles to the zoo, and in many values its length is its expectation.
    """
    constant = zoo.distances(zoo.project_combinations(family.base)).square()  # [N, n]
    if family.direction is not None:
        products = family.direction @ zoo.gram
        linear = (products * family.base).sum(1, keepdim=True) - products
        square = (products * family.direction).sum(1, keepdim=True)
    else:
        lengths = {each: _noise_square(zoo, family.unit, each) for each in set(family.members)}
        square = torch.tensor([[lengths[each]] for each in family.members], dtype=torch.float64)
        linear = torch.zeros_like(constant)

    def median(strength: float) -> float:
        squared = constant + 2 * strength * linear + strength**2 * square
        return squared.clamp(min=0).sqrt().amin(1).median().item()

    low, high = 0.0, 1.0
    if not distance > median(0.0):
        return 0.0
    while median(high) < distance and high < 1e6:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if median(middle) < distance else (low, middle)
    return high


def _noise_square(zoo: ZooSpan, unit: Unit, members: tuple[int, ...]) -> float:
    """Expected squared length of noise of strength 1, in normalised values."""
    if unit == "layer":
        return sum(len(zoo.means[name]) * (zoo.spreads[name] / scale) ** 2 for name, scale in zoo.scales.items())
    rows = list(members)
    if unit == "coordinate":
        gram = zoo.gram[rows][:, rows]
        return ((gram.trace() - gram.sum() / len(rows)) / (len(rows) - 1)).item()
    total = 0.0
    for name, scale in zoo.scales.items():
        for _, values in zoo.blocks(name):
            total += (values[rows].var(0) / zoo.spreads[name]).double().square().sum().item() / scale**2
    return total


def _is_collapsed(zoo: ZooSpan, made: list[Combination], distance: float) -> bool:
    """Whether networks are bare averages beyond the distance that they should lie at."""
    if any(each.noise for each in made):
        return False
    bases = zoo.project_combinations(torch.stack([each.weights for each in made]))
    return zoo.distances(bases).amin(1).median().item() > 1.01 * distance


Condition = Sequence[float] | None
CONDITIONAL = ("nearest_seen", "kernel_ridge")
"""Kinds of baselines that look at the condition."""


@dataclass(frozen=True)
class Conditions:
    """The conditions that networks are made for; empty without conditions.

    Attributes:
        originals: of each checkpoint.
        held_out: of those that nothing was learned from.
        wanted: of generated networks and of baselines, again and again.
        targets: a checkpoint that was trained for each of ``wanted``.
        seen, asked: the conditions of originals and ``wanted`` as numbers to regress on, float64 ``[n, C]``,
            ``[W, C]``; None where there are no such numbers.
        own: ``wanted`` are conditions of originals, so that the nearest one is that of another condition.
        by_class: conditions are one-hot, so that each is left out with one checkpoint at a time.
    """

    originals: Sequence[Condition] = ()
    held_out: Sequence[Condition] = ()
    wanted: Sequence[Condition] = ()
    targets: Sequence[Checkpoint] = ()
    seen: Tensor | None = None
    asked: Tensor | None = None
    own: bool = False
    by_class: bool = False


def conditions_asked(
    generator: Generator, zoo: Zoo, trained: Sequence[int], held_out: Sequence[int], num: int, split: str
) -> tuple[Conditions, Any]:
    """The conditions to generate for, and the same as `Generator.generate` takes them; empty without conditions."""
    if generator.condition is None:
        return Conditions(), None
    places = _asked_entries(zoo, held_out, split) or trained
    chosen = _spread(places, num)
    own, others, wanted = ([zoo.entries[index].condition for index in each] for each in (trained, held_out, chosen))
    if zoo.condition is None or any(each is None for each in (*own, *wanted)):  # of a metric
        return Conditions(own, others), None
    text = zoo.condition.kind == "text"
    known = [zoo.condition.names[int(each[0])] for each in (*own, *wanted) if each is not None] if text else []
    if generator.texts is not None:
        inputs = generator.texts.conditions_of(known).double()
    else:
        inputs = regression_inputs(zoo.condition.kind, torch.tensor([*own, *wanted]), zoo.condition.size)
    conditions = Conditions(
        own, others, wanted, [generator.layout.checkpoint(zoo, index) for index in chosen],
        inputs[: len(own)], inputs[len(own) :], own=places is trained, by_class=not are_new(zoo.condition.kind),
    )  # fmt: skip
    return conditions, known[len(own) :] if text else wanted


def _asked_entries(zoo: Zoo, held_out: Sequence[int], split: str) -> Sequence[int]:
    """The held-out entries to make networks for: unseen tasks where the zoo tells them apart."""
    if split == "validation":  # choices look at no unseen task
        return [index for index in held_out if zoo.entries[index].split == "validation"]
    return [index for index in held_out if zoo.entries[index].split in ("unseen", "test")] or held_out


def _spread(places: Sequence[int], num: int) -> list[int]:
    """``num`` of ``places``, evenly spaced; again and again where there are fewer."""
    chosen = places if len(places) <= num else [places[i * len(places) // num] for i in range(num)]
    return [chosen[i % len(chosen)] for i in range(num)]


def conditional_baselines(
    zoo: ZooSpan, conditions: Conditions, merges: Merges | None, config: EvaluateConfig, num: int, seed: int
) -> dict[str, Sequence[Combination | Maker]]:
    """Baselines for the first ``num`` of the wanted conditions, and merges that are asked for or affordable.

    Merged are those with the largest shares in the regression; without conditions, some drawn at random.
    """
    count = len(zoo.checkpoints)
    wanted = CONDITIONAL if config.baselines is None else config.baselines
    made: dict[str, Sequence[Combination | Maker]] = {}
    shares: Tensor | None = None
    if conditions.seen is not None and conditions.asked is not None and count > 1:
        rows = torch.arange(num) % len(conditions.asked)
        asked = conditions.asked[rows]
        weights = KernelRidge.fit(conditions.seen, zoo.gram, by_condition=not conditions.by_class).shares(asked)
        nearest = torch.eye(count, dtype=torch.float64)[nearest_rows(conditions.seen, asked, conditions.own)]
        for name, each in (("nearest_seen", nearest), ("kernel_ridge", weights)):
            if name in wanted:
                made[name] = [Combination(row) for row in each]
        shares = weights + (1 - weights.sum(1, keepdim=True)) / count  # of the checkpoints, not of their deviations
    if merges is None or count < 2:
        return made
    rows = merges.draw(num, make_rng(seed, "merged")) if shares is None else shares
    default = (*AFFORDABLE_MERGES, "peft_svd") if is_large(zoo) else merges.methods
    for name in merges.methods:
        if name in (default if config.baselines is None else config.baselines):
            made[name] = [
                partial(merges.merge, name, row, derive_seed(seed, name, number)) for number, row in enumerate(rows)
            ]
    return made


def nearest_rows(seen: Tensor, asked: Tensor, own: bool) -> Tensor:
    """The nearest of ``seen`` for each of ``asked``, ``[W]``; with ``own`` the nearest of another condition."""
    distance = exact_distances(asked.double(), seen.double())
    if own:
        distance[distance == 0] = float("inf")
    return distance.argmin(1)
