from __future__ import annotations

import pytest
import torch

from rpg.evaluation.report import accuracy, summarize


def test_accuracy_by_hand():
    predictions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0], [3, 2, 1, 0]])
    assert accuracy(predictions, torch.tensor([0, 1, 2, 0])).tolist() == [0.75, 0.5, 0.25]


def test_summary_by_hand():
    summary = summarize([0.2, 0.4, 0.9])
    assert (summary.mean, summary.max, summary.min) == (pytest.approx(0.5), 0.9, 0.2)
    assert summary.std == pytest.approx((0.13) ** 0.5)
    assert 0.2 <= summary.ci95[0] < 0.5 < summary.ci95[1] <= 0.9


def test_one_network_has_no_spread():
    summary = summarize(torch.tensor([0.7], dtype=torch.float64))
    assert summary.std == 0 and summary.ci95 == (0.7, 0.7)


def test_bootstrap_interval_agrees_with_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = summarize(values).ci95
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.15 * half)


def test_same_seed_same_interval():
    values = torch.rand(20, dtype=torch.float64)
    assert summarize(values, seed=1) == summarize(values, seed=1) != summarize(values, seed=2)
