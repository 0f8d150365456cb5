from __future__ import annotations

import json

import pytest
import torch

from rpg.tasks import DigitsConfig, build_task
from tokenization.errors import InputError

LAST_NORMS = ("block2.norm2.*", "block2.norm3.*")


def collect(path, **changes):
    config = DigitsConfig(**{"network": "resnet-mini", "train_steps": 5, "steps": 3, "batch_size": 16, **changes})
    return build_task(config).collect(path)


def test_only_the_named_parameters_change_in_fine_tuning(tmp_path):
    zoo = collect(tmp_path / "zoo", finetune=LAST_NORMS)
    first, last = zoo.state_dict(0), zoo.state_dict(2)
    changed = {name for name in first if first[name].is_floating_point() and not torch.equal(first[name], last[name])}
    assert changed == {f"block2.{norm}.{kind}" for norm in ("norm2", "norm3") for kind in ("weight", "bias")}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_other_optimizers_train_other_networks(tmp_path, optimizer):
    other = collect(tmp_path / "other", optimizer=optimizer).state_dict(0)
    assert not torch.equal(other["conv1.weight"], collect(tmp_path / "adamw").state_dict(0)["conv1.weight"])


def test_a_pattern_that_names_nothing_is_the_users_mistake(tmp_path):
    with pytest.raises(InputError, match=r"task.finetune has 'norm9"):
        collect(tmp_path / "zoo", finetune=("norm9",))


def test_a_zoo_of_an_earlier_version_is_completed(tmp_path):
    zoo = collect(tmp_path / "zoo", steps=1)
    record = json.loads((zoo.path / "zoo.json").read_text())
    for field in ("optimizer", "finetune"):
        del record["task"][field]
    (zoo.path / "zoo.json").write_text(json.dumps(record))
    assert len(collect(tmp_path / "zoo", steps=1)) == 1
