"""One form for all factors of a low-rank product: ``(A, B)`` and ``(R⁻¹ A, B R)`` are the same LoRA update ``B A``.

Letters: r rank, ``A`` ``[r, in]``, ``B`` ``[out, r]``. All arithmetic is in float64, and ``B A`` ``[out, in]`` is never
made: a QR of each factor leaves a core of ``r × r``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced singular value decomposition of ``B A = U Σ Vᵀ``: ``(Σ^½ Vᵀ, U Σ^½)``.

    Singular values descend. Each pair of vectors has the sign that makes ``Σ u |u| + Σ v |v|`` positive, a sum over all
    entries, which small changes of single ones do not turn over. Components below float64's resolution of the product,
    whose vectors are arbitrary, become 0; a product of zeros is two zero factors. Equal singular values leave a
    rotation open, which ``align_factors`` decides.

    Args:
        a: ``[r, in]``, finite, any float dtype.
        b: ``[out, r]``.

    Returns:
        float64 factors in the shapes of ``a`` and ``b``; their product is ``b @ a`` up to float64 rounding.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, sigma, vh = torch.linalg.svd(left.R @ right.R.T)  # the core, [min(out, r), min(in, r)]
    count = len(sigma)  # < r where the layer is smaller than the rank
    u, v = left.Q @ u[:, :count], right.Q @ vh[:count].T  # [out, count], [in, count]
    resolution = torch.finfo(torch.float64).eps * len(a) * left.R.norm() * right.R.norm()
    sign = torch.where((u * u.abs()).sum(0) + (v * v.abs()).sum(0) < 0, -1.0, 1.0)
    weight = sign * torch.where(sigma > resolution, sigma, 0).sqrt()
    new_a, new_b = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
    new_a[:count], new_b[:, :count] = (v * weight).T, u * weight
    return new_a, new_b


def align_factors(a: Tensor, b: Tensor, reference_a: Tensor, reference_b: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate factors as near as they come to a reference, their product unchanged (orthogonal Procrustes).

    The ``Q`` that minimises ``|Qᵀ A - A₀|² + |B Q - B₀|²`` is ``U Vᵀ`` of ``A A₀ᵀ + Bᵀ B₀ = U S Vᵀ`` (Schönemann 1966).
    It does not depend on the rotation that the factors come in, so that signs, order and equal singular values no
    longer matter where the reference tells the components apart.

    Args:
        a, b: balanced factors, float64.
        reference_a, reference_b: in their shapes, any float dtype.
    """
    u, _, vh = torch.linalg.svd(a @ reference_a.double().T + b.T @ reference_b.double())
    rotation = u @ vh  # [r, r]
    return rotation.T @ a, b @ rotation


def product_distance(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> tuple[float, float]:
    """Frobenius norms ``(|B A - B' A'|, |B A|)`` in float64.

    Args:
        a, other_a: ``[r, in]``.
        b, other_b: ``[out, r]``.
    """
    left = torch.cat([b.double(), other_b.double()], 1)  # [out, 2 r]
    right = torch.cat([a.double(), -other_a.double()])  # [2 r, in]
    return _product_norm(right, left), _product_norm(a.double(), b.double())


def _product_norm(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T))
