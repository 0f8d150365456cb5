"""Weights by regression on the task's bits: what a generator for unseen tasks has to beat.

T tasks, S seen tasks, C classes, F features, P values of a network. Bits are ±1 here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

RIDGE_PENALTIES = (1e-1, 1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0)
KERNEL_PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
KERNEL_LENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Regression:
    """A way to predict weights from bits.

    Attributes:
        kind: ``ridge`` on products of bits, or ``kernel_ridge`` with a Gaussian kernel.
        parameter: highest degree of the products, or the kernel's length in units of ±1 bits.
        penalty: of the squared coefficients.
    """

    kind: str
    parameter: float
    penalty: float

    def predict(self, seen: Tensor, vectors: Tensor, bits: Tensor) -> Tensor:
        """Weights ``[T, P]`` for ``bits`` ``[T, C]``, fitted on the seen tasks ``[S, C]`` and their ``[S, P]``."""
        if self.kind == "ridge":
            return ridge(
                products(seen, int(self.parameter)), vectors, products(bits, int(self.parameter)), self.penalty
            )
        return kernel_ridge(seen, vectors, bits, self.parameter, self.penalty)


def products(bits: Tensor, degree: int) -> Tensor:
    """All products of up to ``degree`` different ±1 bits, without the constant: ``[T, C]`` → float64 ``[T, F]``."""
    signs = bits.double() * 2 - 1
    columns = [
        signs[:, list(chosen)].prod(1)
        for size in range(1, degree + 1)
        for chosen in combinations(range(signs.shape[1]), size)
    ]
    return torch.stack(columns, 1)


def ridge(features: Tensor, vectors: Tensor, wanted: Tensor, penalty: float) -> Tensor:
    """Ridge regression with a free constant: ``[S, F]``, ``[S, P]``, ``[T, F]`` → ``[T, P]``."""
    centre, mean = features.mean(0), vectors.double().mean(0)
    centred = features - centre  # [S, F]
    gram = centred.T @ centred + penalty * torch.eye(features.shape[1], dtype=torch.float64)
    coefficients = torch.linalg.solve(gram, centred.T @ (vectors.double() - mean))  # [F, P]
    return (mean + (wanted - centre) @ coefficients).to(vectors.dtype)


def kernel_ridge(seen: Tensor, vectors: Tensor, bits: Tensor, length: float, penalty: float) -> Tensor:
    """Kernel ridge regression around the mean, kernel exp(−d²/(2·length²)) of ±1 bits: → ``[T, P]``."""

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        different = (first[:, None] != second[None]).sum(-1).double()  # two ±1 bits differ by 2: d² = 4 · different
        return torch.exp(-4 * different / (2 * length**2))

    mean = vectors.double().mean(0)
    gram = kernel(seen, seen) + penalty * torch.eye(len(seen), dtype=torch.float64)
    dual = torch.linalg.solve(gram, vectors.double() - mean)  # [S, P]
    return (mean + kernel(bits, seen) @ dual).to(vectors.dtype)


def candidates() -> dict[str, list[Regression]]:
    """The regressions that are tuned, by the name they are reported under."""
    found = {
        f"ridge_degree_{degree}": [Regression("ridge", degree, penalty) for penalty in RIDGE_PENALTIES]
        for degree in (1, 2, 3)
    }
    found["kernel_ridge"] = [
        Regression("kernel_ridge", length, penalty) for length in KERNEL_LENGTHS for penalty in KERNEL_PENALTIES
    ]
    return found


def tune(
    regressions: Iterable[Regression],
    seen: Tensor,
    vectors: Tensor,
    bits: Tensor,
    score: Callable[[Tensor], float],
) -> tuple[Regression, float]:
    """The regression whose weights score best, and its score.

    Args:
        regressions: the candidates; the first of equals wins.
        seen: tasks to fit on, ``[S, C]``.
        vectors: their weights, ``[S, P]``.
        bits: validation tasks, ``[T, C]``.
        score: figure of predicted weights ``[T, P]``, higher is better.
    """
    best: tuple[Regression, float] | None = None
    for each in regressions:
        value = score(each.predict(seen, vectors, bits))
        if best is None or value > best[1]:
            best = (each, value)
    assert best is not None, "no candidates"
    return best
