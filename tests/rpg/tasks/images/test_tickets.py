"""Lottery tickets: what pruning in turns keeps, and that dead weights stay dead."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rpg.labs.tickets.config import TicketsConfig
from rpg.labs.tickets.task import TicketsTask, cut_globally
from rpg.tasks import collecting, task_of
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.collecting import BASE
from tokenization.errors import InputError

CONFIG = TicketsConfig.model_validate({
    "rounds": 3, "kept": 0.5, "sparsity": 0.875,
    "family": {
        "network": "mlp-mini", "tasks": 9, "unseen": {"kind": "random", "num": 2}, "validation": 2, "group": 5,
        "base": {"steps": 4},
        "finetune": {"stages": [{"steps": 15}], "batch_size": 64, "augment": False},
    },
})  # fmt: skip


@pytest.fixture(scope="module")
def task():
    return TicketsTask(CONFIG)


@pytest.fixture(scope="module")
def zoo(task, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "num_cores", lambda: 1)
        return task.collect(tmp_path_factory.mktemp("tickets") / "zoo")


def test_a_zoo_keeps_the_order_of_pruning_and_the_start(task, zoo):
    assert isinstance(task_of(zoo), TaskFamily) and not isinstance(task, ImageTaskFamily)
    assert len(zoo) == 9 and sorted({entry.split for entry in zoo.entries}) == ["train", "unseen", "validation"]
    scores = zoo.state_dict(0)
    assert scores.keys() == {"linear1.weight", "linear2.weight", "linear3.weight"}
    values = torch.cat([each.flatten() for each in scores.values()])
    assert values.abs().max() < 1 and len(values.unique()) == len(values)
    start = load_file(zoo.path / BASE)
    assert start.keys() == task.family.build().state_dict().keys()
    assert all(torch.equal(value, task.start[name]) for name, value in start.items())


def test_a_ticket_is_what_pruning_by_hand_leaves(task, zoo):
    """The twin: a round at a time, with masks alone."""
    bits = task.family.bits()[:2]
    own = task.space.flatten(
        {name: torch.stack([zoo.state_dict(row)[name] for row in (0, 1)]) for name in zoo.state_dict(0)}
    )
    masks, num = torch.ones_like(own), own.shape[1]
    for number in (1, 2, 3):
        sizes = task.sizes(masks, bits)
        smallest = sizes.sort(1, descending=True).values[:, num - round((1 - 0.5**number) * num) - 1]
        masks = (sizes >= smallest[:, None]).float()
        assert torch.equal(masks, cut_globally(own, 1 - 0.5**number))


def test_dead_weights_stay_dead_and_the_others_train(task):
    bits = task.family.bits()[:3]
    rng = torch.Generator().manual_seed(0)
    masks = task.space.unflatten(cut_globally(torch.rand(3, task.space.size, generator=rng), 0.9))
    trained = task.train(masks, bits)
    for name, mask in masks.items():
        assert (trained[name][mask == 0] == 0).all()
        moved = (trained[name] - task.start[name])[mask == 1]
        assert (moved != 0).double().mean() > 0.5
    assert not torch.equal(trained["linear1.bias"][0], task.start["linear1.bias"])


def test_masks_without_zeros_are_plain_training(task):
    bits = task.family.bits()[:2]
    ones = {name: torch.ones(2, *value.shape) for name, value in task.build().named_parameters()}
    one_by_one = [
        task.accuracies({k: v[:1] for k, v in ones.items()}, bits[row : row + 1], "train", 0.0) for row in (0, 1)
    ]
    together = task.accuracies(ones, bits, "train", 0.0)
    assert torch.allclose(together, torch.cat(one_by_one), atol=0.01) and together.min() > 0.6


def test_masks_that_are_no_tickets(task, zoo):
    bits = task.family.bits()[[3, 7]]
    made = task.untrained(zoo, bits)
    own = zoo.state_dict(3)
    for name, value in made["shuffled"].items():
        assert torch.equal(value[0].flatten().sort().values, own[name].flatten().sort().values)
        assert not torch.equal(value[0], own[name])
    assert torch.equal(
        made["random"]["linear1.weight"][1], task.untrained(zoo, bits[1:])["random"]["linear1.weight"][0]
    )
    assert torch.equal(made["start_magnitude"]["linear1.weight"][1], task.start["linear1.weight"].abs())


def test_several_tickets_of_a_task_are_refused():
    with pytest.raises(ValidationError, match="one ticket"):
        TicketsConfig.model_validate({"family": {"copies": 2}})
    with pytest.raises(InputError, match="share of zeros"):
        cut_globally(torch.zeros(1, 4), 1.5)
