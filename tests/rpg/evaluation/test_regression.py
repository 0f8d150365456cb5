import pytest
import torch

from rpg.evaluation.regression import Regression, candidates, kernel_ridge, products, ridge, tune
from rpg.tasks.class_splits import all_tasks


def test_products_are_all_monomials_of_signs():
    bits = torch.tensor([[1, 0, 1]])
    assert products(bits, 1).tolist() == [[1, -1, 1]]
    assert products(bits, 3).tolist() == [[1, -1, 1, -1, 1, -1, -1]]
    assert products(all_tasks(10), 3).shape == (1022, 10 + 45 + 120)


def test_ridge_finds_an_exact_polynomial_and_agrees_with_scikit_learn():
    from sklearn.linear_model import Ridge

    torch.manual_seed(0)
    bits = all_tasks(6)
    features = products(bits, 2)
    vectors = features @ torch.randn(features.shape[1], 3, dtype=torch.float64) + 2
    seen, rest = slice(0, 50), slice(50, None)
    exact = ridge(features[seen], vectors[seen], features[rest], 1e-9)
    torch.testing.assert_close(exact, vectors[rest], rtol=1e-5, atol=1e-5)
    expected = Ridge(alpha=3.0).fit(features[seen].numpy(), vectors[seen].numpy()).predict(features[rest].numpy())
    torch.testing.assert_close(ridge(features[seen], vectors[seen], features[rest], 3.0), torch.from_numpy(expected))


def test_kernel_ridge_agrees_with_scikit_learn():
    from sklearn.kernel_ridge import KernelRidge

    torch.manual_seed(0)
    bits, vectors = all_tasks(6), torch.randn(62, 3, dtype=torch.float64)
    seen, rest = slice(0, 50), slice(50, None)
    signs, mean = bits.numpy() * 2.0 - 1, vectors[seen].mean(0)
    model = KernelRidge(alpha=0.1, kernel="rbf", gamma=1 / (2 * 2.0**2))
    expected = model.fit(signs[seen], (vectors[seen] - mean).numpy()).predict(signs[rest])
    found = kernel_ridge(bits[seen], vectors[seen], bits[rest], 2.0, 0.1)
    torch.testing.assert_close(found - mean, torch.from_numpy(expected))


def test_tuning_takes_the_best_by_score_alone():
    bits, vectors = all_tasks(4), torch.randn(14, 2)
    wanted = Regression("kernel_ridge", 2.0, 1e-1)
    target = wanted.predict(bits[:10], vectors[:10], bits[10:])
    best, score = tune(
        candidates()["kernel_ridge"], bits[:10], vectors[:10], bits[10:], lambda p: -(p - target).square().sum().item()
    )
    assert best == wanted and score == pytest.approx(0)
