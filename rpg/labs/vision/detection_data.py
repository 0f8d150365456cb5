"""Images and what is on them: digits on canvases, and folders in COCO's format. K things on an image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NotRequired

import numpy as np
import torch
from PIL import Image
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import TypedDict

from rpg.labs.vision.canvases import NUM_CLASSES, make_canvases
from rpg.labs.vision.config import CanvasesData, CocoData
from tokenization.errors import InputError

Sample = tuple[Tensor, dict[str, Tensor]]
"""An image, float32 ``[3, H, W]`` in 0 … 1, and its ``boxes`` float32 ``[K, 4]`` (x₁, y₁, x₂, y₂ in pixels) and
``labels`` int64 ``[K]``, which are ids of categories; 0 is the background."""

SMALLEST = 1.0  # pixels: narrower boxes, of which COCO has a few, are no target


class ImageEntry(TypedDict):
    """An image in COCO's format."""

    id: int
    file_name: str


class ThingEntry(TypedDict):
    """A thing on an image: its box as left, top, width and height in pixels."""

    image_id: int
    category_id: int
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    area: NotRequired[FiniteFloat]
    iscrowd: NotRequired[int]


class CategoryEntry(TypedDict):
    """A kind of things. Networks have an output for every id up to the largest."""

    id: Annotated[int, Field(ge=1, lt=10_000)]
    name: str


class Instances(TypedDict):
    """What COCO's files of annotations hold, as far as boxes need it."""

    images: list[ImageEntry]
    annotations: list[ThingEntry]
    categories: Annotated[list[CategoryEntry], Field(min_length=1)]


class DetectionSet(Dataset[Sample]):
    """Images with things on them.

    Args:
        instances: what is on which image.
        read: gives the image of an entry, float32 ``[3, H, W]`` in 0 … 1.
        folder: where the files are, for errors.
        training: leave out images without things, and crowds.
        flip: mirror half of the images, by torch's global random numbers.
    """

    def __init__(
        self, instances: Instances, read: Callable[[ImageEntry], Tensor], folder: Path = Path(),
        training: bool = False, flip: bool = False,
    ) -> None:  # fmt: skip
        self.instances, self.read, self.flip = instances, read, flip
        things: dict[int, list[ThingEntry]] = {}
        for thing in instances["annotations"]:
            if not training or (not thing.get("iscrowd") and min(thing["bbox"][2:]) >= SMALLEST):
                things.setdefault(thing["image_id"], []).append(thing)
        self.things = things
        self.images = [entry for entry in instances["images"] if not training or entry["id"] in things]
        self.samples = [(folder / entry["file_name"],) for entry in self.images]

    @property
    def num_outputs(self) -> int:
        """Outputs of a network: the background and all ids up to the largest."""
        return 1 + max(category["id"] for category in self.instances["categories"])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """An image and what is on it. Raises OSError where its file is broken."""
        entry = self.images[index]
        image, things = self.read(entry), self.things.get(entry["id"], [])
        boxes = torch.tensor([thing["bbox"] for thing in things], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if self.flip and torch.rand(()) < 0.5:
            image, boxes = image.flip(-1), boxes[:, [2, 1, 0, 3]]
            boxes[:, ::2] = image.shape[-1] - boxes[:, ::2]
        return image, {"boxes": boxes, "labels": torch.tensor([thing["category_id"] for thing in things]).long()}


def open_split(split: str, data: CanvasesData | CocoData) -> DetectionSet:
    """The images of ``train``, ``validation`` or ``test``.

    Raises:
        InputError: there is no such split, or the folder does not hold it.
    """
    if split not in ("train", "validation", "test"):
        raise InputError(f"there is no split {split!r}; choose one of train, validation, test")
    return _canvases(split, data) if isinstance(data, CanvasesData) else _coco(split, data)


def _canvases(split: str, data: CanvasesData) -> DetectionSet:
    num = data.train if split == "train" else data.scored
    made = make_canvases(split, num, data.size, data.seed, most=data.most, sides=data.sides)
    things: list[ThingEntry] = []
    for number, canvas in enumerate(made):
        for (left, top, right, bottom), label in zip(canvas.boxes.tolist(), canvas.labels.tolist(), strict=True):
            box = [left, top, right - left, bottom - top]
            things.append({"image_id": number, "category_id": label + 1, "bbox": box})
    instances: Instances = {
        "images": [{"id": number, "file_name": f"canvas {number}"} for number in range(num)],
        "annotations": things,
        "categories": [{"id": label + 1, "name": str(label)} for label in range(NUM_CLASSES)],
    }
    return DetectionSet(instances, lambda entry: made[entry["id"]].image, training=split == "train")


def _coco(split: str, data: CocoData) -> DetectionSet:
    root, name = Path(data.root), data.test if split == "test" else data.train
    folder, instances = root / name, read_instances(root / "annotations" / f"instances_{name}.json")
    images, train = instances["images"], split == "train"
    if split != "test":
        kept = len(images) - data.validation
        if kept < 1 or (not train and not data.validation):
            raise InputError(
                f"task.data.validation keeps {data.validation} of {len(images)} images of {folder} for validation; "
                "choose from 1 to less than all of them"
            )
        images = images[:kept] if train else images[kept:]
    if not train:
        images = images[: data.scored]
    chosen = {image["id"] for image in images}
    things = [thing for thing in instances["annotations"] if thing["image_id"] in chosen]
    part: Instances = {"images": images, "annotations": things, "categories": instances["categories"]}
    found = DetectionSet(part, partial(_read_image, folder), folder, train, train)
    if not len(found):
        raise InputError(f"{folder} has no image to use for split {split}: none has a box; check its annotations")
    return found


def read_instances(path: Path) -> Instances:
    """Annotations in COCO's format; what boxes do not need is left out.

    Raises:
        InputError: there is no such file, or it is in another format.
    """
    cure = "name a folder in COCO's format as task.data.root"
    if not path.is_file():
        raise InputError(f"there is no file {path}; {cure}")
    try:
        found = TypeAdapter(Instances).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path} has no annotations of COCO's format ({place}: {first['msg']}); {cure}") from None
    images, categories = ({entry["id"] for entry in found[key]} for key in ("images", "categories"))  # type: ignore[literal-required]
    for number, thing in enumerate(found["annotations"]):
        for key, known in (("image_id", images), ("category_id", categories)):
            if thing[key] not in known:  # type: ignore[literal-required]
                value = thing[key]  # type: ignore[literal-required]
                raise InputError(f"{path}: annotations.{number}.{key} is {value}, which the file does not list; {cure}")
    return found


def _read_image(folder: Path, entry: ImageEntry) -> Tensor:
    pixels = np.array(Image.open(folder / entry["file_name"]).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
