"""A small archive of real files in COCO's format: digits on canvases, and their boxes.

python scripts/coco_archive.py data/coco --train 48 --test 16
"""

import json
from pathlib import Path

import numpy as np
from _common import Parser, run_command
from PIL import Image

from rpg.tasks.vision.canvases import NUM_CLASSES, make_canvases


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where annotations, train2017 and val2017 are made")
    parser.add_argument("--train", type=int, default=48, metavar="N", help="training images")
    parser.add_argument("--test", type=int, default=16, metavar="N", help="images to score on")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    arguments = parser.parse_args()
    for split, name in (("train", "train2017"), ("test", "val2017")):
        write_split(arguments.folder, split, name, getattr(arguments, split), arguments.size)
    print(arguments.folder)


def write_split(root: Path, split: str, name: str, num: int, size: int) -> None:
    """``NAME/*.jpg`` and ``annotations/instances_NAME.json``; the digits 0 … 9 are the categories 1 … 10."""
    for folder in (root / name, root / "annotations"):
        folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, object]] = []
    things: list[dict[str, object]] = []
    for number, canvas in enumerate(make_canvases(split, num, size, sides=(size // 4, size * 7 // 16)), 100):
        file = f"{number:012}.jpg"
        pixels = np.ascontiguousarray((canvas.image * 255).byte().permute(1, 2, 0).numpy())
        Image.fromarray(pixels).save(root / name / file, quality=95)
        images.append({"id": number, "file_name": file, "height": size, "width": size})
        for (left, top, right, bottom), label in zip(canvas.boxes.tolist(), canvas.labels.tolist(), strict=True):
            box = [left, top, right - left, bottom - top]
            thing = {"id": len(things) + 1, "image_id": number, "category_id": label + 1, "bbox": box}
            things.append({**thing, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": label + 1, "name": str(label), "supercategory": "digit"} for label in range(NUM_CLASSES)]
    tree = {"info": {}, "images": images, "annotations": things, "categories": categories}
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(tree))


if __name__ == "__main__":
    run_command(main)
