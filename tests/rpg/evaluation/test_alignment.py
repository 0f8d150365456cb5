from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rpg.config import Config, ControlConfig
from rpg.evaluation.matching import align_zoo, permute
from rpg.evaluation.permutations import symmetries
from rpg.evaluation.starts import finetune, finetuned_baselines
from rpg.experiments.single import collect
from rpg.tasks import DigitsConfig, build_task, task_of
from tests.rpg.evaluation.test_matching import random_orders
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    """A zoo of three runs: one training run, and twice the same run with its units in another order."""
    folder = tmp_path_factory.mktemp("zoos")
    config = DigitsConfig(network="mlp-mini", train_steps=150, steps=2, batch_size=64)
    task = build_task(config)
    run = task.collect(folder / "run")
    zoo = Zoo.create(folder / "zoo", task=config.model_dump(mode="json"))
    groups = symmetries(task)
    for number in range(3):
        orders = random_orders(groups, torch.Generator().manual_seed(number))
        for index, entry in enumerate(run.entries):
            network = permute(run.state_dict(index), groups, orders) if number else run.state_dict(index)
            zoo.append(network, run=number, step=entry.step, metrics=entry.metrics)
    return zoo


def test_alignment_undoes_the_runs_own_orders_and_changes_no_answer(shuffled, tmp_path):
    aligned = align_zoo(shuffled, task_of(shuffled), tmp_path / "aligned")
    assert [(e.run, e.step, e.metrics) for e in aligned.entries] == [
        (e.run, e.step, e.metrics) for e in shuffled.entries
    ]
    assert aligned.task == shuffled.task
    task = task_of(shuffled)
    before, after = ([zoo.state_dict(index) for index in range(6)] for zoo in (shuffled, aligned))
    assert torch.equal(task.predict(before), task.predict(after))
    for step in range(2):
        for run in (1, 2):
            assert not torch.equal(before[step]["linear1.weight"], before[2 * run + step]["linear1.weight"])
            assert all(torch.equal(after[step][name], after[2 * run + step][name]) for name in after[step])


def test_what_is_called_aligned_is_not_collected_as_it_comes(tmp_path):
    task = {"name": "digits", "network": "mlp-mini", "train_steps": 20, "steps": 2, "batch_size": 16, "runs": 2}
    config = Config.parse({"task": task, "zoo": str(tmp_path / "zoo-aligned")}, "test")
    with pytest.raises(InputError, match="rpg align") as caught:
        collect(config)
    zoo = re.search(r"--set zoo=(\S+), then `rpg align \1 (\S+)`", str(caught.value))
    assert zoo is not None and zoo[2] == config.zoo and not Path(config.zoo).exists()
    made = collect(config.model_copy(update={"zoo": zoo[1]}))
    aligned = align_zoo(made, task_of(made), Path(zoo[2]))
    assert collect(config).digest() == aligned.digest()


def test_alignment_overwrites_no_zoo_and_needs_symmetries(shuffled, tmp_path):
    with pytest.raises(InputError):
        align_zoo(shuffled, task_of(shuffled), shuffled.path)
    plain = Zoo.create(tmp_path / "plain")
    plain.append({"w": torch.ones(3)}, run=0, step=1)
    with pytest.raises(InputError, match="task"):
        align_zoo(plain, task_of(plain), tmp_path / "aligned")


def test_the_control_trains_copies_of_the_baselines(shuffled):
    task = task_of(shuffled)
    originals = [shuffled.state_dict(index) for index in range(2)]
    rng = torch.Generator().manual_seed(0)
    noisy = [
        {name: value + 0.5 * value.std() * torch.randn(value.shape, generator=rng) for name, value in each.items()}
        for each in (originals[0], originals[1], originals[0])
    ]
    kept = [{name: value.clone() for name, value in network.items()} for network in noisy]
    made = finetuned_baselines(task, {"noise": noisy}, ControlConfig(steps=(0, 30), learning_rate=3e-3), seed=0)
    assert set(made) == {"0_steps_from_noise", "30_steps_from_noise"}
    assert all(torch.equal(a[n], b[n]) for a, b in zip(made["0_steps_from_noise"], kept, strict=True) for n in a)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(noisy, kept, strict=True) for n in a)  # no source was changed
    accuracy = {name: float((task.predict(each) == task.labels()).double().mean()) for name, each in made.items()}
    assert accuracy["30_steps_from_noise"] > accuracy["0_steps_from_noise"] + 0.02


def test_a_network_of_the_control_does_not_depend_on_the_others(shuffled):
    task, config = task_of(shuffled), ControlConfig()
    originals = [shuffled.state_dict(index) for index in range(2)]
    alone, together = (
        finetune(task, originals[:num], 5, config, torch.Generator().manual_seed(0))[0] for num in (1, 2)
    )
    assert all(torch.allclose(alone[name], together[name], atol=1e-4) for name in alone)
