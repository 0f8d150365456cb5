"""Training and generation of large networks on a CUDA GPU: peak memory, tokens a second, MFU, seconds a network.

Zoo and generator as in bench_scale.py. Without a GPU it says so and does nothing.

python scripts/bench_gpu.py [--networks convnext_large] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import Parser, run_command, write_figures
from bench_scale import NETWORKS, alone, prepare, recipe

from rpg.generation.generator import Generator
from rpg.generation.request import RequestOptions
from rpg.planning.plan import make_plan
from rpg.planning.zoo_summary import ZooSummary
from rpg.training.trainer import Trainer
from tokenization.zoo.zoo import Zoo

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165, "3090": 71}
"""Dense bf16 matrix products, from the vendor's data sheets; the first name found in the device's counts."""


def main() -> None:
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--networks", nargs="+", default=["convnext_large"], choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, help="sampling steps (default: the recipe's own)")
    parser.add_argument("--training-steps", type=int, default=30)
    parser.add_argument("--tile-tokens", type=int, default=4096, help="a GPU wants larger tiles than a CPU")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bf16, if it is not known here")
    parser.add_argument("--folder", type=Path, help="where the zoos are, or are made and kept; else a temporary one")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        return
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    peak = arguments.peak_tflops or next((v for k, v in PEAK_TFLOPS.items() if k in figures["device"]), None)
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.networks:
            folder = (arguments.folder or Path(temporary)) / name
            alone(prepare, name, folder)
            figures[name] = alone(measure_training, name, folder, arguments.training_steps, peak)
            figures[name] |= alone(measure_generation, folder, arguments.steps, arguments.tile_tokens)
    print(json.dumps(figures, indent=2))
    write_figures(arguments.json, figures)


def measure_training(name: str, folder: Path, num_steps: int, peak_tflops: float | None) -> dict[str, float | None]:
    """Median seconds of a step, tokens a second, MFU, and peak memory beside the planned one."""
    config = recipe("large", name, folder, f"train.steps={num_steps}", "train.precision=bf16")
    trainer = Trainer(config, resume=False, overwrite=True, say=print)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step, parts in trainer.sampler.prefetch(0, num_steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        trainer.train_step(step, parts)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    step_seconds = float(torch.tensor(seconds[num_steps // 4 :]).median())  # the first ones choose kernels
    plan = make_plan(config, ZooSummary.of(Zoo.open(config.zoo), config))
    rows = config.train.batch_size * (config.train.tokens or plan.zoo.layout.num_tokens)
    return {
        "training_step_seconds": step_seconds,
        "tokens_per_second": rows / step_seconds,
        "mfu": plan.training_flops / step_seconds / peak_tflops / 1e12 if peak_tflops else None,
        "training_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "training_planned_gib": plan.training.on_device / 2**30,
    }


def measure_generation(folder: Path, steps: int | None, tile_tokens: int) -> dict[str, float]:
    """Seconds of one network after loading, and peak memory.

    On the device a network is its coefficients; their product with the zoo's directions is made on the way to the file.
    """
    generator = Generator.from_pretrained(folder / "generator", "cuda")
    changed = generator.config.generate.model_copy(update={"tile_tokens": tile_tokens})
    generator.config = generator.config.model_copy(update={"generate": changed})
    request = generator.request(options=RequestOptions(steps=steps))
    figures: dict[str, float] = {}
    for _ in range(2):  # the first run chooses kernels
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _tile, _rows in generator.sampler().sample(request):
            pass
        torch.cuda.synchronize()
        figures["seconds_on_device"] = time.perf_counter() - started
    started = time.perf_counter()
    generator.generate(1, steps=steps, output=folder / "generated")
    figures["seconds_into_file"] = time.perf_counter() - started
    return figures | {"generation_peak_gib": torch.cuda.max_memory_allocated() / 2**30}


if __name__ == "__main__":
    run_command(main)
