"""Whole networks on a folder of 1,000 classes, as ImageNet lies on disk: seconds and memory on this machine.

Writes a few random JPEGs of each class. Of each network, from random weights, it collects two checkpoints, a batch of
fine-tuning each, by two processes: the second one goes on where the first one ended. Then both are scored.

python scripts/bench_imagenet.py [--networks NAME …] [--batch-size 2] [--images 100] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Parser, run_command, write_figures
from bench_scale import alone
from PIL import Image

from rpg.config import Config
from rpg.evaluation.asking import ask_checkpoints
from rpg.evaluation.workers import Workers
from rpg.planning.collection import plan_collection
from rpg.planning.peak import peak_resident_bytes
from rpg.tasks import build_task
from tokenization.zoo.zoo import Zoo

NETWORKS = ("vit_base_patch16_224", "convnext_large")
NUM_CLASSES = 1000
IMAGES = {"train": 3, "val": 1}
"""Images of a class."""


def main() -> None:
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--images", type=int, default=100, help="of the 1,000 in val, those that are scored")
    parser.add_argument("--folder", type=Path, help="where all is written and kept; else a temporary one")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"torch": torch.__version__}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        figures["folder"] = write_images(folder / "data")
        print("folder", json.dumps(figures["folder"]), flush=True)
        for name in arguments.networks:
            task = {
                "name": "imagenet", "network": name, "pretrained": False, "data": str(folder / "data"),
                "batch_size": arguments.batch_size, "checkpoints": 2, "device": "cpu",
                "epochs": 2 * arguments.batch_size / (NUM_CLASSES * IMAGES["train"]),
            }  # fmt: skip
            config = Config.parse({"run": str(folder / "run"), "zoo": str(folder / name), "task": task}, "the script")
            parts: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
                ("plan", plan, ()), ("first", collect, (1,)), ("second", collect, (2,)),
                ("scoring", score, (arguments.images,)),
            ]  # fmt: skip
            figures[name] = {}
            for label, part, more in parts:
                figures[name][label] = alone(measured, part, config, *more)
                print(name, label, json.dumps(figures[name][label]), flush=True)
                write_figures(arguments.json, figures)


def measured(part: Callable[..., dict[str, Any]], config: Config, *more: int) -> dict[str, Any]:
    """What a part found, its seconds by the clock and of the processor, and its highest resident memory."""
    torch.set_num_threads(1)
    started, processor = time.perf_counter(), time.process_time()
    found = part(config, *more)
    return {
        **found,
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "peak_gib": peak_resident_bytes() / 2**30,
    }


def write_images(root: Path) -> dict[str, Any]:
    """JPEGs of 500 × 375 pixels, random blocks of colour, by class."""
    random, started = np.random.default_rng(0), time.perf_counter()
    for split, count in IMAGES.items():
        for number in range(NUM_CLASSES):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                blocks = Image.fromarray(random.integers(0, 256, (15, 20, 3), dtype=np.uint8))
                blocks.resize((500, 375)).save(folder / f"{index}.jpg")
    files = [*root.rglob("*.jpg")]
    return {
        "images": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": time.perf_counter() - started,
    }


def plan(config: Config) -> dict[str, Any]:
    """What `rpg plan` says of collecting."""
    planned = plan_collection(config)
    assert planned is not None
    return {"planned_gib": planned.host / 2**30}


def collect(config: Config, limit: int) -> dict[str, Any]:
    """Collect until the zoo has ``limit`` checkpoints."""
    assert config.task is not None
    zoo = build_task(config.task).collect(config.zoo, limit=limit)
    left = [path.name for path in zoo.path.iterdir() if path.is_file()]
    return {"steps": [entry.step for entry in zoo.entries], "bytes": zoo.file(0).stat().st_size, "files": left}


def score(config: Config, num_images: int) -> dict[str, Any]:
    """Score both checkpoints on the first images of val."""
    assert config.task is not None
    task: Any = build_task(config.task)
    dataset = task._tuning.dataset("test")
    dataset.samples, dataset.targets = dataset.samples[:num_images], dataset.targets[:num_images]
    zoo = Zoo.open(config.zoo)
    found = ask_checkpoints(task, [zoo.checkpoint(index) for index in range(len(zoo))], "test", Workers()).predictions
    return {"networks": len(found), "images": found.shape[1], "distinct_answers": len(found.unique())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_command(main)
