"""Baselines for generated fields: computed from weights, or trained generators."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from rpg.config import Config
from rpg.labs.fields.task import FieldsTask
from rpg.models.states import Neighbourhoods
from rpg.tasks.collecting import append_many
from rpg.tasks.side_by_side import stack
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

VALUES = "values"
"""Name of the only tensor of checkpoints that store data on their grid instead of a field."""


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
    entries = [dataclasses.replace(entry, metrics={}) for entry, _ in missing]
    append_many(zoo, entries, [{VALUES: each} for _, each in missing])


GRID_PRIOR = {"objective": "edm", "whitened": False, "churn": 4, "steps": 24, "start": None}
"""Of a diffusion of data on their grid; its size is that of the generator's prior, if there is one."""

GRID_CODE = 160
"""Components of data on their grid at most: a diffusion of shapes has a 1-NNA of 0.62 with 160 and 0.65 with 320."""

PARTS = 8
"""Number of Gaussians in a class's mixture."""

NEIGHBOURS = 40
"""Of a neighbourhood, as in the configurations of fields."""


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
        return some.mean(0) + torch.randn(len(some), generator=rng) / len(some) ** 0.5 @ (some - some.mean(0))

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
