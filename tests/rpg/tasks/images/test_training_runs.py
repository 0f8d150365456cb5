import pytest
import torch
import torch.nn.functional as F

from rpg.labs.training_runs.config import TrainingRunsConfig
from rpg.labs.training_runs.task import TrainingRunsTask
from rpg.section import validated
from rpg.tasks.side_by_side import unstack
from tokenization.errors import InputError


def build(**changes) -> TrainingRunsTask:
    fields = {"runs": 3, "validation": 1, "unseen": 2, "steps": (0, 1, 4), "hidden": 4, "group": 4, **changes}
    return TrainingRunsTask(TrainingRunsConfig(**fields))


def test_runs_side_by_side_are_plain_gradient_descent():
    task = build()
    start = task.first_weights([0, 5])
    trained = unstack(task.train(start, "sgd", 0.2, [0, 1, 4])[4])[1]
    network = task.build()
    network.load_state_dict(unstack(start)[1])
    optimizer = torch.optim.SGD(network.parameters(), 0.2, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(network(task.images("train")), task.labels("train")).backward()
        optimizer.step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-5, rtol=1e-4)


def test_a_zoo_has_every_stage_of_every_run_with_its_metrics(tmp_path):
    task = build()
    zoo = task.collect(tmp_path / "zoo", limit=4)
    assert len(zoo) == 4 * 3
    zoo = task.collect(tmp_path / "zoo")
    assert [entry.step for entry in zoo.entries if entry.run == 2] == [0, 1, 4]
    assert len(zoo) == 6 * 3 and [len(zoo.subset(split)) for split in ("train", "validation", "unseen")] == [9, 3, 6]
    entry, state_dict = zoo.entries[7], zoo.state_dict(7)
    network = task.build()
    network.load_state_dict(state_dict)
    for split, prefix in (("train", ""), ("validation", "validation_")):
        logits = network(task.images(split))
        loss = F.cross_entropy(logits, task.labels(split)).item()
        assert entry.metrics[f"{prefix}loss"] == pytest.approx(loss, rel=1e-4)
        right = (task.predict([state_dict], split)[0] == task.labels(split)).double().mean().item()
        assert entry.metrics[f"{prefix}accuracy"] == pytest.approx(right)
    # a run is its own, whatever is trained beside it
    alone = task.train(task.first_weights([entry.run]), "sgd", task.config.learning_rate, [0, 1, 4])
    for name, value in unstack(alone[entry.step])[0].items():
        torch.testing.assert_close(state_dict[name], value, atol=1e-5, rtol=1e-4)


def test_steps_ascend_from_0():
    with pytest.raises(InputError, match="ascending from 0"):
        validated(TrainingRunsConfig, {"steps": [1, 5]}, "test")


def test_divergences_are_of_each_network_from_its_own_original():
    task = build()
    weights, originals = task.first_weights([0, 1]), task.train(task.first_weights([2, 3]), "sgd", 0.2, [9])[9]
    images = task.images("train")
    found = task.divergences(weights, originals, len(images), torch.Generator())
    for row in range(2):
        logits = []
        for each in (weights, originals):
            network = task.build()
            network.load_state_dict(unstack(each)[row])
            logits.append(network(images).softmax(-1))
        expected = (logits[1] * (logits[1] / logits[0]).log()).sum(-1).mean()
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)
    same = task.divergences(originals, originals, 50, torch.Generator(), noise=0.5)
    torch.testing.assert_close(same, torch.zeros(2), atol=1e-6, rtol=0)
    few = [task.divergences(weights, originals, 50, torch.Generator().manual_seed(0), noise=n) for n in (0.0, 0.5)]
    assert not torch.equal(*few)
