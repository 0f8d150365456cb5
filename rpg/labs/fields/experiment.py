"""The experiment on neural fields: fit, train, generate, compare in function space, draw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from rpg.config import Config
from rpg.devices import single_threaded
from rpg.evaluation.field_measures import DISTANCES, class_judge, letter_features, measure_samples, shown_by
from rpg.evaluation.page.page import Page
from rpg.evaluation.report import Report, networks
from rpg.evaluation.span import FlatSpace
from rpg.experiments.driver import Experiment
from rpg.experiments.evaluating import judges
from rpg.experiments.single import stacked_networks, tasks_scored
from rpg.generation.generator import Generator
from rpg.labs.fields.data import alter
from rpg.labs.fields.pictures import PICTURES, draw_pictures, learned_originals
from rpg.labs.fields.task import FieldsTask
from rpg.models.states import Neighbourhoods, deviation
from rpg.seeding import make_rng
from rpg.tasks import require_task
from rpg.tasks.collecting import append_many
from rpg.tasks.processes import spawned
from rpg.tasks.side_by_side import Stacked, stack
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

VALUES = "values"
"""Name of the only tensor of checkpoints that store data on their grid instead of a field."""

GRID_PRIOR = {"objective": "edm", "whitened": False, "churn": 4, "steps": 24, "start": None}
"""Of a diffusion of data on their grid; its size is that of the generator's prior, if there is one."""

GRID_CODE = 160
"""Components of data on their grid at most: a diffusion of shapes has a 1-NNA of 0.62 with 160 and 0.65 with 320."""

PARTS = 8
"""Number of Gaussians in a class's mixture."""

NEIGHBOURS = 40
"""Of a neighbourhood, as in the configurations of fields."""


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


def baseline_configs(config: Config) -> dict[str, Config]:
    """Configurations of trained baselines by name; their runs lie inside the experiment's.

    - ``pixel_diffusion`` (of shapes ``voxel_diffusion``): recurrent diffusion of the data themselves on their grid, its
      codes by a diffusion from noise alone.
    - ``per_token``: tokens one by one given class and position, as published (arXiv 2501.11587), with no code.
    - ``pdiff``: p-diff (arXiv 2402.13144), which takes no class.

    Empty for other kinds of models than recurrent diffusion.
    """
    if config.model.kind != "recurrent":
        return {}
    plain = config.plain()

    def changed(name: str, zoo: str, **sections: Any) -> Config:
        return Config.parse({**plain, "run": f"{config.run}/{name}", "zoo": zoo, **sections}, name)

    model = {**plain["model"], "state": {"of": "none"}}
    prior = {**(plain["model"]["state"]["prior"] or {"width": 320}), **GRID_PRIOR}
    grid_state = {"of": "code", "width": min(plain["model"]["state"]["width"], GRID_CODE), "prior": prior}
    steps = max(2, config.train.steps // 2)
    stages = {
        "autoencoder": {"steps": steps // 2, "learning_rate": 1e-3}, "latent": {"steps": steps, "learning_rate": 1e-3}
    }  # fmt: skip
    split = {**plain["train"], "steps": steps}
    no_prior = {**plain["generate"], "state": "stored", "steps": 16}
    originals = [each for each in config.train.splits if not each.startswith("altered")]
    direct = f"{grid_element(config)}_diffusion"
    return {
        direct: changed(
            direct, grid_zoo(config), task=None, model={**plain["model"], "state": grid_state},
            generate={**plain["generate"], "state": "prior"},
        ),
        "per_token": changed("per_token", config.zoo, model=model, train=split, generate=no_prior),
        "pdiff": changed(
            "pdiff", config.zoo, model={"kind": "pdiff", **stages}, tokens={"flatten": "flat"},
            train={"splits": originals, "ema_decay": 0.99, "save_every": 5000, "log_every": split["log_every"]},
            generate={"sampler": "ddim", "steps": 100},
        ),
    }  # fmt: skip


def grid_element(config: Config) -> str:
    """Name of a grid value: ``pixel`` or ``voxel``."""
    return "voxel" if getattr(config.task, "dimensions", 2) == 3 else "pixel"


def grid_zoo(config: Config) -> str:
    """Folder of the zoo that stores the data on their grid."""
    return f"{config.zoo}_{grid_element(config)}s"


@locks(lambda task, fields, path: path)
def write_grid_zoo(task: FieldsTask, fields: Zoo, path: Path) -> None:
    """Write the zoo of the fields' values on the data's grid, unless it is complete."""
    if (path / "zoo.json").exists() and len(Zoo.open(path)) == len(fields):
        return
    zoo = Zoo.open(path, repair=True) if (path / "zoo.json").exists() else Zoo.create(path, condition=fields.condition)
    values = task.sample((fields.state_dict(i) for i in range(len(fields))), task.data.size)
    missing = list(zip(fields.entries, values, strict=True))[len(zoo) :]
    append_many(zoo, [(dataclasses.replace(entry, metrics={}), {VALUES: each}) for entry, each in missing])


def _clusters(members: Tensor, rng: torch.Generator) -> Tensor:
    """Cluster index of each member ``[n, P]`` of a class: ``[n]``."""
    seed = int(torch.randint(2**31 - 1, (), generator=rng))
    model = KMeans(min(PARTS, len(members)), n_init=4, random_state=seed)
    return torch.from_numpy(model.fit_predict(members.double().numpy())).long()


def trivial_weights(weights: Tensor, labels: Tensor, wanted: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """Weights that need no generator, computed from the training data of each requested class.

    Of checkpoints ``[T, P]`` with their classes ``[T]``, for the ``wanted`` classes ``[M]``: ``[M, P]`` by name. The
    ``mixture`` has a covariance Gaussian for each of a class's `PARTS` clusters (k-means).
    """

    def gaussian(some: Tensor) -> Tensor:
        return some.mean(0) + deviation(some, torch.randn(len(some), generator=rng))

    made = []
    clusters = {int(label): _clusters(weights[labels == label], rng) for label in wanted.unique()}
    for label in wanted.tolist():
        members, own = weights[labels == label], clusters[label]  # [n, P], [n]
        pair = torch.randperm(len(members), generator=rng)[:2]
        noise = torch.randn(weights.shape[1], generator=rng)
        made.append(
            {
                "average": members.mean(0),
                "midpoint": members[pair].mean(0),
                "coordinate_gaussian": members.mean(0) + noise * members.std(0, unbiased=False),
                "covariance_gaussian": gaussian(members),
                # a part by its share
                "mixture": gaussian(members[own == own[torch.randint(len(own), (), generator=rng)]]),
            }
        )
    numbers = torch.randn(len(wanted), 1 + NEIGHBOURS, generator=rng)
    near = Neighbourhoods(weights, labels, NEIGHBOURS).draw(wanted, torch.special.ndtr(numbers[:, 0]), numbers[:, 1:])
    return stack(made) | {"neighbourhood": near}
