"""The peaks that `rpg plan` foresees against what processes really take: resident memory on a CPU.

python scripts/check_plan.py [--cases NAME …] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path

import torch
from _common import Figures, Parser, alone, make_zoo, peak_resident_bytes, run_command, work_folder
from rich.console import Console
from rich.table import Table

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.planning.plan import make_plan
from rpg.planning.zoo_summary import ZooSummary
from rpg.section import default_config
from rpg.training.loop import train
from tokenization.zoo.zoo import Zoo

MAMBA = "model.backbone={kind: mamba2, d_model: 512, num_layers: 2}"
UNET = "model.denoiser={kind: unet1d, channels: [1, 8, 16, 8, 1]}"
FP32 = ("train.precision=fp32", "generate.precision=fp32")

CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "convnext_atto": ("large/convnext_atto.yaml", "convnext_atto", ()),
    "convnext_atto, fp32": ("large/convnext_atto.yaml", "convnext_atto", FP32),
    "convnext_atto, 4 parts": (
        "large/convnext_atto.yaml", "convnext_atto", ("train.gradient_accumulation=4", "train.batch_size=8"),
    ),
    "vit_tiny, mamba2": ("large/vit_tiny.yaml", "vit_tiny_patch16_224", (MAMBA, "train.tokens=256")),
    "vit_tiny, transformer": (
        "large/vit_tiny.yaml", "vit_tiny_patch16_224",
        ("model.backbone={kind: transformer, d_model: 512, num_layers: 4, num_heads: 8}", "train.tokens=256"),
    ),
    "convnext_atto, unet1d": (
        "large/convnext_atto.yaml", "convnext_atto", 
        ("tokens.rank=null", UNET, "train.tokens=32", "generate.tile_tokens=32", "generate.steps=2"),
    ),
    "resnet18": ("large/resnet18.yaml", "resnet18", ("train.tokens=512",)),
    "vit_small": ("large/vit_small.yaml", "vit_small_patch16_224", ("train.tokens=512",)),
    "vit_base": ("large/vit_base.yaml", "vit_base_patch16_224", ("train.tokens=512", "generate.steps=1")),
    "convnext_large": ("large/convnext_large.yaml", "convnext_large", ("train.tokens=512", "generate.steps=1")),
}  # fmt: skip
"""Configuration, timm's network, and what is changed so that two steps do not take minutes."""


def main() -> None:
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME")
    arguments = parser.parse_args()
    table = Table("configuration", "training: plan", "measured", "error", "generation: plan", "measured", "error")
    figures = Figures(arguments.json)
    with work_folder(arguments.folder) as folder:
        for name in arguments.cases:
            figures.take(name, **check(name, folder / name))
            cells = []
            for kind in ("training", "generation"):
                plan, measured = figures[name][kind]["plan"], figures[name][kind]["measured"]
                cells += [f"{plan / 2**20:,.0f} MiB", f"{measured / 2**20:,.0f} MiB", f"{plan / measured - 1:+.1%}"]
            table.add_row(name, *cells)
    Console().print(table)


def check(name: str, folder: Path) -> dict[str, dict[str, int]]:
    """Plan, then train two steps and generate a network, each in a process of its own."""
    alone(make_zoo, folder / "zoo", 2, CASES[name][1])
    training, generation, process = alone(planned, name, folder)
    return {
        "training": {"plan": training + process, "measured": alone(measure_training, name, folder)},
        "generation": {"plan": generation + process, "measured": alone(measure_generation, name, folder)},
    }


def config_of(name: str, folder: Path) -> Config:
    file, _, overrides = CASES[name]
    fixed = [f"zoo={folder / 'zoo'}", f"run={folder / 'run'}", "train.steps=2"]
    return Config.load(default_config(file), [*fixed, *overrides])


def planned(name: str, folder: Path) -> tuple[int, int, int]:
    """Bytes of training, of generation, and of Python and its libraries."""
    config = config_of(name, folder)
    plan = make_plan(config, ZooSummary.of(Zoo.open(config.zoo), config))
    return plan.training.total, plan.generation.total, plan.process


def measure_training(name: str, folder: Path) -> int:
    train(config_of(name, folder))
    return peak_resident_bytes()


def measure_generation(name: str, folder: Path) -> int:
    Generator.from_pretrained(folder / "run").generate(1, output=folder / "generated")
    return peak_resident_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_command(main)
