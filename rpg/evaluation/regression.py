"""Weights by regression on the task's bits: what a generator for unseen tasks has to beat.

T tasks, S seen tasks, C classes, P values of a network. Bits are ±1 here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor

from rpg.evaluation.task_networks import TaskNetworks
from rpg.evaluation.unseen_tasks import score_method
from rpg.evaluation.workers import Workers
from rpg.models.kernel_regression import rbf
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
    best: tuple[Regression, float] | None = None
    for each in regressions:
        value = score(each)
        if best is None or value > best[1]:
            best = (each, value)
    assert best is not None, "no candidates"
    return best


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
        shares = functools.partial(Regression.mixture, seen=train.bits, bits=validation.bits)
        grid = {name: _nearest_in_weights(each, shares, known, crossed) for name, each in grid.items()}

    def score(regression: Regression) -> float:
        mixture = regression.mixture(train.bits, validation.bits)
        return score_method(task, train.mixed(mixture), validation.bits, "validation").first.mean().item()

    every = [each for regressions in grid.values() for each in regressions]
    places = workers.places(len(every))
    tuned = workers.collect(places, [score(every[i]) for i in steps("tuning regressions", places)], len(every))
    found = dict(zip(every, tuned, strict=True))
    chosen = {name: tune(regressions, found.__getitem__) for name, regressions in grid.items()}
    chosen["ridge"] = max((chosen[f"ridge_degree_{degree}"] for degree in (1, 2, 3)), key=lambda each: each[1])
    return chosen


def _nearest_in_weights(
    regressions: list[Regression], mixture: Callable[[Regression], Tensor], known: Tensor, crossed: Tensor
) -> list[Regression]:
    """The ``NUM_TRIED`` regressions whose predictions lie nearest to the validation tasks' own weights.

    Args:
        regressions: one kind.
        mixture: the shares ``[V, S]`` of the S training networks in the V predictions.
        known: inner products of the training networks, ``[S, S]``.
        crossed: those of the validation tasks' own networks with them, ``[V, S]``.
    """
    errors = []
    for each in regressions:
        shares = mixture(each)  # |prediction - own|² less |own|², which is the same for all
        errors.append(((shares @ known) * shares).sum().item() - 2 * (shares * crossed).sum().item())
    order = sorted(range(len(regressions)), key=errors.__getitem__)
    return [regressions[index] for index in sorted(order[:NUM_TRIED])]
