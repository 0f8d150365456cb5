"""Networks for unseen CIFAR-10 tasks at their real size on this machine: seconds and memory of every part of the work.

Writes an archive of 60,000 random images in CIFAR-10's own format, collects two tasks' ViT-Tinys, trains the generator
a few steps, scores networks for four unseen tasks on all test images, and makes regressions of as many networks as the
whole zoo has seen tasks. Shapes, batches and counts are the configuration's; steps are few, and all is extrapolated.

python scripts/bench_cifar10.py [--config FILE] [--set KEY=VALUE …] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Parser, run_command, write_figures
from bench_scale import alone
from torch import Tensor
from torchvision.datasets import CIFAR10

from rpg.config import Config
from rpg.evaluation.held_out import nearest_rows, score_method
from rpg.evaluation.regression import Regression
from rpg.experiments.held_out_tasks import networks_of, parts_for
from rpg.generation.generator import Generator
from rpg.options import default_config
from rpg.planning.peak import peak_resident_bytes
from rpg.tasks.images.cifar10 import Cifar10SubsetsTask
from rpg.tasks.images.config import Cifar10SubsetsConfig
from rpg.training.loop import train
from tokenization.checkpoint.checkpoint import save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.manifest import ZooEntry
from tokenization.zoo.zoo import Zoo

Part = Callable[[Config, Namespace], dict[str, Any]]

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
PER_BATCH = 10_000
NUM_UNSEEN = 4
NUM_COMPARED = 100
"""Networks whose inner products with all seen ones are taken, as for the validation tasks."""

FEW_STEPS = (
    "task.group=2", "task.probe.steps=1", "train.steps=2", "train.log_every=1",
    "task.finetune.stages=[{steps: 1, learning_rate: 1.0e-2, weight_decay: 0.1, only: [head.*]}, "
    "{steps: 1, learning_rate: 1.0e-4, weight_decay: 0.1}]", "task.finetune.checkpoints=1",
)  # fmt: skip


def main() -> None:
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--config", type=Path, default=default_config("cifar10_unseen.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="on top of the few steps")
    parser.add_argument("--folder", type=Path, help="where all is written and kept; else a temporary one")
    parser.add_argument("--seen", type=int, default=822, help="networks of the regressions")
    parser.add_argument("--split", default="test", choices=["test", "validation"], help="images that are scored")
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for part in PARTS], help="parts to run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        fixed = [f"task.root={folder / 'data'}", f"zoo={folder / 'zoo'}", f"run={folder / 'run'}"]
        overrides = [*fixed, "task.pretrained=false", *FEW_STEPS, *arguments.set]
        Config.load(arguments.config, overrides)  # a mistake is said before anything is written
        figures: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        for part in PARTS:
            if arguments.only and part.__name__ not in arguments.only:
                continue
            figures[part.__name__] = alone(measured, part, overrides, arguments)
            print(part.__name__, json.dumps(figures[part.__name__]), flush=True)
            write_figures(arguments.json, figures)


def measured(part: Part, overrides: list[str], arguments: Namespace) -> dict[str, Any]:
    """What a part found, its seconds by the clock and of the processor, and its highest resident memory."""
    torch.set_num_threads(1)
    config = Config.load(arguments.config, overrides)
    started, processor = time.perf_counter(), time.process_time()
    found = part(config, arguments)
    return {
        **found,
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "peak_gib": peak_resident_bytes() / 2**30,
    }


def archive(config: Config, _: Namespace) -> dict[str, Any]:
    """Write 50,000 training and 10,000 test images as CIFAR-10 lies on disk; values and labels are random."""
    folder, random = _archive(config), np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*BATCHES, "test_batch"):
        content = {
            "batch_label": name,
            "labels": random.integers(0, 10, PER_BATCH).tolist(),
            "data": random.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8),
            "filenames": [f"{name}_{index:05d}.png" for index in range(PER_BATCH)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))  # 2 would blow the bytes up
    names = list(Cifar10SubsetsTask.class_names)
    meta = {"label_names": names, "num_cases_per_batch": PER_BATCH, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=4))
    return {"bytes": sum(file.stat().st_size for file in folder.iterdir()), "images": 6 * PER_BATCH}


def collect(config: Config, _: Namespace) -> dict[str, Any]:
    """Collect two tasks: seconds of a step by stage and of scoring a network on the validation images."""
    task = TimedTask(_known(config).task)
    zoo = task.collect(config.zoo, limit=2)
    steps = [later - sooner for sooner, later in itertools.pairwise(task.begun)]
    networks, whole = zoo.num_runs, whole_task()
    head, full = (1 / networks * seconds for seconds in (steps[-2], steps[-1]))
    scoring = task.scored / len(zoo) * (whole.num_validation / task.config.num_validation)
    recipe = whole.finetune
    each = recipe.stages[0].steps * head + recipe.stages[1].steps * full + recipe.checkpoints * scoring
    return {
        "networks": networks,
        "processor_seconds_a_head_step": head,
        "processor_seconds_a_full_step": full,
        "processor_seconds_to_validate": scoring,
        "processor_hours_of_1022_tasks": 1022 * each / 3600,
        "zoo_gib_of_1022_tasks": 1022 * recipe.checkpoints * zoo.file(0).stat().st_size / 2**30,
    }


def whole_task() -> Cifar10SubsetsConfig:
    """The task without fewer steps."""
    task = Config.load(default_config("cifar10_unseen.yaml")).task
    assert isinstance(task, Cifar10SubsetsConfig)
    return task


def generator(config: Config, _: Namespace) -> dict[str, Any]:
    """Train the generator on them for a few steps."""
    times = []
    train(config, overwrite=True, say=print, progress=lambda *_, **__: times.append(time.process_time()))
    step = min((later - sooner for sooner, later in itertools.pairwise(times)), default=float("nan"))
    steps = Config.load(default_config("cifar10_unseen.yaml")).train.steps
    return {"processor_seconds_a_step": step, "processor_hours_of_all_steps": step * steps / 3600}


def unseen(config: Config, arguments: Namespace) -> dict[str, Any]:
    """Generate and score networks for four unseen tasks, one after the other."""
    task: Any = Cifar10SubsetsTask(_known(config).task)  # type: ignore[arg-type]
    bits = task.bits()[[number for number, split in enumerate(task.splits()) if split == "unseen"][:NUM_UNSEEN]]
    made = parts_for(Generator.from_pretrained(config.run), bits, seed=0)
    scores = score_method(task, made, bits, arguments.split, keep=True)
    return {"accuracies": scores.first.tolist(), "images": len(task.classes(arguments.split))}


def regressions(config: Config, arguments: Namespace) -> dict[str, Any]:
    """Regressions and retrieval of as many networks as there are seen tasks, for four unseen ones."""
    task = Cifar10SubsetsTask(_known(config).task)  # type: ignore[arg-type]
    zoo = _random_zoo(Path(config.zoo).parent / "many", task, arguments.seen)
    networks = networks_of(zoo, "train")
    bits = task.bits()[[number for number, split in enumerate(task.splits()) if split == "unseen"][:NUM_UNSEEN]]
    started = time.perf_counter()
    products = networks.select(range(min(NUM_COMPARED, arguments.seen))).products(networks)
    compared = time.perf_counter()
    parts = [*networks.mixed(Regression("kernel_ridge", 2.0, 0.1).mixture(networks.bits, bits))]
    mixed = time.perf_counter()
    parts += networks.parts(nearest_rows(bits, networks.bits, False))
    assert all(value.isfinite().all() for part in parts for value in part.values()) and products.isfinite().all()
    return {
        "networks": arguments.seen,
        "bytes": sum(zoo.file(index).stat().st_size for index in range(len(zoo))),
        "seconds_of_inner_products_of_100": compared - started,
        "seconds_of_a_regression": mixed - compared,
    }


PARTS: tuple[Part, ...] = (archive, collect, generator, unseen, regressions)


class TimedTask(Cifar10SubsetsTask):
    """The task, and the processor's time at the beginning of every step and for scoring."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.begun: list[float] = []
        self.scored = 0.0

    def draw(self, num: int, rng: torch.Generator, *, augmented: bool) -> tuple[Tensor, Tensor]:
        """Draw the images of a step."""
        self.begun.append(time.process_time())
        return super().draw(num, rng, augmented=augmented)

    def probabilities(self, weights: dict[str, Tensor], split: str) -> Tensor:
        """Score networks."""
        started = time.process_time()
        if not self.scored:
            self.begun.append(started)  # the last step has ended
        found = super().probabilities(weights, split)
        self.scored += time.process_time() - started
        return found


