"""Measures a trained generator's errors on validation tasks by their distance from the training tasks."""

from __future__ import annotations

from typing import Any

import torch

from rpg.devices import single_threaded
from rpg.generation.generator import Generator
from rpg.generation.known_range import KnownRange, condition_codes
from rpg.seeding import make_rng
from rpg.tasks import task_of
from rpg.tasks.base import TaskFamily, TaskSimulator
from rpg.tasks.side_by_side import stack
from rpg.training.data import training_entries, zoo_conditions
from rpg.training.requests import Descriptions, example_conditions
from tokenization.zoo.zoo import Zoo

NUM_FRESH = 200
"""Validation tasks that are drawn beside the zoo's, where the training drew its own."""

NUM_SETS = 5
"""Sets of examples of every validation task."""


def measure_known_range(generator: Generator, zoo: Zoo) -> KnownRange | None:
    """Generate for validation tasks and score on validation images.

    None if conditions have no distances, or there are no validation tasks that were kept out of training.
    """
    config, spec = generator.config, generator.condition
    held_out = zoo.subset("validation") if "validation" not in config.train.splits else []
    measured = spec is not None and (spec.settings or spec.kind == "examples" or config.model.condition.phrases)
    if spec is None or not measured or not held_out or zoo.condition is None:
        return None
    task = task_of(zoo, config.task)
    if not isinstance(task, TaskFamily):
        return None
    rng = make_rng(config.seed, "known range")
    seen, tasks = zoo_conditions(zoo, training_entries(zoo, config.train.splits)), zoo_conditions(zoo, held_out)
    if config.train.draws_tasks and isinstance(task, TaskSimulator):
        tasks = torch.cat([tasks, task.draw_tasks(NUM_FRESH, rng)])
    examples = example_conditions(zoo, config.model.condition)
    requests: Any = tasks
    if examples is None:
        shown, asked = zoo.condition.inputs(seen), zoo.condition.inputs(tasks)
    else:
        tasks = tasks.repeat(NUM_SETS, 1) if len(tasks) < NUM_FRESH else tasks
        if isinstance(examples, Descriptions):
            texts = examples.describe(tasks, rng, "validation")
            shown, asked = (examples.table.conditions_of(each) for each in (spec.names, texts))
            requests = texts
        else:
            shown, asked = examples.draw(seen, rng), examples.draw(tasks, rng)
            requests = asked.unflatten(1, (-1, spec.size))
    with single_threaded():
        networks = stack(list(generator.one_by_one(len(tasks), seed=config.seed, condition=requests)))
        errors = 1 - task.accuracies(networks, tasks, "validation")
        known, wanted = (condition_codes(generator.network, spec, each) for each in (shown, asked))
    return None if known is None or wanted is None else KnownRange.measured(known[:, 0], wanted, errors)
