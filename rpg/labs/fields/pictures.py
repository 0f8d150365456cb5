"""The pictures of the experiment on fields, and single fields as images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.field_measures import DISTANCES, beside, grid, save_image, shown_by
from rpg.generation.generator import Generator
from rpg.labs.fields.config import FieldsConfig
from rpg.labs.fields.shapes import write_mesh
from rpg.labs.fields.task import FieldsTask
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.seeding import make_rng
from rpg.tasks.side_by_side import unstack
from rpg.training.data import training_entries
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

PICTURES = ("classes", "fine", "nearest", "path")

PER_CLASS, FINE, NUM_NEAREST, NUM_PATHS, PATH_POINTS = 8, 64, 12, 6, 12


def draw_pictures(run: Path, generator: Generator, task: FieldsTask, zoo: Zoo, seed: int) -> None:
    """Write the pictures into ``run``.

    ``fine.png`` and, for images on their own grid, ``classes.png``: generated beside held-out fields of each class;
    ``nearest.png``; with a prior over codes, ``path.png``; for shapes also one mesh per class in ``meshes``.
    """
    data = task.data
    num_classes = len(data.class_names)
    wanted = torch.arange(num_classes).repeat_interleave(PER_CLASS)
    made = generator.generate(len(wanted), seed=seed, condition=wanted[:, None].float())
    unseen = torch.tensor([split == "unseen" for split in data.splits])
    real = []
    for label in range(num_classes):
        members = ((data.labels == label) & unseen).nonzero()[:, 0]
        members = members if len(members) else unseen.nonzero()[:, 0]  # of few data a class may have none held out
        real.append(members[torch.arange(PER_CLASS) % len(members)])
    rows = torch.cat(real)
    fields = {(entry.run, entry.step): i for i, entry in enumerate(zoo.entries)}
    originals = [zoo.state_dict(fields[row, 0]) for row in rows.tolist()]
    coarse = [("classes", data.size, 4)] if task.config.dimensions == 2 else []  # a view has no pixels of the data's
    for name, resolution, scale in (*coarse, ("fine", FINE, 1)):
        sheets = [grid(task.render(each, resolution), PER_CLASS) for each in (made, originals)]  # type: ignore[arg-type]
        save_image(beside(sheets, max(2, resolution // 2)), run / f"{name}.png", scale)
    if task.config.dimensions == 3:
        (run / "meshes").mkdir(exist_ok=True)
        for name, field in zip(data.class_names, made[::PER_CLASS], strict=True):
            values = task.sample([field], FINE)[0, 0]  # type: ignore[list-item]
            if (values > 0).any():
                write_mesh(values, run / "meshes" / f"{name}.ply")
    _draw_nearest(run, task, zoo, generator.config, made[:: max(1, len(made) // NUM_NEAREST)])
    if generator.config.model.state.prior is not None:
        labels = torch.arange(min(NUM_PATHS, num_classes))
        images = [task.render(each, FINE) for each in denoising_path(generator, labels, seed)]
        save_image(grid(torch.stack(images, 1).flatten(0, 1), len(images)), run / "path.png")


def learned_originals(zoo: Zoo, config: Config) -> list[int]:
    """The entries of the training splits, without altered copies."""
    return [i for i in training_entries(zoo, config.train.splits) if zoo.entries[i].step == 0]


def _draw_nearest(run: Path, task: FieldsTask, zoo: Zoo, config: Config, made: Sequence) -> None:
    """One row per generated field: the field and its five nearest training data."""
    rows, size = learned_originals(zoo, config), task.data.size
    training = shown_by(torch.stack([task.data.values[zoo.entries[i].run] for i in rows]))
    distances = DISTANCES[task.config.dimensions](shown_by(task.sample(made, size)), training)
    nearest = distances.argsort(1)[:, :5]
    fine = task.render(made, FINE)
    fields = [zoo.state_dict(rows[i]) for i in nearest.flatten().tolist()]
    beside_it = task.render(fields, FINE).view(len(made), 5, *fine.shape[1:])
    save_image(grid(torch.cat([fine[:, None], beside_it], 1).flatten(0, 1), 12), run / "nearest.png")


@torch.inference_mode()
def denoising_path(generator: Generator, labels: Tensor, seed: int) -> list[list[dict[str, Tensor]]]:
    """Fields of the classes ``[B]`` predicted by the prior at its sampling steps, from noise to the last."""
    network = generator.network
    assert isinstance(network, RecurrentDiffusion) and network.prior is not None
    rngs = [make_rng(seed, "state", i) for i in range(len(labels))]
    noise = torch.stack([torch.randn(network.prior.code_size, generator=rng) for rng in rngs])
    conditions, codes = labels[:, None].float(), []  # type: ignore[var-annotated]
    codes.append(network.prior.sample(noise, conditions, codes.append, rngs))
    tokens = torch.arange(generator.layout.num_tokens)
    chosen = torch.linspace(0, len(codes) - 1, PATH_POINTS).round().long().unique().tolist()
    known: list[Any] = [network.known(codes[step], conditions, tokens) for step in chosen]
    return [unstack(generator.layout.decode_batch(each, constants=True)) for each in known]


def render_files(files: Sequence[Path], size: int, output: Path | None, config: Config | None = None) -> list[Path]:
    """Render fields as PNG files beside them or in the folder ``output``; for solid shapes also a mesh as a PLY file.

    Args:
        size: height and width of the images; the grid on which meshes are made has as many points along each edge.
        config: configuration of the fields, for files outside runs and zoos.

    Raises:
        InputError: a file is not a field, or nothing says how it was made; a shape is empty.
    """
    written = []
    for file in files:
        task = FieldsTask(_task_of(file, config))
        field = Checkpoint.open(file).state_dict()
        shapes = {name: tuple(value.shape) for name, value in field.items()}
        if shapes.get("first.weight") != (task.config.hidden, task.config.dimensions) or "last.weight" not in shapes:
            raise InputError(f"{file} holds no field; name a file that `rpg generate` or `rpg collect` made of one")
        folder = output or file.parent
        folder.mkdir(parents=True, exist_ok=True)
        image = task.render([field], size)[0]
        path = folder / f"{file.stem}.png"
        save_image(1 - image if len(image) == 1 else image, path)
        written.append(path)
        if task.config.dimensions == 3:
            write_mesh(task.sample([field], size)[0, 0], path.with_suffix(".ply"))
            written.append(path.with_suffix(".ply"))
    return written


def _task_of(file: Path, config: Config | None) -> FieldsConfig:
    for folder in file.resolve().parents[:3] if config is None else ():
        if (folder / "generator" / "config.yaml").is_file():
            config = Config.load(folder / "generator" / "config.yaml")
        elif (folder / "zoo.json").is_file():
            config = Config.parse({"task": Zoo.open(folder).require_task()}, str(folder))
        if config is not None:
            break
    if config is None or not isinstance(config.task, FieldsConfig):
        raise InputError(
            f"{file} lies in no run or zoo of fields; say how it was made with --config configs/fields.yaml"
        )
    return config.task
