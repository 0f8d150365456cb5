import subprocess
import sys
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


def test_a_configuration_imports_no_task():
    """Reading a configuration, or a generator, must not cost the import of what trains networks."""
    code = "import sys, rpg.config; print([m for m in sys.modules if m.startswith('rpg.tasks.')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for module in (
        *(each.task for each in TASKS.values()),
        "rpg.tasks.images.training",
        "rpg.tasks.language.adapter_bank",
    ):
        assert repr(module.partition(":")[0]) not in found
