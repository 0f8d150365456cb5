"""Baselines of generated fields that are trained themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.tasks.fields.fields import FieldsTask
from tokenization.zoo.zoo import Zoo

PIXELS = "pixels"
"""The one tensor of a checkpoint that is an image itself."""


def baseline_configs(config: Config) -> dict[str, Config]:
    """Configurations by name, whose runs lie in the experiment's.

    - ``pixel_diffusion``: the same generator, of the images themselves in place of their fields.
    - ``per_token``: tokens one by one given class and position, as published (arXiv 2501.11587), with no code.
    - ``pdiff``: p-diff (arXiv 2402.13144), which takes no class.
    """
    plain = config.plain()

    def changed(name: str, zoo: str, **sections: Any) -> Config:
        return Config.parse({**plain, "run": f"{config.run}/{name}", "zoo": zoo, **sections}, name)

    model = {**plain["model"], "state": {"of": "none"}}
    stages = {"autoencoder": {"steps": 600, "learning_rate": 1e-3}, "latent": {"steps": 1500, "learning_rate": 1e-3}}
    split = {**plain["train"], "steps": max(1, config.train.steps // 3)}
    no_prior = {**plain["generate"], "state": "stored", "steps": 16}
    pixel_tokens = {**plain["tokens"], "size": 64}
    return {
        "pixel_diffusion": changed("pixel_diffusion", f"{config.zoo}_pixels", task=None, tokens=pixel_tokens),
        "per_token": changed("per_token", config.zoo, model=model, train=split, generate=no_prior),
        "pdiff": changed(
            "pdiff", config.zoo, model={"kind": "pdiff", **stages}, tokens={"flatten": "flat"},
            train={**split, "splits": [each for each in config.train.splits if not each.startswith("altered")]},
            generate={"sampler": "ddim", "steps": 100},
        ),
    }  # fmt: skip


def pixels_of(state_dicts: Sequence[Any]) -> Tensor:
    """Images that are checkpoints themselves, ``[M, F]``."""
    return torch.stack([each[PIXELS].flatten() for each in state_dicts])


def write_pixel_zoo(task: FieldsTask, fields: Zoo, path: Path) -> None:
    """What the fields of a zoo show on the images' own grid, as a zoo of images; one that is whole is kept."""
    if (path / "zoo.json").exists() and len(Zoo.open(path)) == len(fields):
        return
    zoo = Zoo.open(path, repair=True) if (path / "zoo.json").exists() else Zoo.create(path, condition=fields.condition)
    images = task.render((fields.state_dict(i) for i in range(len(fields))), task.data.images.shape[-1])
    for entry, image in list(zip(fields.entries, images, strict=True))[len(zoo) :]:
        zoo.append({PIXELS: image}, run=entry.run, step=entry.step, condition=entry.condition, split=entry.split)
