"""p-diff's training by size (arXiv 2402.13144, table 13): memory, planned and measured, and processor seconds.

The zoos are random values and the generators untrained: what is measured does not depend on them.

python scripts/bench_pdiff.py [VALUES:LATENT:BATCH …] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path

import torch
from _common import Figures, Parser, alone, measured, run_command, work_folder

from rpg.config import Config
from rpg.planning.plan import make_plan
from rpg.planning.zoo_summary import ZooSummary
from rpg.training.loop import train
from tokenization.zoo.zoo import Zoo

CASES = ["2048:128:50", "30016:256:50", "100288:512:50"]


def make_zoo(folder: Path, size: int) -> None:
    """Two checkpoints of one tensor of random values."""
    zoo = Zoo.create(folder)
    for step in range(2):
        zoo.append({"weight": torch.randn(size)}, run=0, step=step)


def config_of(folder: Path, latent: int, batch: int) -> Config:
    """Two steps of each stage."""
    stage = f"{{steps: 2, learning_rate: 1.0e-4, batch_size: {batch}}}"
    model = f"model={{kind: pdiff, latent_size: {latent}, autoencoder: {stage}, latent: {stage}}}"
    return Config.defaults([f"zoo={folder}", f"run={folder}-run", "tokens.flatten=flat", model, "train.precision=fp32"])


def plan_of(folder: Path, latent: int, batch: int) -> float:
    """What `rpg plan` foresees, GiB."""
    config = config_of(folder, latent, batch)
    plan = make_plan(config, ZooSummary.of(Zoo.open(config.zoo), config))
    return round((plan.training.total + plan.process) / 2**30, 2)


def run(folder: Path, latent: int, batch: int) -> None:
    """The whole run."""
    train(config_of(folder, latent, batch))


def main() -> None:
    """Plan and train every case, each in a process of its own."""
    parser = Parser(__doc__, figures=True)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="VALUES:LATENT:BATCH")
    arguments = parser.parse_args()
    figures = Figures(arguments.json)
    with work_folder(arguments.folder) as folder:
        for case in arguments.cases:
            size, latent, batch = map(int, case.split(":"))
            alone(make_zoo, folder / case, size)
            planned = alone(plan_of, folder / case, latent, batch)
            figures.take(case, planned_gib=planned, **measured(run, folder / case, latent, batch, threads=1))


if __name__ == "__main__":
    run_command(main)
