"""Baselines for tasks: the nearest seen network, the average, and tuned regressions on the task's bits.

C bits, T tasks, S seen tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.evaluation.combinations import nearest_rows
from rpg.evaluation.per_task import score_method
from rpg.evaluation.task_networks import Parts, TaskNetworks
from rpg.evaluation.workers import Workers
from rpg.models.kernel_regression import rbf
from rpg.seeding import make_rng
from rpg.tasks.base import TaskFamily
from tokenization.checkpoint.progress import steps

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
            from sklearn.linear_model import Ridge  # imported here: slow
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import PolynomialFeatures

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
