from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from rpg.evaluation.task_networks import (
    LEARNING_RATES,
    LinearHead,
    LinearHeadTraining,
    fit_linear_head,
    tune_linear_head,
)
from rpg.seeding import derive_seed
from rpg.tasks.class_splits import all_tasks
from rpg.tasks.side_by_side import SideBySide

CLASSES = 5
TRAINING = LinearHeadTraining(steps=100, batch_size=8, images=64)


class Corners:
    """Images are noisy corners of a cube, one corner a class; the target network has a body and two logits."""

    def __init__(self) -> None:
        self.corners = 2 * all_tasks(CLASSES)[:CLASSES].float() - 1
        self.side = SideBySide(self.build())

    def network(self, outputs: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(CLASSES, 8), nn.Tanh(), nn.Linear(8, outputs))

    def build(self) -> nn.Module:
        return self.network(2)

    def draw(self, num: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        classes = torch.randint(CLASSES, (num,), generator=rng)
        return self.corners[classes] + 0.3 * torch.randn(num, CLASSES, generator=rng), classes

    def behaviour_losses(self, weights, conditions, num_images, rng, teacher=None):
        images, classes = self.draw(num_images, rng)
        logits = self.side(weights, images)
        targets = conditions[:, classes]
        if teacher is not None:
            targets = conditions @ teacher(images).T
        return F.binary_cross_entropy_with_logits(logits[..., 1] - logits[..., 0], targets, reduction="none").mean(1)

    def accuracies(self, weights, bits, split):
        images, classes = self.draw(200, torch.Generator().manual_seed(derive_seed(split)))
        return (self.side.predict(weights, images).argmax(-1) == bits[:, classes]).double().mean(1)


def test_the_head_starts_as_the_signed_sum_of_the_bases_logits():
    task, bits = Corners(), all_tasks(CLASSES)
    base = task.network(CLASSES)
    images = torch.randn(5, CLASSES)
    with torch.no_grad():
        logits = task.side(LinearHead(base.state_dict(), task.build().state_dict())(bits), images)
        expected = (2.0 * bits - 1) @ base(images).T
    torch.testing.assert_close(logits[..., 1] - logits[..., 0], expected)


def test_the_weights_are_one_body_and_a_head_affine_in_the_bits():
    task = Corners()
    model = fit_linear_head(task, task.network(CLASSES).state_dict(), all_tasks(CLASSES), 1e-2, TRAINING)
    bits = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        weights = model(bits)
    assert set(weights) == set(task.build().state_dict())
    for name in ("0.weight", "0.bias"):
        assert all(torch.equal(weights[name][0], each) for each in weights[name])
    none, first, second, both = weights["2.weight"]
    torch.testing.assert_close(first + second - none, both)
    assert not torch.equal(none, both)


def test_unseen_tasks_are_learned_from_seen_ones_and_the_choice_looks_at_validation_alone():
    task, bits = Corners(), all_tasks(CLASSES)
    base = task.network(CLASSES).state_dict()
    train, validation, unseen = bits[::3], bits[1::3], bits[2::3]
    model, rate, accuracy = tune_linear_head(task, base, train, validation, torch.cat([train, validation]), TRAINING)
    tried = {}
    for each in LEARNING_RATES:
        trial = fit_linear_head(task, base, train, each, TRAINING)
        with torch.no_grad():
            weights = trial(validation)
        tried[each] = task.accuracies(weights, validation, "validation").mean().item()
    assert rate == max(tried, key=lambda each: tried[each]) and accuracy == tried[rate]
    with torch.no_grad():
        start = task.accuracies(LinearHead(base, task.build().state_dict())(unseen), unseen, "test").mean()
        assert task.accuracies(model(unseen), unseen, "test").mean() > max(0.95, start)


def test_a_teacher_takes_the_labels_place():
    task, bits = Corners(), all_tasks(CLASSES)
    base = task.network(CLASSES).state_dict()
    wrong = LinearHeadTraining(60, 8, 64, teacher=lambda images: (-images @ task.corners.T).softmax(-1))
    model = fit_linear_head(task, base, bits, 3e-2, wrong)
    with torch.no_grad():
        answers = model(bits)
    assert task.accuracies(answers, bits, "test").mean() < 0.5