def _archive(config: Config) -> Path:
    return Path(config.task.root) / CIFAR10.base_folder  # type: ignore[union-attr]


def _known(config: Config) -> Config:
    """Have torchvision, which reads no archive but CIFAR-10's own, take the random one in its place."""
    digests = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in _archive(config).iterdir()}
    CIFAR10.train_list = [[name, digests[name]] for name in BATCHES]
    CIFAR10.test_list = [["test_batch", digests["test_batch"]]]
    CIFAR10.meta = {"filename": "batches.meta", "key": "label_names", "md5": digests["batches.meta"]}
    return config


def _random_zoo(path: Path, task: Cifar10SubsetsTask, num: int) -> Zoo:
    """Networks of the task's shapes, random ones, for its seen tasks."""
    start = task.build().state_dict()
    size = sum(value.nbytes for value in start.values())
    if shutil.disk_usage(path.parent).free < 1.1 * num * size:
        raise InputError(f"{path.parent} has no room for {num} networks; lower --seen or name another --folder")
    zoo = Zoo.create(path, condition=task.condition)
    noise = 0.01 * torch.randn(size // 2)  # twice the values of a network
    seen = [number for number, split in enumerate(task.splits()) if split != "unseen"][:num]
    (path / "checkpoints").mkdir()
    entries = []
    for run, number in enumerate(seen):
        values = noise[torch.randint(size // 4, ()) :]
        name = f"checkpoints/{run:06d}.safetensors"
        state_dict = {key: value + values[: value.numel()].view_as(value) for key, value in start.items()}
        save_checkpoint(path / name, state_dict)
        entries.append(ZooEntry(name, run, 1, tuple(task.bits()[number].tolist()), split="train"))
    zoo.extend(entries)
    return zoo


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_command(main)
