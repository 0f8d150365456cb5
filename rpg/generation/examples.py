"""Examples of what a network is to do, from folders, files and arrays.

n examples, P values of each, K classes."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from torch import Tensor

from rpg.models.conditioning import example_rows
from rpg.tasks import build_task
from rpg.tasks.base import ExampleTask
from rpg.tasks.config import LanguageConfig, TaskConfig
from rpg.tasks.side_by_side import SideBySide, Stacked, stack
from tokenization.checkpoint.checkpoint import save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
LABELS = ("class", "label", "y", "target")
"""What the column of classes may be called in a CSV file."""


def read_examples(
    path: Path | str, spec: ConditionSpec | None, option: str = "--examples", task: TaskConfig | None = None
) -> Tensor:
    """Examples as a generator takes them, ``[n, size]``.

    ==================  ================================================================================
    path                what it holds
    ==================  ================================================================================
    a folder            images, in folders named after their classes or directly (their classes unknown)
    ``.npz``            arrays ``X`` ``[n, …]`` and, if classes are known, ``y`` ``[n]``
    ``.csv``            a header, then one example a line; a column ``class`` or ``label`` is optional
    ``.jsonl``          rows with the texts ``prompt`` and ``completion``, of a ``task`` that understands them
    an image            one example, its class unknown
    ==================  ================================================================================

    Values of images become 0 … 1; those of other files are taken as they are.

    Raises:
        InputError: the generator takes no examples, there is no such file, it is of another form, or the examples do
            not fit.
    """
    path, where = Path(path), f"{option} {path}"
    if spec is None or spec.kind != "examples":
        raise InputError(f"{where} needs a generator that takes examples, which this one does not; leave it out")
    if path.is_dir():
        return _from_folder(path, spec, where)
    if not path.is_file():
        raise InputError(f"{where} is not there; name a folder of images, an npz or a csv file")
    if path.suffix.lower() in IMAGES:
        return examples_of(_image(path, spec)[None], None, spec, where)
    if path.suffix == ".npz":
        return _from_arrays(path, spec, where)
    if path.suffix == ".csv":
        return _from_table(path, spec, where)
    if path.suffix == ".jsonl" and isinstance(task, LanguageConfig):
        language: Any = build_task(task)
        return examples_of(language.read_examples(path), None, spec, where)
    raise InputError(f"{where} has an unknown format; give a folder of images, an npz or a csv file")


def examples_of(values: object, classes: Sequence[object] | None, spec: ConditionSpec, where: str) -> Tensor:
    """Arrays as a generator takes them, ``[n, size]``.

    Args:
        values: ``[n, …]``, P of each.
        classes: the name or number of each example's class; None where all are unknown.
        spec: the generator's condition.

    Raises:
        InputError: they do not fit, or a class is unknown to the generator.
    """
    found = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).flatten(1)
    wanted = num_values(spec)
    if not len(found):
        raise InputError(f"{where} has no examples; give at least one")
    if found.shape[1] != wanted:
        raise InputError(f"{where} has examples of {found.shape[1]} values; this generator takes {wanted}")
    numbers = None
    if classes is not None:
        if len(classes) != len(found):
            raise InputError(f"{where} has {len(found)} examples and {len(classes)} classes; give one for each")
        numbers = torch.tensor([_class_number(each, spec, where) for each in classes])
    return example_rows(found, numbers, len(spec.names))


def num_values(spec: ConditionSpec) -> int:
    """P."""
    return spec.size - len(spec.names) - 1


def _class_number(name: object, spec: ConditionSpec, where: str) -> int:
    text = str(int(name)) if isinstance(name, float | np.floating) and float(name).is_integer() else str(name).strip()
    if text in spec.names:
        return spec.names.index(text)
    raise InputError(f"{where} has an example of class {text!r}; this generator knows {', '.join(spec.names)}")


def _from_folder(folder: Path, spec: ConditionSpec, where: str) -> Tensor:
    files = sorted(each for each in folder.rglob("*") if each.suffix.lower() in IMAGES)
    if not files:
        raise InputError(f"{where} has no images ({', '.join(IMAGES)}); put some there")
    direct = [each for each in files if each.parent == folder]
    if direct and len(direct) != len(files):
        raise InputError(f"{where} has images beside folders of classes; move {direct[0].name} into one")
    values = np.stack([_image(each, spec) for each in files])
    classes = None if direct else [each.relative_to(folder).parts[0] for each in files]
    return examples_of(values, classes, spec, where)


def _image(path: Path, spec: ConditionSpec) -> np.ndarray:
    """An image's values in 0 … 1, brought to the size that networks take: ``[channels, S, S]``."""
    wanted = num_values(spec)
    channels = 1 if math.isqrt(wanted) ** 2 == wanted else 3
    side = math.isqrt(wanted // channels)
    if channels * side**2 != wanted:
        raise InputError(f"{path} is an image, but this generator takes {wanted} values; give an npz or csv file")
    try:
        with Image.open(path) as image:
            small = image.convert("L" if channels == 1 else "RGB").resize((side, side), Image.Resampling.BOX)
    except (OSError, UnidentifiedImageError):
        raise InputError(f"{path} is not an image that can be read; remove it or save it again") from None
    pixels = np.asarray(small, dtype=np.float32) / 255
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _from_arrays(path: Path, spec: ConditionSpec, where: str) -> Tensor:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{where} cannot be read ({error}); save it again with numpy.savez") from None
    if "X" not in found or found["X"].ndim < 2 or found["X"].dtype.kind not in "fiub":
        raise InputError(f"{where} holds {', '.join(found) or 'nothing'}; save numbers X [n, …] and classes y [n]")
    classes = found["y"].tolist() if "y" in found else None
    return examples_of(found["X"], classes, spec, where)


def _from_table(path: Path, spec: ConditionSpec, where: str) -> Tensor:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    head = [name.strip().lower() for name in rows[0]] if rows else []
    place = next((head.index(name) for name in LABELS if name in head), None)
    if len(rows) < 2:
        raise InputError(f"{where} has no examples; write a header and one example a line")
    if any(len(row) != len(head) for row in rows[1:]):
        raise InputError(f"{where} has lines of other lengths than its header; correct them")
    classes = None if place is None else [row[place] for row in rows[1:]]
    try:
        values = [[float(each) for i, each in enumerate(row) if i != place] for row in rows[1:]]
    except ValueError as error:
        raise InputError(f"{where}: {error}; write numbers under one header line") from None
    return examples_of(np.asarray(values, dtype=np.float32), classes, spec, where)


ENSEMBLE = "ensemble.safetensors"
"""Holds the tensors of all draws, ``[M, *shape]`` each, as `torch.func.stack_module_state` makes them of modules."""


def example_task(config: TaskConfig | None) -> ExampleTask:
    """The task that runs networks on examples. Raises InputError if it takes none."""
    task = build_task(config) if config is not None else None
    if not isinstance(task, ExampleTask):
        raise InputError("the generator's task has no examples; take one with model.condition.kind: examples")
    return task


def class_probabilities(task: ExampleTask, networks: Stacked, values: Tensor) -> Tensor:
    """What M stacked networks say of examples ``[n, P]``: ``[M, n, K]``."""
    return SideBySide(task.build()).predict(networks, task.inputs(values))


def favoured(task: ExampleTask, networks: Stacked, rows: Tensor) -> tuple[list[int], Tensor]:
    """M stacked networks by what they make of labelled examples, the best first; and each one's log-likelihood.

    Args:
        rows: examples ``[n, P + K + 1]``, as `rpg.generation.examples` makes them.

    Returns:
        Places of the networks; the mean log-probability ``[M]`` that they give the examples' classes.

    Raises:
        InputError: an example has no class.
    """
    num_classes = len(task.example_classes)
    values, known = rows[:, : -num_classes - 1], rows[:, -num_classes - 1 : -1]
    if not known.any(-1).all():
        raise InputError("--choose-by has examples without a class; put them into folders named after classes")
    likely = class_probabilities(task, networks, values).clamp(min=1e-12).log()
    scores = (likely * known).sum((1, 2)) / len(rows)
    return scores.argsort(descending=True, stable=True).tolist(), scores


def load_draws(paths: Sequence[Path]) -> Stacked:
    """Generated files, stacked."""
    return stack([load_file(path) for path in paths])


def save_ensemble(draws: Stacked, folder: Path) -> Path:
    """Write stacked networks into one file."""
    save_checkpoint(folder / ENSEMBLE, draws, {"format": "pt"})
    return folder / ENSEMBLE
