"""Our recipe against the paper's, in one process on one zoo: seconds a network, accuracy for equal training time.

python scripts/bench.py [--seconds 60] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from _common import Figures, Parser, run_command, work_folder

from rpg.config import Config
from rpg.evaluation.report import accuracy
from rpg.experiments.single import collect, find_task
from rpg.generation.generator import Generator
from rpg.section import default_config
from rpg.training.loop import train


def main() -> None:
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--seconds", type=float, default=60, help="training time of both recipes")
    parser.add_argument("--num", type=int, default=50, help="networks of our recipe to score")
    parser.add_argument("--num-paper", type=int, default=5, help="networks of the paper's recipe to score")
    parser.add_argument("--zoo", default="runs/zoos/digits")
    options = parser.parse_args()

    figures = Figures(options.json)
    both = {"ddpm1000": {"sampler": "ddpm", "steps": 1000}, "ddim60": {"sampler": "ddim", "steps": 60, "eta": 0.05}}
    with work_folder(options.folder) as folder:
        ours = measure("digits.yaml", options, folder, options.num, {"": {}})
        paper = measure("paper/digits.yaml", options, folder, options.num_paper, both)
    seconds = paper["seconds_per_network"], ours["seconds_per_network"][""]
    speedups = {f"speedup_vs_{name}": seconds[0][name] / seconds[1] for name in both}
    figures.take(default=ours, paper=paper, original=ours.pop("original"), **speedups)


def measure(
    name: str, options: argparse.Namespace, folder: Path, num: int, samplers: dict[str, dict]
) -> dict[str, Any]:
    """Train a configuration for the given seconds, its schedule fitted to them; time and score what it generates."""
    overrides = [f"zoo={options.zoo}", f"run={folder / name}", "train.save_every=1000000"]
    config = Config.load(default_config(name), overrides)
    zoo = collect(config)
    task: Any = find_task(config, zoo)
    step_seconds = seconds_per_step(name, overrides)
    steps = max(1, int(options.seconds / step_seconds))
    config = Config.load(default_config(name), [*overrides, f"train.steps={steps}"])
    started = time.perf_counter()
    # The schedule's length is a forecast; the clock has the last word.
    generator = Generator.from_pretrained(train(config, overwrite=True, max_seconds=options.seconds))
    trained = time.perf_counter() - started
    seconds: dict[str, float] = {}
    scores: dict[str, float] = {}
    for label, sampler in samplers.items():
        generator.generate(1, seed=1, **{**sampler, "steps": 2})  # warm up
        began = time.perf_counter()
        networks: Any = generator.generate(num, seed=0, **sampler)
        seconds[label] = (time.perf_counter() - began) / num
        scores[label] = float(accuracy(task.predict(networks), task.labels()).mean())
    originals = [zoo.state_dict(index) for index in range(len(zoo))]
    return {
        "seconds_per_step": step_seconds,
        "steps": steps,
        "training_seconds": trained,
        "seconds_per_network": seconds,
        "accuracy": scores,
        f"accuracy_at_{options.seconds:.0f}s": next(iter(scores.values())),
        "original": float(accuracy(task.predict(originals), task.labels()).mean()),
    }


def seconds_per_step(name: str, overrides: list[str], num_steps: int = 12) -> float:
    """Median seconds of a training step, the first few left out."""
    times: list[float] = []

    def note(done: int, total: int, loss: float) -> None:
        times.append(time.perf_counter())

    config = Config.load(default_config(name), [*overrides, f"train.steps={num_steps}", "train.log_every=1"])
    train(config, overwrite=True, progress=note)
    return statistics.median(b - a for a, b in itertools.pairwise(times[3:]))


if __name__ == "__main__":
    run_command(main)
