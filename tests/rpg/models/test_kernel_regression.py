"""The closed forms of kernel ridge against the slow way to each."""

from __future__ import annotations

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge as SklearnKernelRidge
from torch import Tensor

from rpg.models.kernel_regression import LENGTHS, KernelRidge, exact_distances, rbf, square_root


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    bits = (torch.rand(30, 6, generator=rng) > 0.5).double() * 2 - 1
    outputs = bits @ torch.randn(6, 50, generator=rng).double() + (bits[:, :1] * bits[:, 1:2]) * 2
    outputs = outputs + 0.3 * torch.randn(30, 50, generator=rng).double()
    return bits, outputs - outputs.mean(0)


def test_left_out_is_what_refitting_without_each_gives(data):
    conditions, outputs = data
    fitted = KernelRidge.fit(conditions, outputs @ outputs.T)
    slow = []
    for index in range(len(outputs)):
        rest = [other for other in range(len(outputs)) if other != index]
        kernel = rbf(conditions[rest], conditions[rest], fitted.length) + fitted.penalty * torch.eye(len(rest)).double()
        weights = rbf(conditions[index : index + 1], conditions[rest], fitted.length) @ torch.linalg.inv(kernel)
        slow.append(outputs[index] - (weights @ outputs[rest])[0])
    residuals = fitted.left_out() @ outputs
    assert torch.allclose(residuals, torch.stack(slow))
    assert fitted.error == pytest.approx(float(residuals.square().sum() / outputs.square().sum()))
    assert fitted.error < 0.5  # it learned something


def test_groups_are_left_out_together(data):
    conditions, outputs = data[0][:10].repeat(3, 1), data[1]
    fitted = KernelRidge.fit(conditions, outputs @ outputs.T, by_condition=True)
    slow = torch.empty_like(outputs)
    for condition in conditions.unique(dim=0):
        left = (conditions == condition).all(1)
        kernel = rbf(conditions[~left], conditions[~left], fitted.length)
        kernel = kernel + fitted.penalty * torch.eye(len(kernel)).double()
        weights = rbf(conditions[left], conditions[~left], fitted.length) @ torch.linalg.inv(kernel)
        slow[left] = outputs[left] - weights @ outputs[~left]
    assert torch.allclose(fitted.left_out() @ outputs, slow)
    assert fitted.error == pytest.approx(float(slow.square().sum() / outputs.square().sum()))


def test_the_prediction_is_scikit_learns(data):
    conditions, outputs = data
    fitted = KernelRidge.fit(conditions, outputs @ outputs.T)
    model = SklearnKernelRidge(alpha=fitted.penalty, kernel="rbf", gamma=1 / (2 * fitted.length**2))
    new = torch.tensor([[1.0, -1, 1, 1, -1, -1], [0.0, 0, 0, 0, 0, 0]]).double()
    expected = model.fit(conditions.numpy(), outputs.numpy()).predict(new.numpy())
    assert torch.allclose(fitted.kernel(new) @ fitted.inverse @ outputs, torch.from_numpy(expected))


def test_posterior_variance_is_the_textbooks(data):
    conditions, outputs = data
    fitted = KernelRidge.fit(conditions, outputs @ outputs.T)
    kernel = rbf(conditions, conditions, fitted.length) + fitted.penalty * torch.eye(30).double()
    new = conditions[:4]
    cross = rbf(new, conditions, fitted.length)
    expected = 1 + fitted.penalty - (cross @ torch.linalg.solve(kernel, cross.T)).diagonal()
    assert torch.allclose(fitted.variance(new), expected)
    assert torch.allclose(square_root(fitted.inverse) @ square_root(fitted.inverse), fitted.inverse)
    far = torch.full((1, 6), 1e3).double()
    assert float(fitted.variance(far)) == pytest.approx(1 + fitted.penalty)


def test_equal_conditions_have_no_distance_however_many_there_are():
    different = torch.randn(20, 7, generator=torch.Generator().manual_seed(0)).double()
    conditions = different.repeat(3, 1)  # the default of torch takes matrix products from 26 rows on
    assert torch.equal((exact_distances(conditions, conditions) == 0).sum(1), torch.full((60,), 3))
    unit = torch.tensor([(a - b).norm() for i, a in enumerate(different) for b in different[:i]]).median()
    fitted = KernelRidge.fit(conditions, torch.eye(60).double(), by_condition=True)
    assert min(abs(fitted.length / unit.item() - factor) for factor in LENGTHS) < 1e-9
