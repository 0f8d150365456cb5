"""Detection data: digits on canvases, and folders in COCO's format. K objects per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NotRequired

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import TypedDict

from rpg.labs.vision.config import CanvasesData, CocoData
from rpg.seeding import make_rng
from rpg.tasks.images.digits import load_splits
from tokenization.errors import InputError

NUM_CLASSES = 10
INK = 0.35  # share of the brightest value above which a pixel belongs to the digit
TRIES = 20  # positions tried for a digit before it is left out


@dataclass(frozen=True)
class Canvas:
    """One image with its objects.

    Attributes:
        image: float32 ``[3, S, S]`` in 0 … 1.
        boxes: float32 ``[K, 4]`` in pixels: left, top, right, bottom, the last two excluded. K is 1 or more.
        labels: the digits, int64 ``[K]`` in 0 … 9; count from 1 where 0 is the background.
        masks: bool ``[K, S, S]``; no two of them overlap, and ``boxes`` are their bounds.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor

    def label_map(self) -> Tensor:
        """The class of each pixel, int64 ``[S, S]``: 0 is the background, 1 … 10 are the digits 0 … 9."""
        return (self.masks * (self.labels + 1)[:, None, None]).sum(0)


def make_canvases(
    split: str, num: int, size: int = 64, seed: int = 0, *, most: int = 3, sides: tuple[int, int] = (16, 28)
) -> list[Canvas]:
    """Canvases with 1 to ``most`` coloured digits of one split on a coloured, noisy background.

    Args:
        split: train, validation or test; their digits are disjoint.
        num: number of canvases; each has its own random numbers, so fewer are a prefix of more.
        size: S.
        most: largest number of digits; one without a free place is left out, never the first.
        sides: smallest and largest height, and so width, of a digit's square, at most S.
    """
    splits = load_splits()
    images, labels = splits.images[splits.check(split)][:, 0], splits.labels[split]
    ink = (images - images.min()) / (images.max() - images.min())  # [n, 8, 8] in 0 … 1
    return [_draw(ink, labels, size, most, sides, make_rng(seed, "canvas", split, index)) for index in range(num)]


def _draw(ink: Tensor, labels: Tensor, size: int, most: int, sides: tuple[int, int], rng: torch.Generator) -> Canvas:
    def whole(low: int, high: int) -> int:  # both included
        return int(torch.randint(low, high + 1, (), generator=rng))

    coarse = torch.rand(1, 3, 3, 3, generator=rng) * 0.35
    image = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)[0]
    image = image + torch.randn(3, size, size, generator=rng) * 0.03
    taken = torch.zeros(size, size, dtype=torch.bool)
    boxes, masks, digits = [], [], []
    for _ in range(whole(1, most)):
        row, side = whole(0, len(ink) - 1), whole(*sides)
        colour = 0.5 + torch.rand(3, 1, 1, generator=rng) * 0.5
        digit = F.interpolate(ink[None, None, row], (side, side), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
        for _ in range(TRIES):
            top, left = whole(0, size - side), whole(0, size - side)
            place = (slice(top, top + side), slice(left, left + side))
            if not taken[place].any():
                break
        else:
            continue
        taken[place] = True
        square = image[:, place[0], place[1]]
        square += (colour - square) * digit
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[place] = digit > INK
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        masks.append(mask)
        digits.append(int(labels[row]))
    return Canvas(image.clamp(0, 1), torch.tensor(boxes).float(), torch.tensor(digits), torch.stack(masks))


Sample = tuple[Tensor, dict[str, Tensor]]
"""An image, float32 ``[3, H, W]`` in 0 … 1, and its ``boxes`` float32 ``[K, 4]`` (x₁, y₁, x₂, y₂ in pixels) and
``labels`` int64 ``[K]``, the ids of categories; 0 is the background."""

SMALLEST = 1.0  # pixels; COCO has a few narrower boxes, which are not used in training


class ImageEntry(TypedDict):
    """An image in COCO's format."""

    id: int
    file_name: str


class ThingEntry(TypedDict):
    """An object on an image: its box as left, top, width and height in pixels."""

    image_id: int
    category_id: int
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    area: NotRequired[FiniteFloat]
    iscrowd: NotRequired[int]


class CategoryEntry(TypedDict):
    """A category of objects. Networks have an output for every id up to the largest."""

    id: Annotated[int, Field(ge=1, lt=10_000)]
    name: str


class Instances(TypedDict):
    """The fields of COCO's annotation files that boxes need."""

    images: list[ImageEntry]
    annotations: list[ThingEntry]
    categories: Annotated[list[CategoryEntry], Field(min_length=1)]


class DetectionSet(Dataset[Sample]):
    """Images with their objects.

    Args:
        instances: the objects on each image.
        read: reads the image of an entry, float32 ``[3, H, W]`` in 0 … 1.
        training: leave out crowds and images without objects.
        flip: mirror half of the images, drawn from torch's global random state.
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
        """Number of outputs of a network: the background and all ids up to the largest."""
        return 1 + max(category["id"] for category in self.instances["categories"])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """An image and its objects. Raises OSError if its file is broken."""
        entry = self.images[index]
        image, things = self.read(entry), self.things.get(entry["id"], [])
        boxes = torch.tensor([thing["bbox"] for thing in things], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if self.flip and torch.rand(()) < 0.5:
            image, boxes = image.flip(-1), boxes[:, [2, 1, 0, 3]]
            boxes[:, ::2] = image.shape[-1] - boxes[:, ::2]
        return image, {"boxes": boxes, "labels": torch.tensor([thing["category_id"] for thing in things]).long()}


def open_split(split: str, data: CanvasesData | CocoData) -> DetectionSet:
    """The images of ``train``, ``validation`` or ``test``. Raises InputError if the folder lacks them."""
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
    """Annotations in COCO's format, without the fields that boxes do not need. Raises InputError for other files."""
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
