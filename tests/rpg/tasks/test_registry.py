from typing import get_args

import pytest

from rpg.tasks import DigitsConfig, TaskConfig, build_task
from rpg.tasks.config import TASKS
from tokenization.errors import InputError


def test_every_configuration_has_its_task():
    members = get_args(get_args(TaskConfig)[0])
    assert {member.model_fields["name"].default for member in members} == set(TASKS)


def test_a_task_is_built_from_plain_values_as_from_its_configuration():
    built = build_task({"name": "digits", "network": "vit", "runs": 3})
    assert built.config == DigitsConfig(network="vit", runs=3)
    assert built.config.train_steps == 1500  # this network's own recipe


def test_faults_name_the_field():
    with pytest.raises(InputError, match=r"task\.name 'digit' is not a task"):
        build_task({"name": "digit"})
    with pytest.raises(InputError, match=r"task\.finetune\.stages\.0\.steps"):
        build_task({"name": "digits_subsets", "finetune": {"stages": [{"steps": 0}]}})
