"""Whole large networks on this machine: seconds, memory and FLOPs of our recipe, and those of the paper's.

The zoos are random checkpoints and the generators untrained: what is measured does not depend on the values. A zoo has
just as many checkpoints as give every token all the directions of the recipe. With ``--device cuda``: peak memory,
tokens a second, MFU and seconds a network on a GPU.

python scripts/bench_scale.py [--networks vit_base convnext_large] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import GIB, Figures, Parser, alone, make_zoo, measured, peak_resident_bytes, run_command, work_folder

from rpg.config import Config
from rpg.diffusion import build_objective, randn
from rpg.generation.generator import Generator
from rpg.models import RecurrentConfig
from rpg.models.recurrent_diffusion import build_denoiser
from rpg.planning.plan import build_estimator, make_plan
from rpg.planning.zoo_summary import ZooSummary
from rpg.section import default_config
from rpg.seeding import make_rng
from rpg.training.data import TrainingSet
from rpg.training.trainer import Trainer
from tokenization.layouts import fit_layout
from tokenization.zoo.zoo import Zoo

NETWORKS = {"vit_base": "vit_base_patch16_224", "convnext_large": "convnext_large"}
"""timm's names of the target networks."""

ZOO_DTYPE = torch.bfloat16
"""Of the checkpoints on disk, as fine-tuning in bf16 leaves them."""

PAPER_TOKENS = 32
"""Tokens of the paper's denoiser that are timed together; its cost is proportional to their number."""


PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165, "3090": 71}
"""Dense bf16 matrix products, from the vendor's data sheets; the first name found in the device's counts."""


def main() -> None:
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, help="sampling steps of our recipe (default: its own)")
    parser.add_argument("--training-steps", type=int, default=8, help="steps that are measured; 0: none on a CPU")
    parser.add_argument("--tile-tokens", type=int, default=4096, help="on a GPU, which wants larger tiles than a CPU")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in bf16, if it is not known here")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device")
    figures = Figures(arguments.json)
    steps, training_steps = arguments.steps, arguments.training_steps
    with work_folder(arguments.folder) as folder:
        for name in arguments.networks:
            place = folder / name
            figures.take(name, **alone(prepare, name, place))
            if arguments.device == "cuda":
                figures.take(name, **alone(gpu_training, name, place, training_steps, arguments.peak_tflops))
                figures.take(name, **alone(gpu_generation, place, steps, arguments.tile_tokens))
                continue
            figures.take(name, **alone(generate, place, steps))
            figures.take(name, **alone(chunk_times, name, place))
            figures.take(name, **alone(flops, name, place, steps))
            if training_steps:
                figures.take(name, training=measured(data_wait, name, place, training_steps))


def recipe(kind: str, name: str, folder: Path, *overrides: str) -> Config:
    """Our configuration (``large``) or the paper's (``paper``) for a network."""
    places = [f"zoo={folder / 'zoo'}", f"run={folder / 'run'}"]
    return Config.load(default_config(f"{kind}/{name}.yaml"), [*places, *overrides])


def prepare(name: str, folder: Path) -> dict[str, float]:
    """A zoo of random checkpoints and an untrained generator for it: how long its statistics and directions took."""
    folder.mkdir(parents=True, exist_ok=True)
    config = recipe("large", name, folder)
    zoo = make_zoo(folder / "zoo", rank_of(config) + 1, NETWORKS[name], ZOO_DTYPE)
    started = time.perf_counter()
    layout = fit_layout(zoo, config.tokens)
    figures = {"fit_seconds": time.perf_counter() - started}
    data = TrainingSet(zoo, config)
    network: Any = data.build_network(layout)
    data.fit_closed_form(network, layout)
    for parameter in network.parameters():
        if not parameter.any():  # untrained, the last layer is zero
            torch.nn.init.normal_(parameter, std=0.02)
    Generator(config, layout, network).save_pretrained(folder / "generator")
    return figures


def rank_of(config: Config) -> int:
    """The numbers that a token is for our recipe."""
    assert isinstance(config.tokens.rank, int)
    return config.tokens.rank


def generate(folder: Path, steps: int | None) -> dict[str, float]:
    """Seconds of one whole network into a file, loading apart; the highest resident memory, loading included."""
    generator = Generator.from_pretrained(folder / "generator")
    started, processor = time.perf_counter(), time.process_time()
    generator.generate(1, steps=steps, output=folder / "generated")
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,  # of all threads; says more where others compute too
        "peak_rss_gib": peak_resident_bytes() / GIB,
        "generator_parameters": sum(parameter.numel() for parameter in generator.network.parameters()),
        "network_values": generator.layout.num_values,
        "tokens": generator.layout.num_tokens,
    }


