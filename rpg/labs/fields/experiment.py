"""The experiment on neural fields: fit, train, generate, compare in function space, draw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rpg.config import Config
from rpg.devices import single_threaded
from rpg.evaluation.field_measures import (
    DISTANCES,
    class_judge,
    letter_features,
    measure_samples,
    shown_by,
)
from rpg.evaluation.page.page import Page, write_report
from rpg.evaluation.report import Report, networks
from rpg.evaluation.span import FlatSpace
from rpg.experiments.driver import Experiment
from rpg.experiments.single import existing, require_for_choices
from rpg.generation.generator import Generator
from rpg.labs.fields.baselines import VALUES, baseline_configs, grid_zoo, trivial_weights, write_grid_zoo
from rpg.labs.fields.data import alter
from rpg.labs.fields.pictures import PICTURES, draw_pictures, learned_originals
from rpg.labs.fields.task import FieldsTask
from rpg.seeding import make_rng
from rpg.tasks import require_task
from rpg.tasks.processes import spawned
from rpg.tasks.side_by_side import stack
from rpg.training.loop import train_to_the_end
from tokenization.checkpoint.progress import steps
from tokenization.errors import InputError
from tokenization.zoo.locks import locks
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


@dataclass(frozen=True)
class Reference:
    """Reference data for the comparison, as vectors of values on the data's grid."""

    training: Tensor  # values of the training fields, [T, F]
    weights: Tensor  # of them, [T, P]
    labels: Tensor  # their classes, [T]
    held_out: Tensor  # data that no generator was trained on, [N, F]
    wanted: Tensor  # their classes [N], which generators are conditioned on


@single_threaded()
@locks(lambda run, split="test", **_: None if split == "validation" else existing(run))
def evaluate_fields(run: Path | str, *, split: str = "test", seed: int = 0, **_: Any) -> Report:
    """Generate one field of the class of each held-out datum, and compare; nothing is tuned here.

    Training data are the report's originals.
    """
    run = Path(run)
    generator = Generator.from_pretrained(run)
    config, zoo = generator.config, Zoo.open(generator.config.zoo)
    task = fields_task(config)
    reference = _reference(task, zoo, config, "validation" if split == "validation" else "unseen")
    channels, size = task.data.values.shape[1:3]
    judge = class_judge(*_judged(task, config))
    dimensions = task.config.dimensions
    measure = partial(
        measure_samples,
        held_out=reference.held_out,
        training=reference.training,
        features=letter_features(size, channels) if dimensions == 2 else None,
        distances=DISTANCES[dimensions],
    )
    kinds, real = {}, reference.held_out
    for name, sets in _samples(run, generator, task, zoo, reference, seed).items():
        right = [(judge(each) == reference.wanted).double().mean().item() for each in sets]
        found = {**measure(sets), "class_accuracy": sum(right) / len(right)}
        kinds[name] = networks({metric: [value] for metric, value in found.items()})
    nearest = DISTANCES[dimensions](real, reference.training).amin(1).median().item()
    right = [(judge(real) == reference.wanted).double().mean().item()]
    kinds["held_out"] = networks({"class_accuracy": right, "nearest": [nearest]}, count=len(real))
    report = Report(
        experiment="fields", judge=f"beside {len(real)} held-out data, means of {NUM_SETS} sets", split=split,
        seed=seed, better={name: each for name, each in BETTER.items() if name in kinds["generated"].metrics},
        kinds=kinds, facts={"training_seconds": generator.facts.get("training seconds")},
    )  # fmt: skip
    if split != "validation":
        draw_pictures(run, generator, task, zoo, seed)
        shown = {name.capitalize(): path for name in PICTURES if (path := run / f"{name}.png").is_file()}
        write_report(run, report, Page(f"Generated fields: {run.name}", pictures=shown))
    return report


def _reference(task: FieldsTask, zoo: Zoo, config: Config, split: str) -> Reference:
    data = task.data
    require_for_choices(config, split)
    learned = learned_originals(zoo, config)
    fields = [zoo.state_dict(i) for i in learned]
    weights = stack(fields)
    held_out = torch.tensor([i for i, each in enumerate(data.splits) if each == split])
    return Reference(
        training=shown_by(task.sample(fields, data.size)),
        weights=FlatSpace(weights).flatten(weights),
        labels=torch.tensor([int(data.labels[zoo.entries[i].run]) for i in learned]),
        held_out=shown_by(data.values[held_out]),
        wanted=data.labels[held_out],
    )


def _judged(task: FieldsTask, config: Config) -> tuple[Tensor, Tensor]:
    """Training data of the class judge: data of the training splits, and altered copies."""
    rows = torch.tensor([i for i, split in enumerate(task.data.splits) if split in config.train.splits])
    values, labels = task.data.values[rows], task.data.labels[rows]
    copies = range(min(task.config.altered, JUDGE_COPIES) + 1)
    altered = [alter(values, task.config, copy) if copy else values for copy in copies]
    return shown_by(torch.cat(altered)), labels.repeat(len(copies))


def _samples(
    run: Path, generator: Generator, task: FieldsTask, zoo: Zoo, reference: Reference, seed: int
) -> dict[str, list[Tensor]]:
    """Values ``[N, F]`` of fields of each kind: generated, trained baselines (if they exist), simple baselines."""
    size, wanted = task.data.size, reference.wanted

    def drawn(source: Generator, number: int) -> Tensor:
        condition = wanted[:, None].float() if source.condition is not None else None
        made = source.generate(len(wanted), seed=seed + number, condition=condition)
        direct = VALUES in made[0]  # type: ignore[operator]
        return shown_by(torch.stack([each[VALUES] for each in made]) if direct else task.sample(made, size))  # type: ignore

    sets = range(NUM_SETS)
    samples = {"generated": [drawn(generator, number) for number in sets]}
    rng, space = make_rng(seed, "trivial"), FlatSpace(stack([zoo.state_dict(0)]))
    for _ in sets:
        for name, weights in trivial_weights(reference.weights, reference.labels, wanted, rng).items():
            samples.setdefault(name, []).append(shown_by(task.sample_stacked(space.unflatten(weights), size)))
        others = torch.randperm(len(reference.training), generator=rng)[: len(wanted)]
        samples.setdefault("original", []).append(reference.training[others])
    for name in baseline_configs(generator.config):
        if (run / name / "generator").is_dir():
            other = Generator.from_pretrained(run / name)
            samples[name] = [drawn(other, number) for number in sets]
    for name, some in samples.items():
        if len(some[0]) != len(wanted):
            raise InputError(f"there are fewer training data than held-out ones ({name}); hold fewer out")
    return samples
