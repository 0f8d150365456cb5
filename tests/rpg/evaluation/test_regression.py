import itertools

import pytest
import torch

from rpg.evaluation.conditional import Regression, regression_grid, tune
from rpg.tasks.class_splits import all_tasks


def predicted(regression, seen, vectors, bits):
    return regression.mixture(seen, bits) @ vectors.double()


def closed_form_ridge(seen, vectors, bits, degree, penalty):
    """The obvious twin: products by hand, centred, and the normal equations."""

    def features(each):
        signs = each.double() * 2 - 1
        chosen = [c for size in range(1, degree + 1) for c in itertools.combinations(range(signs.shape[1]), size)]
        return torch.stack([signs[:, list(columns)].prod(1) for columns in chosen], 1)

    known, wanted = features(seen), features(bits)
    centre, mean = known.mean(0), vectors.double().mean(0)
    matrix = (known - centre).T @ (known - centre) + penalty * torch.eye(known.shape[1], dtype=torch.float64)
    coefficients = torch.linalg.solve(matrix, (known - centre).T @ (vectors.double() - mean))
    return mean + (wanted - centre) @ coefficients


def closed_form_kernel_ridge(seen, vectors, bits, length, penalty):
    """The obvious twin: one coefficient a seen task, around the mean."""

    def kernel(first, second):
        different = (first[:, None] != second[None]).sum(-1).double()  # two ±1 bits differ by 2: d² = 4 · different
        return torch.exp(-4 * different / (2 * length**2))

    mean = vectors.double().mean(0)
    matrix = kernel(seen, seen) + penalty * torch.eye(len(seen), dtype=torch.float64)
    return mean + kernel(bits, seen) @ torch.linalg.solve(matrix, vectors.double() - mean)


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("penalty", [0.1, 3.0, 1000.0])
def test_ridge_is_the_closed_form(degree, penalty):
    torch.manual_seed(0)
    bits, vectors = all_tasks(6), 2 + torch.randn(62, 3, dtype=torch.float64)
    seen, rest = slice(0, 50), slice(50, None)
    found = predicted(Regression("ridge", degree, penalty), bits[seen], vectors[seen], bits[rest])
    torch.testing.assert_close(found, closed_form_ridge(bits[seen], vectors[seen], bits[rest], degree, penalty))


def test_ridge_finds_an_exact_polynomial():
    torch.manual_seed(0)
    bits = all_tasks(6)
    signs = bits.double() * 2 - 1
    pairs = [signs[:, i] * signs[:, j] for i, j in itertools.combinations(range(6), 2)]
    features = torch.cat([signs, torch.stack(pairs, 1)], 1)
    vectors = features @ torch.randn(features.shape[1], 3, dtype=torch.float64) + 2
    seen, rest = slice(0, 50), slice(50, None)
    exact = predicted(Regression("ridge", 2, 1e-9), bits[seen], vectors[seen], bits[rest])
    torch.testing.assert_close(exact, vectors[rest], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1.0, 2.0, 6.0])
@pytest.mark.parametrize("penalty", [1e-3, 0.1, 1.0])
def test_kernel_ridge_is_the_closed_form(length, penalty):
    torch.manual_seed(0)
    bits, vectors = all_tasks(6), 2 + torch.randn(62, 3, dtype=torch.float64)
    seen, rest = slice(0, 50), slice(50, None)
    found = predicted(Regression("kernel_ridge", length, penalty), bits[seen], vectors[seen], bits[rest])
    torch.testing.assert_close(found, closed_form_kernel_ridge(bits[seen], vectors[seen], bits[rest], length, penalty))


@pytest.mark.parametrize("name", regression_grid())
def test_the_shares_of_a_network_add_up_to_1(name):
    bits = all_tasks(5)
    shares = regression_grid()[name][2].mixture(bits[:20], bits[20:])
    torch.testing.assert_close(shares.sum(1), torch.ones(10, dtype=torch.float64))


def test_tuning_takes_the_best_by_score_alone():
    bits, vectors = all_tasks(4), torch.randn(14, 2)
    wanted = Regression("kernel_ridge", 2.0, 1e-1)
    target = predicted(wanted, bits[:10], vectors[:10], bits[10:])

    def score(regression):
        return -(predicted(regression, bits[:10], vectors[:10], bits[10:]) - target).square().sum().item()

    best, found = tune(regression_grid()["kernel_ridge"], score)
    assert best == wanted and found == pytest.approx(0)
