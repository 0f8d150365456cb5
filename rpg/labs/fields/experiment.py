"""The experiment on neural fields: fit, train, generate, compare in function space, draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.field_measures import DISTANCES, class_judge, letter_features, measure_samples, shown_by
from rpg.evaluation.page.page import Page
from rpg.evaluation.report import Report, networks
from rpg.evaluation.span import FlatSpace
from rpg.experiments.driver import Experiment
from rpg.experiments.evaluating import judges
from rpg.experiments.single import stacked_networks, tasks_scored
from rpg.generation.generator import Generator
from rpg.labs.fields.baselines import VALUES, baseline_configs, grid_zoo, trivial_weights, write_grid_zoo
from rpg.labs.fields.data import alter
from rpg.labs.fields.pictures import PICTURES, draw_pictures, learned_originals
from rpg.labs.fields.task import FieldsTask
from rpg.seeding import make_rng
from rpg.tasks import require_task
from rpg.tasks.collecting import single_threaded
from rpg.tasks.processes import spawned
from rpg.tasks.side_by_side import Stacked, stack
from rpg.training.loop import train_to_the_end
from tokenization.checkpoint.progress import steps
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

NUM_SETS = 5
"""Number of generated sets of fields, and of each baseline's, over which metrics are averaged."""

JUDGE_COPIES = 2
"""Altered copies per datum on which the class judge is trained."""

BETTER: dict[str, Literal["more", "less"]] = {
    "one_nna": "less", "coverage": "more", "mmd": "less", "precision": "more", "recall": "more", "frechet": "less",
    "class_accuracy": "more", "nearest": "more",
}  # fmt: skip
"""Measures of generated data; the first, 1-NNA, is 0.5 if they are indistinguishable from real data."""


def experiment(_: Config) -> Experiment:
    """The experiment that `rpg run` performs for a configuration."""
    return Experiment("fields", evaluate_fields, train_with_baselines, "rpg render {run}/generated/*.safetensors")


def fields_task(config: Config) -> FieldsTask:
    """The task of a configuration. Raises InputError if it is not ``fields``."""
    return require_task(config.task, FieldsTask, "but this is the experiment on fields; set task.name to fields")


def train_with_baselines(config: Config, **_: Any) -> None:
    """Train the generator and the trained baselines, two at a time."""
    write_grid_zoo(fields_task(config), Zoo.open(config.zoo), Path(grid_zoo(config)))
    configs = [config, *baseline_configs(config).values()]
    # The longest first; each on a thread of its own, which two cores bear better than two threads each.
    with spawned(min(2, len(configs))) as pool:
        list(steps("training", pool.map(_train, configs), len(configs), after=0))


@single_threaded()
def _train(config: Config) -> None:
    train_to_the_end(config, overwrite=True)


@judges
def evaluate_fields(generator: Generator, zoo: Zoo, *, run: Path, seed: int, split: str) -> tuple[Report, Page]:
    """Generate one field of the class of each held-out datum, and compare; nothing is tuned here.

    Training data are the report's originals.
    """
    config, task = generator.config, fields_task(generator.config)
    data, compared = task.data, DISTANCES[task.config.dimensions]
    rows = torch.tensor([i for i, each in enumerate(data.splits) if each == tasks_scored(split)])
    real, wanted = shown_by(data.values[rows]), data.labels[rows]  # [N, F], [N]
    learned = learned_originals(zoo, config)
    fields = stacked_networks(zoo, learned)
    training = shown_by(task.sample_stacked(fields, data.size))  # [T, F]
    features = letter_features(data.size, data.values.shape[1]) if task.config.dimensions == 2 else None
    judge = class_judge(*_judged(task, config))

    def accuracy(samples: Tensor) -> float:
        return (judge(samples) == wanted).double().mean().item()

    labels = data.labels[[zoo.entries[i].run for i in learned]]
    samples = _generated(run, generator, task, wanted, seed)
    samples |= simple_samples(task, fields, labels, training, wanted, seed)
    kinds = {}
    for name, sets in samples.items():
        if len(sets[0]) != len(wanted):
            raise InputError(f"there are fewer training data than held-out ones ({name}); hold fewer out")
        found = measure_samples(sets, real, training, features, compared)
        found["class_accuracy"] = sum(map(accuracy, sets)) / len(sets)
        kinds[name] = networks({metric: [value] for metric, value in found.items()})
    nearest = compared(real, training).amin(1).median().item()
    kinds["held_out"] = networks({"class_accuracy": [accuracy(real)], "nearest": [nearest]}, count=len(real))
    report = Report(
        experiment="fields", judge=f"beside {len(real)} held-out data, means of {NUM_SETS} sets", split=split,
        seed=seed, better={name: each for name, each in BETTER.items() if name in kinds["generated"].metrics},
        kinds=kinds, facts={"training_seconds": generator.facts.get("training seconds")},
    )  # fmt: skip
    if split != "validation":
        draw_pictures(run, generator, task, zoo, seed)
    shown = {name.capitalize(): path for name in PICTURES if (path := run / f"{name}.png").is_file()}
    return report, Page(f"Generated fields: {run.name}", pictures=shown)


def _judged(task: FieldsTask, config: Config) -> tuple[Tensor, Tensor]:
    """Training data of the class judge: data of the training splits, and altered copies."""
    rows = torch.tensor([i for i, split in enumerate(task.data.splits) if split in config.train.splits])
    values, labels = task.data.values[rows], task.data.labels[rows]
    copies = range(min(task.config.altered, JUDGE_COPIES) + 1)
    altered = [alter(values, task.config, copy) if copy else values for copy in copies]
    return shown_by(torch.cat(altered)), labels.repeat(len(copies))


def _generated(run: Path, generator: Generator, task: FieldsTask, wanted: Tensor, seed: int) -> dict[str, list[Tensor]]:
    """Values ``[N, F]`` of what the generator and the trained baselines make, if these exist, set by set."""
    others = {name: run / name for name in baseline_configs(generator.config) if (run / name / "generator").is_dir()}
    found: dict[str, list[Tensor]] = {}
    for name, folder in {"generated": None, **others}.items():
        source = generator if folder is None else Generator.from_pretrained(folder)
        condition = wanted[:, None].float() if source.condition is not None else None
        for number in range(NUM_SETS):
            made = stack(source.generate(len(wanted), seed=seed + number, condition=condition))  # type: ignore[arg-type]
            values = made[VALUES] if VALUES in made else task.sample_stacked(made, task.data.size)
            found.setdefault(name, []).append(shown_by(values))
    return found


def simple_samples(
    task: FieldsTask, fields: Stacked, labels: Tensor, training: Tensor, wanted: Tensor, seed: int
) -> dict[str, list[Tensor]]:
    """Values ``[N, F]`` of fields that need no generator, of classes ``[N]``, set by set; training data by chance.

    Args:
        fields: those that were learned from, and their ``labels`` ``[T]``.
        training: what they show, ``[T, F]``.
    """
    rng, space = make_rng(seed, "trivial"), FlatSpace(fields)
    found: dict[str, list[Tensor]] = {}
    for _ in range(NUM_SETS):
        for name, weights in trivial_weights(space.flatten(fields), labels, wanted, rng).items():
            values = shown_by(task.sample_stacked(space.unflatten(weights), task.data.size))
            found.setdefault(name, []).append(values)
        others = torch.randperm(len(training), generator=rng)[: len(wanted)]
        found.setdefault("original", []).append(training[others])
    return found
