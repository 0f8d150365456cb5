"""Conditions of an evaluation, and baselines that depend on them: nearest, average, merges and tuned regressions.

n checkpoints of a zoo, W wanted networks, C numbers of a condition, T tasks, S seen tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor

from rpg.config import EvaluateConfig
from rpg.evaluation.combinations import Combination, Maker, is_large
from rpg.evaluation.network_merges import AFFORDABLE_MERGES, Merges
from rpg.evaluation.per_task import score_method
from rpg.evaluation.span import ZooSpan
from rpg.evaluation.task_networks import Parts, TaskNetworks
from rpg.evaluation.workers import Workers
from rpg.generation.generator import Generator
from rpg.models.conditioning import are_new, regression_inputs
from rpg.models.kernel_regression import KernelRidge, exact_distances, rbf
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.base import TaskFamily
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.progress import steps
from tokenization.zoo.zoo import Zoo

RIDGE_PENALTIES = (1e-1, 1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0)
KERNEL_PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
KERNEL_LENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

NUM_TRIED = 2
"""Regressions of a kind that are tried as networks, where networks are large."""


@dataclass(frozen=True)
class Regression:
    """A way to predict weights from bits.

    Attributes:
        kind: ``ridge`` on products of bits, or ``kernel_ridge`` with a Gaussian kernel.
        parameter: highest degree of the products, or the kernel's length in units of ±1 bits.
        penalty: of the squared coefficients; it is added to the diagonal of a matrix that is a sum, not a mean, over
            the seen tasks.
    """

    kind: str
    parameter: float
    penalty: float

    def mixture(self, seen: Tensor, bits: Tensor) -> Tensor:
        """Share of each seen network in each predicted one, float64 ``[T, S]``; the shares of a network add up to 1.

        Predictions are deviations from the mean network, linear in the seen weights, so that one small fit serves any
        number of values. Products are those of different bits, without the constant: a constant is fitted but not
        penalised. The kernel is exp(−d²/(2·length²)) with d the Euclidean distance of ±1 bits.

        Args:
            seen: bits of the seen tasks, ``[S, C]``.
            bits: of the tasks to predict for, ``[T, C]``.
        """
        known, wanted = (2 * each.double() - 1 for each in (seen, bits))
        num = len(known)
        deviations = torch.eye(num, dtype=torch.float64) - 1 / num  # the kernel has no constant of its own
        if self.kind == "ridge":
            features = PolynomialFeatures(int(self.parameter), interaction_only=True, include_bias=False)
            model = make_pipeline(features, Ridge(alpha=self.penalty)).fit(known.numpy(), deviations.numpy())
            return torch.from_numpy(model.predict(wanted.numpy()).reshape(len(wanted), num)) + 1 / num
        kernel = rbf(known, known, self.parameter)
        kernel.diagonal().add_(self.penalty)
        return rbf(wanted, known, self.parameter) @ torch.linalg.solve(kernel, deviations) + 1 / num


def regression_grid() -> dict[str, list[Regression]]:
    """The regressions that are tuned, by the name they are reported under."""
    found = {
        f"ridge_degree_{degree}": [Regression("ridge", degree, penalty) for penalty in RIDGE_PENALTIES]
        for degree in (1, 2, 3)
    }
    found["kernel_ridge"] = [
        Regression("kernel_ridge", length, penalty) for length in KERNEL_LENGTHS for penalty in KERNEL_PENALTIES
    ]
    return found


def tune(regressions: Iterable[Regression], score: Callable[[Regression], float]) -> tuple[Regression, float]:
    """The regression that scores best, the first of equals, and its score. There must be one."""
    scores = {each: score(each) for each in regressions}
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


def choose_regressions(
    task: TaskFamily, train: TaskNetworks, validation: TaskNetworks, workers: Workers | None = None
) -> dict[str, tuple[Regression, float]]:
    """Each kind of regression, tuned, with its validation accuracy; ``ridge`` is the best degree.

    Candidates are fitted on ``train`` alone and chosen by the validation tasks' accuracy on validation images; of large
    networks, where every candidate takes long, only those are tried whose weights come nearest. Candidates are shared
    among ``workers``.
    """
    workers = workers or Workers()
    grid = regression_grid()
    if train.is_large:
        known, crossed = train.products(train), validation.products(train)  # each reads every network, once for all
        shares = {each: each.mixture(train.bits, validation.bits) for kinds in grid.values() for each in kinds}
        grid = {name: _nearest_in_weights(each, shares, known, crossed) for name, each in grid.items()}

    def score(regression: Regression) -> float:
        made = train.mixed(regression.mixture(train.bits, validation.bits))
        return score_method(task, made, validation.bits, "validation").first.mean().item()

    every = [each for regressions in grid.values() for each in regressions]
    places = workers.places(len(every))
    tuned = workers.collect(places, [score(every[i]) for i in steps("tuning regressions", places)], len(every))
    found = dict(zip(every, tuned, strict=True))
    chosen = {name: tune(regressions, found.__getitem__) for name, regressions in grid.items()}
    chosen["ridge"] = max((chosen[f"ridge_degree_{degree}"] for degree in (1, 2, 3)), key=lambda each: each[1])
    return chosen


def _nearest_in_weights(
    regressions: list[Regression], mixtures: Mapping[Regression, Tensor], known: Tensor, crossed: Tensor
) -> list[Regression]:
    """The ``NUM_TRIED`` regressions whose predictions lie nearest to the validation tasks' own weights.

    Args:
        regressions: one kind.
        mixtures: of each the shares ``[V, S]`` of the S training networks in the V predictions.
        known: inner products of the training networks, ``[S, S]``.
        crossed: those of the validation tasks' own networks with them, ``[V, S]``.
    """

    def error(regression: Regression) -> float:  # |prediction - own|² less |own|², which is the same for all
        shares = mixtures[regression]
        return ((shares @ known) * shares).sum().item() - 2 * (shares * crossed).sum().item()

    nearest = sorted(regressions, key=error)[:NUM_TRIED]
    return [each for each in regressions if each in nearest]


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
        inputs = torch.stack([generator.texts.condition(each) for each in known]).double()
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


def unseen_baselines(
    seen: TaskNetworks, bits: Tensor, regressions: Mapping[str, Regression], own: bool
) -> dict[str, Parts]:
    """The networks that need no generator, for the tasks ``bits`` ``[T, C]``, by method.

    Args:
        regressions: by the name they are reported under; fitted on ``seen`` here.
        own: the tasks are seen ones: the nearest seen task is then the nearest *other*.
    """
    num = len(seen.bits)
    (average,) = seen.mixed(torch.full((1, num), 1 / num, dtype=torch.float64))
    made: dict[str, Parts] = {
        "nearest_seen": seen.parts(nearest_rows(seen.bits, bits, own)),
        "average": [{name: value.expand(len(bits), *value.shape[1:]) for name, value in average.items()}],
    }
    for name, each in regressions.items():
        made[name] = seen.mixed(each.mixture(seen.bits, bits))
    return made


def random_other(bits: Tensor, seen: Tensor, seed: int) -> Tensor:
    """For each task the bits of a random seen task: the request of the control without the right condition."""
    rng = make_rng(seed, "no condition")
    return seen[torch.randint(len(seen), (len(bits),), generator=rng)]
