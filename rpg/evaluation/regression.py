"""Weights by regression on the task's bits: what a generator for unseen tasks has to beat.

T tasks, S seen tasks, C classes, P values of a network. Bits are ±1 here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor

RIDGE_PENALTIES = (1e-1, 1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0)
KERNEL_PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
KERNEL_LENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

CHUNK = 1 << 14
"""Values that are mixed at a time, in float64."""


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

    def model(self) -> Pipeline | KernelRidge:
        """scikit-learn's, not fitted: from ±1 bits to deviations from the mean network.

        Products are those of different bits, without the constant: a constant is fitted but not penalised. The kernel
        is exp(−d²/(2·length²)) with d the Euclidean distance.
        """
        if self.kind == "ridge":
            features = PolynomialFeatures(int(self.parameter), interaction_only=True, include_bias=False)
            return make_pipeline(features, Ridge(alpha=self.penalty))
        return KernelRidge(alpha=self.penalty, kernel="rbf", gamma=1 / (2 * self.parameter**2))

    def mixture(self, seen: Tensor, bits: Tensor) -> Tensor:
        """Share of each seen network in each predicted one, float64 ``[T, S]``; the shares of a network add up to 1.

        Predictions are linear in the seen weights, so that one small fit serves any number of values, and whoever
        cannot hold all networks at once mixes them some values at a time.

        Args:
            seen: bits of the seen tasks, ``[S, C]``.
            bits: of the tasks to predict for, ``[T, C]``.
        """
        known, wanted = (2 * each.double().numpy() - 1 for each in (seen, bits))
        num = len(known)
        deviations = np.eye(num) - 1 / num  # of S unit vectors from their mean: the kernel has no constant of its own
        predicted = self.model().fit(known, deviations).predict(wanted).reshape(len(wanted), num)
        return torch.from_numpy(predicted + 1 / num)

    def predict(self, seen: Tensor, vectors: Tensor, bits: Tensor) -> Tensor:
        """Weights ``[T, P]`` for ``bits`` ``[T, C]``, fitted on the seen tasks ``[S, C]`` and their ``[S, P]``."""
        mixture = self.mixture(seen, bits)
        return torch.cat([(mixture @ columns.double()).to(vectors.dtype) for columns in vectors.split(CHUNK, 1)], 1)


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
