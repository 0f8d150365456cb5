"""Canonical factors: the same product, whatever factors it came in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenization.lora.adapter import align_factors, balanced_factors, product_distance


def pair(rank: int = 4, size_in: int = 9, size_out: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, size_in, generator=generator, dtype=torch.float64)
    return a, torch.randn(size_out, rank, generator=generator, dtype=torch.float64)


def mixed(a: Tensor, b: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The same product from other factors, far from balanced."""
    mix, _ = pair(len(a), len(a), seed=seed)
    return torch.linalg.solve(mix, a), b @ mix


@pytest.mark.parametrize(("rank", "size_in", "size_out"), [(4, 9, 7), (1, 5, 3), (6, 4, 8), (6, 8, 4), (5, 3, 2)])
def test_the_product_stays_and_the_factors_are_its_decomposition(rank: int, size_in: int, size_out: int) -> None:
    a, b = pair(rank, size_in, size_out)
    new_a, new_b = balanced_factors(a, b)
    assert new_a.shape == a.shape and new_b.shape == b.shape
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=0, atol=1e-13)
    sigma = torch.zeros(rank, dtype=torch.float64)
    singular = torch.linalg.svdvals(b @ a)[:rank]
    sigma[: len(singular)] = singular
    torch.testing.assert_close(new_a @ new_a.T, sigma.diag(), rtol=0, atol=1e-13)
    torch.testing.assert_close(new_b.T @ new_b, sigma.diag(), rtol=0, atol=1e-13)


def test_other_factors_of_the_same_product_become_the_same() -> None:
    a, b = pair()
    expected = balanced_factors(a, b)
    for seed in range(1, 6):
        for found, value in zip(balanced_factors(*mixed(a, b, seed)), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=1e-11)


def test_fresh_and_deficient_adapters_are_stable() -> None:
    a, b = pair()
    assert all(not factor.any() for factor in balanced_factors(a, torch.zeros_like(b)))
    assert all(not factor.any() for factor in balanced_factors(torch.zeros_like(a), torch.zeros_like(b)))
    b[:, 2:] = b[:, :2]  # rank 2
    new_a, new_b = balanced_factors(a, b)
    assert not new_a[2:].any() and not new_b[:, 2:].any()
    torch.testing.assert_close(new_b @ new_a, b @ a, rtol=0, atol=1e-13)


def test_rounding_does_not_turn_signs_over() -> None:
    a, b = pair(8, 64, 48)
    left, right = balanced_factors(a, b), balanced_factors(a.float(), b.float())
    for value, rounded in zip(left, right, strict=True):
        torch.testing.assert_close(value, rounded, rtol=0, atol=1e-5)


def test_alignment_undoes_every_rotation_also_between_equal_singular_values() -> None:
    sigma = torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    left, right = torch.linalg.qr(pair()[1]).Q, torch.linalg.qr(pair()[0].T).Q
    a, b = (right * sigma.sqrt()).T, left * sigma.sqrt()
    reference = pair(seed=3)
    expected = align_factors(*balanced_factors(a, b), *reference)
    torch.testing.assert_close(expected[1] @ expected[0], b @ a, rtol=0, atol=1e-13)
    for seed in range(1, 6):
        aligned = align_factors(*balanced_factors(*mixed(a, b, seed)), *reference)
        for found, value in zip(aligned, expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=1e-11)


def test_alignment_is_the_nearest_rotation() -> None:
    (a, b), (to_a, to_b) = balanced_factors(*pair()), balanced_factors(*pair(seed=5))

    def distance(x: Tensor, y: Tensor) -> float:
        return float((x - to_a).square().sum() + (y - to_b).square().sum())

    best = distance(*align_factors(a, b, to_a, to_b))
    for seed in range(20):
        rotation = torch.linalg.qr(pair(4, 4, seed=seed)[0]).Q
        assert best <= distance(rotation.T @ a, b @ rotation) + 1e-12
    back = align_factors(*align_factors(a, b, to_a, to_b), a, b)
    torch.testing.assert_close(back[0], a, rtol=0, atol=1e-12)


def test_distance_of_products() -> None:
    (a, b), (other_a, other_b) = pair(), pair(seed=1)
    distance, norm = product_distance(a, b, other_a, other_b)
    assert distance == pytest.approx(float((b @ a - other_b @ other_a).norm()))
    assert norm == pytest.approx(float((b @ a).norm()))
    assert product_distance(a, b, *mixed(a, b, 2))[0] < 1e-12 * norm
