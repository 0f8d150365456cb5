"""Time and memory by size: p-diff's training (arXiv 2402.13144, table 13), planned and measured, and recurrent
diffusion's generation by size and sampler.

The zoos are random values and the generators untrained: what is measured does not depend on them.

python scripts/bench_papers.py [--pdiff 2048:128 …] [--sizes 100000 …] [--json FILE]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import Parser, run_command, write_figures
from bench_scale import alone
from torch import nn

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.models.pdiff import ParameterDiffusion, PDiffConfig
from rpg.planning.peak import peak_resident_bytes
from rpg.planning.plan import make_plan
from rpg.planning.zoo_summary import ZooSummary
from rpg.training.loop import train
from rpg.training.trainer import build_network
from tokenization.layouts import fit_layout
from tokenization.zoo.zoo import Zoo

MIB = 1 << 20
BATCH = 50
"""p-diff's, in both stages."""

SAMPLERS = {"flow": (("euler", 4), ("heun", 4)), "ddpm": (("dpm-solver++", 20), ("ddim", 60), ("ddpm", 1000))}
"""By objective, with their usual steps."""

RECURRENT = (
    "tokens.size=1024",
    "model.backbone={kind: lstm, d_model: 128, num_layers: 1}",
    "model.denoiser={kind: mlp, width: 128, hidden: 256, depth: 2}",
)


def main() -> None:
    parser = Parser(__doc__, figures=True)
    table_13 = ["2048:128", "30016:256", "100288:512"]
    parser.add_argument("--pdiff", nargs="*", default=table_13, metavar="VALUES:LATENT", help="cases that are trained")
    parser.add_argument("--sizes", nargs="*", type=int, default=[100_000, 500_000, 2_000_000], help="values")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"pdiff": {}, "recurrent": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for case in arguments.pdiff:
            size, latent = map(int, case.split(":"))
            alone(make_zoo, Path(temporary) / case, size)
            found = alone(plan_pdiff, Path(temporary) / case, latent)
            found |= alone(train_pdiff, Path(temporary) / case, latent) | alone(denoise, latent)
            figures["pdiff"][case] = show(case, found)
        for size in arguments.sizes:
            alone(make_zoo, Path(temporary) / str(size), size)
            figures["recurrent"][size] = show(f"{size:,}", alone(generate, Path(temporary) / str(size)))
    write_figures(arguments.json, figures)


def show(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Print what was found, and give it back."""
    print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
    return found


def make_zoo(folder: Path, size: int) -> None:
    """Two checkpoints of one tensor of random values."""
    zoo = Zoo.create(folder)
    for step in range(2):
        zoo.append({"weight": torch.randn(size)}, run=0, step=step)


def pdiff_config(folder: Path, latent: int) -> Config:
    stage = f"{{steps: 2, learning_rate: 1.0e-4, batch_size: {BATCH}}}"
    model = f"model={{kind: pdiff, latent_size: {latent}, autoencoder: {stage}, latent: {stage}}}"
    return Config.defaults([f"zoo={folder}", f"run={folder}-run", "tokens.flatten=flat", model, "train.precision=fp32"])


def plan_pdiff(folder: Path, latent: int) -> dict[str, float]:
    """What `rpg plan` foresees, MiB."""
    config = pdiff_config(folder, latent)
    plan = make_plan(config, ZooSummary.of(Zoo.open(config.zoo), config))
    return {"planned MiB": (plan.training.total + plan.process) / MIB}


def train_pdiff(folder: Path, latent: int) -> dict[str, float]:
    """The peak of a whole run of two steps of each stage, MiB, and processor seconds a step of it."""
    started = time.process_time()
    train(pdiff_config(folder, latent))
    return {"measured MiB": peak_resident_bytes() / MIB, "processor s": time.process_time() - started}


def denoise(latent: int) -> dict[str, float]:
    """What two steps of the second stage alone add to a process, MiB."""
    before = peak_resident_bytes()
    network = ParameterDiffusion(PDiffConfig(latent_size=latent), num_values=32)
    parameters = list(nn.ModuleList([network.denoiser]).parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for _ in range(2):
        noise, time_ = torch.randn(BATCH, latent), network.objective.sample_time(BATCH, None)
        network(1, torch.randn(BATCH, latent), noise, time_).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"second stage MiB": (peak_resident_bytes() - before) / MIB}


def generate(folder: Path) -> dict[str, float]:
    """Of one network into memory: planned and measured peak, MiB, and processor seconds by sampler."""
    zoo, found = Zoo.open(folder), {}
    for objective, samplers in SAMPLERS.items():
        config = Config.defaults([f"zoo={folder}", *RECURRENT, f"model.diffusion.kind={objective}"])
        layout = fit_layout(zoo, config.tokens)
        network: Any = build_network(config, layout, zoo)
        generator = Generator(config, layout, network)
        for sampler, steps in samplers:
            started = time.process_time()
            generator.generate(1, sampler=sampler, steps=steps)
            found[f"{sampler} {steps}, s"] = time.process_time() - started
            if "measured MiB" not in found:
                found["measured MiB"] = peak_resident_bytes() / MIB
    plan = make_plan(config, ZooSummary.of(zoo, config))
    return {"planned MiB": (plan.generation.total + plan.process) / MIB, **found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_command(main)
