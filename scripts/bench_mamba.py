"""Measure the Mamba-2 layer against transformers' Mamba2Mixer on the CPU: forward and backward, time and memory.

Times are taken alternately in one process, peak memory in a fresh process each, so that the ratios hold on a machine
that is busy with other work. The mixer runs with its default chunks and with those that suit it best here.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from _common import Parser, run_command, write_figures
from torch import nn

BATCH, LENGTH, WIDTH = 4, 1024, 512
CANDIDATES = {"ours, chunks of 64": 64, "Mamba2Mixer, chunks of 64": 64, "Mamba2Mixer, chunks of 256": 256}


def build(name: str) -> nn.Module:
    """Build a candidate of the agreed size."""
    torch.manual_seed(0)
    if name.startswith("ours"):
        from rpg.models.backbone.mamba2 import Mamba2

        return Mamba2(WIDTH, chunk_size=CANDIDATES[name])
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = Mamba2Config(
        hidden_size=WIDTH,
        num_heads=2 * WIDTH // 64,
        head_dim=64,
        state_size=128,
        n_groups=1,
        num_hidden_layers=1,
        chunk_size=CANDIDATES[name],
    )
    return Mamba2Mixer(config, layer_idx=0)


def step_of(layer: nn.Module, x: torch.Tensor, autocast: bool) -> Callable[[], None]:
    """One forward and backward pass."""

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(x).float().square().mean().backward()

    return step


def peak_memory(name: str, autocast: bool) -> float:
    """MiB that a step adds to the peak of a fresh process."""
    command = [sys.executable, __file__, "--memory-of", name, *(["--autocast"] if autocast else [])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def print_peak_memory(name: str, autocast: bool) -> None:
    """In the fresh process: print what one step adds to the peak, in MiB."""
    layer, x = build(name), torch.randn(BATCH, LENGTH, WIDTH)
    step = step_of(layer, x, autocast)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measure(repeats: int, autocast: bool) -> dict[str, dict[str, float]]:
    """Milliseconds and MiB of every candidate, and both as multiples of the first."""
    # Before anything grows here: Linux hands the peak of a process on to its children.
    memory = {name: peak_memory(name, autocast) for name in CANDIDATES}
    x = torch.randn(BATCH, LENGTH, WIDTH)
    steps = {name: step_of(build(name), x, autocast) for name in CANDIDATES}
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                times[name].append(1000 * (time.perf_counter() - start))
    results = {name: {"ms": min(times[name]), "MiB": memory[name]} for name in CANDIDATES}
    first = next(iter(results.values())).copy()
    for row in results.values():
        row.update({"time_ratio": row["ms"] / first["ms"], "memory_ratio": row["MiB"] / first["MiB"]})
    return results


def main() -> None:
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each candidate")
    parser.add_argument("--autocast", action="store_true", help="run under bf16 autocast")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_peak_memory(arguments.memory_of, arguments.autocast)
        return
    results = measure(arguments.repeats, arguments.autocast)
    print(f"B={BATCH} L={LENGTH} d_model={WIDTH}, forward + backward, {torch.get_num_threads()} threads")
    for name, row in results.items():
        time_column = f"{row['ms']:7.0f} ms ({row['time_ratio']:.2f}x)"
        print(f"{name:28} {time_column} {row['MiB']:7.0f} MiB ({row['memory_ratio']:.2f}x)")
    write_figures(arguments.json, results)


if __name__ == "__main__":
    run_command(main)
