"""Configurations of a second, and what each page takes for granted: checkpoints, adapters, pictures of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from rpg.config import Config
from rpg.tasks import build_task
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.docs.blocks import Sandbox
from tests.hub_server import use_hub
from tests.rpg.commands import CONDITIONAL, SUBSETS
from tests.rpg.commands import SMALL as SECTIONS
from tests.rpg.generation.test_adapters import adapters_at
from tests.rpg.generation.test_texts import TEXTS, encoder_at

DIGITS = {"train_steps": 40, "steps": 6}
SCORES = {"num": 3, "num_baseline": 2, "baselines": ["noise", "run_average"]}
FIELDS = {
    "model": {"state": {"width": 12, "prior": {"width": 32, "depth": 1, "steps": 8}}},
    "train": {"steps": 20, "log_every": 10, "splits": ["train", "validation"]},
}
TICKETS = {
    **SUBSETS, "base": {"steps": 2}, "finetune": {"stages": [{"steps": 4}], "batch_size": 32},
}  # fmt: skip
SENSORS = {
    **SECTIONS,
    "task": {
        "seen": 8, "validation": 3, "unseen": 3, "generalist": {"steps": 10}, "specialist": {"steps": 10, "images": 16},
    },
    "evaluate": {"informed": 5, "fine_tuning": [0, 2], "meta_learning": 2},
}  # fmt: skip
RUNS = {"runs": 24, "validation": 3, "unseen": 4, "hidden": 8, "steps": [0, 5, 15], "group": 8}
ADAPTERS = {"tokens": {"size": 32, "rank": None}, "evaluate": {**SCORES, "baselines": ["nearest_seen", "kernel_ridge"]}}

STEPS = {"train_steps": 2, "steps": 8, "batch_size": 4}
STEPWISE = {
    "model": {"state": {"width": 3}},
    "train": {"steps": 8, "save_every": 8},
    "evaluate": {"num": 2, "num_baseline": 2},
}

SMALL: dict[str, dict[str, Any]] = {
    "digits.yaml": {**SECTIONS, "task": DIGITS, "evaluate": SCORES},
    "demo.yaml": SENSORS,
    "sensors.yaml": SENSORS,
    "digits_demo.yaml": {
        **SECTIONS,
        "task": {"runs": 3, **DIGITS},
        "model": {"state": {"width": 4}},
        "evaluate": SCORES,
    },
    "digits_unseen.yaml": {**CONDITIONAL, "task": SUBSETS},
    "fields.yaml": {**FIELDS, "task": {"hidden": 16, "altered": 1, "data": "IMAGES"}},
    "fields3d.yaml": {
        **FIELDS,
        "generate": {"state": "stored"},
        "task": {"hidden": 16, "num_shapes": 96, "image_size": 8, "held_out": 0.2},
    },
    "gpt.yaml": {**SECTIONS, "task": RUNS, "model": {"backbone": {"d_model": 16, "num_layers": 1}}},
    "sparse.yaml": {
        **SECTIONS,
        "task": {"train_steps": 40, "runs": 2, "steps": 2, "compress": {"steps": 10}},
        "model": {"state": {"width": 2}},
        "evaluate": {"num": 2, "num_baseline": 2, "baselines": ["noise"]},
    },
    "lora/folder.yaml": {**SECTIONS, **ADAPTERS},
    "tickets.yaml": {**SECTIONS, "task": {"family": TICKETS, "rounds": 2}, "model": {"backbone": {"d_model": 16}}},
    "segmentation.yaml": {**STEPWISE, "task": {**STEPS, "canvases": 16}},
    "detection.yaml": {**STEPWISE, "task": {**STEPS, "data": {"train": 16, "scored": 4}}},
    "unet.yaml": {**STEPWISE, "task": {**STEPS, "samples": 8, "sample_steps": 2}},
    "sweeps/position.yaml": {
        "set": ["train.steps=8", "evaluate.num=2", "evaluate.baselines=[]"],
        "entries": [{"name": "2d", "set": ["model.position=2d"]}],
    },
}
"""Changes to configurations that pages name, so that each takes a second."""


def _readme(sandbox: Sandbox, patch: pytest.MonkeyPatch) -> None:
    timm_networks(sandbox.folder / "checkpoints")
    use_hub(sandbox.folder / "server", patch)


def _hub(sandbox: Sandbox, patch: pytest.MonkeyPatch) -> None:
    """A run and its zoo, and a hub of this machine."""
    place = sandbox.folder / "runs"
    make_zoo(place / "zoos" / "digits_demo")
    train(
        small_config(place, zoo="runs/zoos/digits_demo", run="runs/digits_demo", train={"steps": 1}), say=lambda _: None
    )
    use_hub(sandbox.folder / "server", patch)


def _own(sandbox: Sandbox, _: pytest.MonkeyPatch) -> None:
    """Linear classifiers of the digits, as a training script leaves them."""
    from rpg.tasks.images.digits import load_splits

    splits, folder = load_splits(), sandbox.folder
    images = {name: each.flatten(1) for name, each in splits.images.items()}
    torch.save((images["validation"], splits.labels["validation"]), folder / "held_out.pt")
    for name in ("checkpoints", "named"):
        (folder / name).mkdir()
    rows = ["file,run,step,accuracy"]
    for seed in range(2):
        torch.manual_seed(seed)
        network = torch.nn.Linear(64, 10)
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        for step in range(1, 9):
            loss = torch.nn.functional.cross_entropy(network(images["train"]), splits.labels["train"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.save(network.state_dict(), folder / "checkpoints" / f"{seed}-{step}.pth")
            torch.save({"state_dict": network.state_dict()}, folder / "named" / f"seed{seed}_step{step}.pth")
            rows.append(f"named/seed{seed}_step{step}.pth,seed{seed},{step},{1 - loss.item() / 10:.3f}")
    (folder / "runs.csv").write_text("\n".join(rows) + "\n")


def timm_networks(folder: Path) -> None:
    """Four networks of timm in safetensors."""
    import timm

    folder.mkdir()
    for seed in range(4):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / f"{seed}.safetensors")


def _lora(sandbox: Sandbox, _: pytest.MonkeyPatch) -> None:
    """Adapters of a tiny Llama that PEFT saved, a text for each, and a sentence encoder."""
    folder, prompt = sandbox.folder, "answer in the style of a pirate"
    adapters_at(folder, "llama", num=4)
    shutil.copytree(folder / "base", folder / "the" / "base")
    rows = [f'adapters/task{place},"{text}"' for place, text in enumerate((*TEXTS[:3], prompt))]
    (folder / "conditions.csv").write_text("\n".join(["file,condition", *rows]) + "\n")
    (folder / "mine.py").write_text(
        "def loss(adapter):\n    return sum(float(v.square().mean()) for v in adapter.values())\n"
    )
    path = folder / "configs" / "lora" / "folder.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["model"]["condition"] = {"kind": "text", "encoder": encoder_at(folder / "encoder"), "dropout": 0.1}
    path.write_text(yaml.safe_dump(tree))


def _fields(sandbox: Sandbox, patch: pytest.MonkeyPatch) -> None:
    """Images and meshes of ten classes; one set of networks a kind, where the experiment averages five."""
    import trimesh

    patch.setattr("rpg.labs.fields.experiment.NUM_SETS", 1)
    patch.setattr("rpg.evaluation.field_measures.STEPS", 10)
    patch.setattr("rpg.labs.fields.pictures.FINE", 20)
    patch.setattr("rpg.labs.fields.pictures.PER_CLASS", 2)
    rng = torch.Generator().manual_seed(0)
    for digit in range(10):
        for folder in ("IMAGES", "MESHES"):
            (sandbox.folder / folder / str(digit)).mkdir(parents=True)
        for number in range(12):
            pixels = (255 * torch.rand(8, 8, generator=rng)).byte().numpy()
            Image.fromarray(pixels).save(sandbox.folder / "IMAGES" / str(digit) / f"{number}.png")
            sides = (0.5 + torch.rand(3, generator=rng)).tolist()
            trimesh.creation.box(sides).export(sandbox.folder / "MESHES" / str(digit) / f"{number}.ply")


def _metric(sandbox: Sandbox, patch: pytest.MonkeyPatch) -> None:
    """First weights to go on from; few rates for the optimizers beside the generator."""
    patch.setattr("rpg.labs.training_runs.experiment.RATES", {"adam": (0.01,), "sgd": (0.1,)})
    config = Config.load(sandbox.folder / "configs" / "gpt.yaml")
    save_file(build_task(config.task).build().state_dict(), sandbox.folder / "start.safetensors")


def _tickets(sandbox: Sandbox, patch: pytest.MonkeyPatch) -> None:
    """One process: others would take longer to start than to work."""
    patch.setattr("rpg.tasks.collecting.num_cores", lambda: 1)


def _unseen(sandbox: Sandbox, _: pytest.MonkeyPatch) -> None:
    """A tiny language model to read words with; what it answers is worth nothing."""
    encoder_at(sandbox.folder / "PATH_OR_NAME", "llama")


PREPARED: dict[str, Callable[[Sandbox, pytest.MonkeyPatch], None]] = {
    "README": _readme,
    "fields": _fields,
    "hub": _hub,
    "lora": _lora,
    "metric": _metric,
    "own-checkpoints": _own,
    "tickets": _tickets,
    "unseen": _unseen,
}
"""What the pages take for granted, by their names."""
