"""Scores of sets of networks, by closed forms."""

import math

import pytest
import torch

from rpg.evaluation.two_sample import calibration_error, ensemble_metrics, joint_score, sets_of_networks


def test_the_joint_score_of_one_network_is_its_negative_log_likelihood():
    log_p = torch.rand(3, 1, 50, dtype=torch.float64).log()
    assert torch.allclose(joint_score(log_p), -log_p.mean((1, 2)))


def test_a_set_that_holds_the_right_network_pays_only_for_finding_it():
    # One of 64 networks gives every right answer 0.9; the others are hopeless: -log 0.9 + log 64 / 500 an example.
    log_p = torch.full((1, 64, 500), 0.01).log()
    log_p[0, 17] = math.log(0.9)
    assert joint_score(log_p).item() == pytest.approx(-math.log(0.9) + math.log(64) / 500, abs=1e-6)


def test_the_joint_score_tells_two_consistent_networks_from_two_undecided_ones():
    # Two modes: each network is sure of one of two opposite readings, or both hedge. Averages of answers are the same.
    readings = torch.tensor([[[0.99, 0.01]] * 10, [[0.01, 0.99]] * 10])[None]  # [1, 2, 10, 2]
    hedging = torch.full((1, 2, 10, 2), 0.5)
    targets = torch.zeros(1, 10, dtype=torch.long)
    sure, undecided = ensemble_metrics(readings, targets), ensemble_metrics(hedging, targets)
    assert sure["nll"].item() == pytest.approx(undecided["nll"].item(), abs=1e-6)
    assert sure["joint"].item() == pytest.approx((-10 * math.log(0.99) + math.log(2)) / 10, abs=1e-4)
    assert undecided["joint"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_calibration_error_is_the_gap_of_confidence_and_accuracy():
    confident = torch.tensor([0.8, 0.2]).repeat(10, 1)
    targets = torch.tensor([0] * 5 + [1] * 5)  # says 0.8, is right half the time
    assert calibration_error(confident, targets) == pytest.approx(0.3)
    assert calibration_error(torch.eye(2).repeat(5, 1), torch.tensor([0, 1] * 5)) == 0.0


def test_accuracies_of_an_ensemble_and_of_its_members():
    # On two examples the members are right on one each, with more confidence where they are right.
    members = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]])[None]
    targets = torch.tensor([[0, 1]])
    found = {name: values.item() for name, values in ensemble_metrics(members, targets).items()}
    assert (found["accuracy"], found["network_accuracy"], found["best_accuracy"]) == (1.0, 0.5, 0.5)
    kind = sets_of_networks(members, targets, sizes=(1, 2, 64))
    assert list(kind.joint["accuracy"]) == [1, 2] and kind.joint["accuracy"][1] == 0.5
    assert kind.joint["joint"][2] == pytest.approx(kind.metrics["joint"][0])
