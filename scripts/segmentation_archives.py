"""Small archives of real files in the layouts of ADE20K and Pascal VOC: digits on canvases, and maps of their classes.

python scripts/segmentation_archives.py ade20k data --train 48 --test 16
"""

from pathlib import Path

import numpy as np
from _common import Parser, run_command
from PIL import Image
from torch import Tensor

from rpg.tasks.vision.canvases import Canvas, make_canvases

IGNORED = 255
"""What VOC calls the pixels along the edges of objects."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("layout", choices=["ade20k", "voc"])
    parser.add_argument("folder", type=Path, help="where ADEChallengeData2016 or VOCdevkit is made")
    parser.add_argument("--train", type=int, default=48, metavar="N", help="training images")
    parser.add_argument("--test", type=int, default=16, metavar="N", help="images to score on")
    parser.add_argument("--size", type=int, default=96, help="height of the images, whose width is a third more")
    arguments = parser.parse_args()
    write = {"ade20k": write_ade20k, "voc": write_voc}[arguments.layout]
    sides = (arguments.size // 4, arguments.size // 2)
    made = {
        part: make_canvases(split, num, arguments.size * 4 // 3, sides=sides)
        for part, split, num in (("train", "train", arguments.train), ("val", "test", arguments.test))
    }
    print(write(arguments.folder, made, arguments.size))


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


if __name__ == "__main__":
    run_command(main)
