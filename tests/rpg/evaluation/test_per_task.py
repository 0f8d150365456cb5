from __future__ import annotations

import math

import pytest
import torch

from rpg.evaluation.two_sample import measure_per_task, rows_of_tasks, scores_of_sets

BITS = torch.tensor([[0, 1], [1, 1], [1, 0]]).repeat(2, 1)  # two originals for each of three tasks


class PlantedFamily:
    """Tasks whose right answer is always 0."""

    def targets(self, conditions, split):
        return torch.zeros(len(conditions), 4, dtype=torch.long)


def planted(*rows: list[float]) -> torch.Tensor:
    return probabilities(torch.tensor(rows))


def probabilities(wrong: torch.Tensor) -> torch.Tensor:
    return torch.stack([1 - wrong, wrong], -1)


def test_rows_are_those_of_one_task():
    assert rows_of_tasks(BITS[:3]) is None
    rows = rows_of_tasks(BITS)
    assert rows.shape == (3, 2) and all(len(BITS[each].unique(dim=0)) == 1 for each in rows)
    uneven = torch.cat([BITS, BITS[:1], torch.tensor([[0, 0]])])  # one task has three, another a single one
    assert rows_of_tasks(uneven).shape == (3, 2)


def test_figures_by_hand():
    a, b, c = [0.9, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.1, 0.9]
    networks = {
        "original": planted(a, a, a, b, b, b),  # one error in common of two
        "generated": planted(a, a, c, c, c, a),  # nothing in common, but in the last
        "kernel_ridge": planted(a, a, a, a, a, a),
    }
    result = measure_per_task(PlantedFamily(), networks, BITS)
    assert (result["num_tasks"], result["networks_per_task"]) == (3, 2)
    figures = result["methods"]
    assert figures["original"]["error_iou"] == pytest.approx(0.5)
    assert figures["generated"]["error_iou"] == pytest.approx(0.0) and figures["kernel_ridge"]["error_iou"] == 1.0
    assert figures["original"]["accuracy"]["mean"] == pytest.approx((0.75 + 0.5) / 2)
    assert figures["generated"]["accuracy"]["mean"] == pytest.approx(0.75)
    assert figures["original"]["nearest_neighbour_accuracy"] is None
    assert 0 <= figures["generated"]["nearest_neighbour_accuracy"] <= 1
    # twice one network: it is the nearest of one original of two, and is that one
    assert figures["kernel_ridge"]["coverage"] == 0.5 and figures["original"]["coverage"] is None
    assert figures["kernel_ridge"]["nearest"] == 0.0 < figures["generated"]["nearest"]
    assert measure_per_task(PlantedFamily(), networks, BITS + torch.arange(6)[:, None]) is None


def test_sets_of_a_tasks_networks_are_scored_together():
    a, b = [0.95, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]  # one network is wrong on the first image, the other on none
    found = scores_of_sets(PlantedFamily(), {"original": planted(a, a, a, b, b, b)}, BITS)["original"]
    assert found["accuracy"] == {
        1: pytest.approx(0.75),
        2: pytest.approx(0.75),
    }  # 0.5 is no majority for the right answer
    right = 0.5 * (0.05 + 0.9) * 0.9**3  # mean of the products over all images
    assert found["joint"][2] == pytest.approx(-math.log(right) / 4, abs=1e-4)
    assert found["nll"][2] == pytest.approx(-(math.log(0.475) + 3 * math.log(0.9)) / 4, abs=1e-4)
    alone = scores_of_sets(PlantedFamily(), {"original": planted(a, a, b)}, torch.arange(3)[:, None])["original"]
    assert list(alone["joint"]) == [1] and alone["joint"][1] == pytest.approx(alone["nll"][1])


def test_networks_like_the_originals_pass_and_one_network_for_each_task_does_not():
    stream = torch.Generator().manual_seed(0)
    bits = torch.arange(200)[:, None].repeat(4, 1)
    draws = [torch.rand(800, 4, generator=stream) for _ in range(2)]
    networks = {"original": probabilities(draws[0]), "generated": probabilities(draws[1])}
    networks["kernel_ridge"] = probabilities(torch.full((800, 4), 0.5))
    figures = measure_per_task(PlantedFamily(), networks, bits)["methods"]
    assert figures["generated"]["nearest_neighbour_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert figures["kernel_ridge"]["nearest_neighbour_accuracy"] > 0.6
    assert figures["generated"]["error_iou"] == pytest.approx(figures["original"]["error_iou"], abs=0.05)