def chunk_times(name: str, folder: Path, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of one denoiser call per token, both recipes in turn in this process; the fastest of a few.

    Each recipe has the number of tokens a call and the precision that suit it best: the paper's is timed in both. Our
    product with the zoo's directions, once a token and not once a step, is in ``seconds`` of the whole network.
    """
    ours = recipe("large", name, folder)
    paper = recipe("paper", name, folder)
    candidates = {
        "ours": (ours, ours.generate.tile_tokens, ours.generate.precision == "bf16"),
        "paper_fp32": (paper, PAPER_TOKENS, False),
        "paper_bf16": (paper, PAPER_TOKENS, True),
    }
    calls = {label: denoiser_call(*candidate) for label, candidate in candidates.items()}
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(repeats + 1):
        for label, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[label].append((time.perf_counter() - started) / candidates[label][1])
    best = {label: 1000 * min(times[1:]) for label, times in seconds.items()}
    figures = {f"token_step_ms_{label}": milliseconds for label, milliseconds in best.items()}
    return {"chunk_time_ratio": min(best["paper_fp32"], best["paper_bf16"]) / best["ours"], **figures}


def denoiser_call(config: Config, num_tokens: int, bf16: bool) -> Callable[[], None]:
    """One step of ``num_tokens`` tokens: what is called is timed."""
    size = config.tokens.size if config.tokens.rank is None else rank_of(config)
    # The prototypes are as wide as the backbone's output; its depth does not matter here.
    assert isinstance(config.model, RecurrentConfig)
    backbone = config.model.backbone
    width = (getattr(backbone, "widths", None) or [backbone.d_model])[-1]
    denoiser = build_denoiser(config.model.denoiser, size, width, num_tokens).eval().requires_grad_(False)
    if bf16:
        for module in denoiser.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.bfloat16()
    objective = build_objective(config.model.diffusion)
    x = randn((num_tokens, size), make_rng(0, "bench"), "cpu")
    time_ = torch.as_tensor(objective.last_time)
    network_time = objective.network_time(time_).float().expand(num_tokens)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        context = denoiser.precompute(torch.randn(num_tokens, width))

    def call() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            denoiser(x, network_time, context).float()

    return call


def flops(name: str, folder: Path, steps: int | None) -> dict[str, float]:
    """FLOPs of one network by both recipes: the paper's with its own number of steps."""
    zoo = Zoo.open(folder / "zoo")
    counts = {}
    for kind, num_steps in (("large", steps), ("paper", None)):
        config = recipe(kind, name, folder)
        counts[kind] = build_estimator(config, ZooSummary.of(zoo, config)).generation_flops(num_steps).total
    return {
        "tflop": counts["large"] / 1e12,
        "paper_tflop": counts["paper"] / 1e12,
        "flops_ratio": counts["paper"] / counts["large"],
    }


def data_wait(name: str, folder: Path, num_steps: int) -> dict[str, float]:
    """Seconds of a training step of our recipe, and the longest (p99) wait for its data as a share of the step."""
    config = recipe("large", name, folder, f"train.steps={num_steps + 1}")
    trainer = Trainer(config, resume=False, overwrite=True, say=print)
    waits, steps = [], []
    batches = iter(trainer.sampler.prefetch(0, trainer.num_steps))
    for _ in range(num_steps + 1):
        started = time.perf_counter()
        step, parts = next(batches)
        waits.append(time.perf_counter() - started)
        trainer.train_step(step, parts)
        steps.append(time.perf_counter() - started)
    del batches, trainer
    gc.collect()
    shares = torch.tensor(waits[1:]) / torch.tensor(steps[1:])  # nothing could be read ahead of the first step
    return {
        "training_step_seconds": float(torch.tensor(steps[1:]).median()),
        "training_rows": config.train.batch_size * (config.train.tokens or 0),
        "data_wait_share_p99": float(shares.quantile(0.99)),
    }


def gpu_training(name: str, folder: Path, num_steps: int, peak_tflops: float | None) -> dict[str, Any]:
    """Median seconds of a step, tokens a second, MFU, and peak memory beside the planned one."""
    device = torch.cuda.get_device_name()
    peak_tflops = peak_tflops or next((value for key, value in PEAK_TFLOPS.items() if key in device), None)
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
    rows = config.train.batch_size * (config.train.tokens or plan.estimator.zoo.layout.num_tokens)
    return {
        "device": device,
        "training_step_seconds": step_seconds,
        "tokens_per_second": rows / step_seconds,
        "mfu": plan.training_flops / step_seconds / peak_tflops / 1e12 if peak_tflops else None,
        "training_peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "training_planned_gib": plan.training.on_device / GIB,
    }


def gpu_generation(folder: Path, steps: int | None, tile_tokens: int) -> dict[str, float]:
    """Seconds of one network after loading, and peak memory.

    On the device a network is its coefficients; their product with the zoo's directions is made on the way to the file.
    """
    generator = Generator.from_pretrained(folder / "generator", "cuda")
    changed = generator.config.generate.model_copy(update={"tile_tokens": tile_tokens})
    generator.config = generator.config.model_copy(update={"generate": changed})
    request = generator.request(steps=steps)
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
    return figures | {"generation_peak_gib": torch.cuda.max_memory_allocated() / GIB}


if __name__ == "__main__":
    run_command(main)
