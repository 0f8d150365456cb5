"""Small archives of real files as ADE20K, Pascal VOC and COCO lie on disk: digits on canvases, their maps and boxes.

python scripts/archives.py ade20k data --train 48 --test 16
"""

import json
from pathlib import Path

import numpy as np
from _common import Parser, run_command
from PIL import Image
from torch import Tensor

from rpg.labs.vision.detection_data import NUM_CLASSES, Canvas, make_canvases

IGNORED = 255
"""What VOC calls the pixels along the edges of objects."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("layout", choices=list(WRITERS))
    parser.add_argument("folder", type=Path, help="where ADEChallengeData2016, VOCdevkit, or COCO's folders are made")
    parser.add_argument("--train", type=int, default=48, metavar="N", help="training images")
    parser.add_argument("--test", type=int, default=16, metavar="N", help="images to score on")
    parser.add_argument("--size", type=int, help="height of the images: 64 of COCO's, else 96, and a third more width")
    arguments = parser.parse_args()
    coco = arguments.layout == "coco"
    size = arguments.size or (64 if coco else 96)
    width, sides = (size, (size // 4, size * 7 // 16)) if coco else (size * 4 // 3, (size // 4, size // 2))
    made = {
        part: make_canvases(split, num, width, sides=sides)
        for part, split, num in (("train", "train", arguments.train), ("val", "test", arguments.test))
    }
    print(WRITERS[arguments.layout](arguments.folder, made, size))


def write_ade20k(folder: Path, made: dict[str, list[Canvas]], height: int) -> Path:
    """``images`` and ``annotations`` with ``training`` and ``validation``: 0 is no class, the digits are 1 … 10."""
    root = folder / "ADEChallengeData2016"
    for part, name, short in (("train", "training", "train"), ("val", "validation", "val")):
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
        for number, canvas in enumerate(made[part], 1):
            stem = f"ADE_{short}_{number:08d}"
            _save_image(canvas.image, root / "images" / name / f"{stem}.jpg", height)
            classes = canvas.label_map()[:height].numpy().astype(np.uint8)
            Image.fromarray(classes).save(root / "annotations" / name / f"{stem}.png")
    return root


def write_voc(folder: Path, made: dict[str, list[Canvas]], height: int) -> Path:
    """``VOCdevkit/VOC2012``: 0 is the background, the digits are 1 … 10 in a palette, 255 is the edge of the image."""
    root = folder / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for first, (part, canvases) in zip((1, 500_001), made.items(), strict=True):
        stems = [f"2012_{number:06d}" for number in range(first, first + len(canvases))]
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(stems) + "\n")
        for stem, canvas in zip(stems, canvases, strict=True):
            _save_image(canvas.image, root / "JPEGImages" / f"{stem}.jpg", height)
            classes = canvas.label_map()[:height].numpy().astype(np.uint8)
            classes[:2] = IGNORED
            drawn = Image.fromarray(classes, mode="P")
            drawn.putpalette([(37 * entry * channel) % 256 for entry in range(256) for channel in (1, 3, 5)])
            drawn.save(root / "SegmentationClass" / f"{stem}.png")
    return root


def _save_image(image: Tensor, path: Path, height: int) -> None:
    pixels = (image[:, :height].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path, quality=95)


def write_coco(root: Path, made: dict[str, list[Canvas]], size: int) -> Path:
    """``NAME/*.jpg`` and ``annotations/instances_NAME.json``; the digits 0 … 9 are the categories 1 … 10."""
    for part, canvases in made.items():
        name = f"{part}2017"
        images: list[dict] = []
        things: list[dict] = []
        for folder in (root / name, root / "annotations"):
            folder.mkdir(parents=True, exist_ok=True)
        for number, canvas in enumerate(canvases, 100):
            file = f"{number:012}.jpg"
            _save_image(canvas.image, root / name / file, size)
            images.append({"id": number, "file_name": file, "height": size, "width": size})
            for (left, top, right, bottom), label in zip(canvas.boxes.tolist(), canvas.labels.tolist(), strict=True):
                box = [left, top, right - left, bottom - top]
                thing = {"id": len(things) + 1, "image_id": number, "category_id": label + 1, "bbox": box}
                things.append({**thing, "area": box[2] * box[3], "iscrowd": 0})
        categories = [{"id": label + 1, "name": str(label), "supercategory": "digit"} for label in range(NUM_CLASSES)]
        tree = {"info": {}, "images": images, "annotations": things, "categories": categories}
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(tree))
    return root


WRITERS = {"ade20k": write_ade20k, "voc": write_voc, "coco": write_coco}


if __name__ == "__main__":
    run_command(main)
