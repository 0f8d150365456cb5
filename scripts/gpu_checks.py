"""What scripts/check_gpu.sh compares, one check a call; prints one line and exits with 3 where it has to be left out.

python scripts/gpu_checks.py mamba2 --device cuda
python scripts/gpu_checks.py losses --runs runs/check_gpu --run ddp --tolerance 1e-3
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from _common import Parser, run_command
from torch import Tensor, nn

from rpg.generation.generator import Generator
from rpg.models.backbone.mamba2 import Mamba2, fused_scan
from rpg.models.denoiser import MLPConfig, UNet1dConfig, build_denoiser
from rpg.packages import install_command
from tokenization.files import file_digest

LEFT_OUT = 3
REFERENCE = "one_process"
"""The run that the others are compared with."""

FP32, BF16 = 1e-4, 0.05
"""Relative errors up to which two ways of computing are the same."""


class LeftOutError(Exception):
    """Why a check cannot be made here."""


def outcome(network: nn.Module, inputs: tuple[Any, ...], bf16: bool = False) -> dict[str, Tensor]:
    """Output, gradients of all parameters and of the first input, and buffers after a forward and a backward pass."""
    device, dtype = next((each.device, each.dtype) for each in network.parameters())
    first, *others = (each.to(device, dtype) for each in inputs)
    network.zero_grad()
    first = first.detach().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        found = network(first, *others)
    found.float().square().mean().backward()
    tensors = {"output": found, "input": first.grad}
    tensors |= {name: parameter.grad for name, parameter in network.named_parameters()}
    tensors |= dict(network.named_buffers())
    return {name: value.detach().double().cpu() for name, value in tensors.items()}


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> float:
    """The largest relative error among tensors of the same names.

    Raises:
        AssertionError: one is over ``limit`` or not finite; names the tensor.
    """
    assert found.keys() == expected.keys()
    errors = {}
    for name, value in found.items():
        errors[name] = ((value - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)).item()
        assert errors[name] <= limit, f"{name} differs by {errors[name]:.1e}, more than {limit:g}"
    return max(errors.values())


def mamba2_layer() -> tuple[Mamba2, tuple[Tensor]]:
    """A layer that the kernels take, and its input."""
    torch.manual_seed(0)
    return Mamba2(128, d_state=64, headdim=32), (torch.randn(2, 300, 128),)


def check_mamba2(device: torch.device) -> str:
    """The layer in plain PyTorch against one that takes a token at a time, on the CPU."""
    layer, inputs = mamba2_layer()
    slow = copy.deepcopy(layer)
    slow.chunk_size = 1
    layer.kernel = lambda device: None  # type: ignore[method-assign]
    error = worst(outcome(layer.to(device), inputs), outcome(slow, inputs), FP32)
    return f"plain PyTorch is the recurrence to {error:.1e}"


def check_mamba2_fused(device: torch.device) -> str:
    """The kernels of mamba_ssm against plain PyTorch, in fp32 and bf16."""
    if device.type != "cuda" or fused_scan() is None:
        raise LeftOutError(f"needs a CUDA device and {install_command('mamba-ssm', 'causal-conv1d')}")
    layer, inputs = mamba2_layer()
    plain = copy.deepcopy(layer)
    plain.kernel = lambda device: None  # type: ignore[method-assign]
    assert layer.to(device).kernel(device) is not None, "the layer does not take the kernel"
    expected = outcome(plain.to(device), inputs)
    errors = [worst(outcome(layer, inputs, bf16), expected, BF16 if bf16 else 2e-3) for bf16 in (False, True)]
    return f"the kernels are plain PyTorch to {errors[0]:.1e}, in bf16 to {errors[1]:.1e}"


def denoisers() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Both denoisers, and rows, times and prototypes for them."""
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {}
    for config in (UNet1dConfig(channels=(1, 8, 16, 8, 1), d_time=32), MLPConfig(width=64, hidden=64)):
        denoiser = build_denoiser(config, 96, 48, 40)
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, std=0.2)
        made[config.kind] = _Whole(denoiser), (torch.randn(40, 96), torch.rand(40) * 1000, torch.randn(40, 48))
    return made


class _Whole(nn.Module):
    """A denoiser with what it computes beforehand."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, time: Tensor, prototype: Tensor) -> Tensor:
        return self.denoiser(x, time, self.denoiser.precompute(prototype))


def check_unet(device: torch.device) -> str:
    """The U-Net in training, batch statistics included, against float64 on the CPU."""
    network, inputs = denoisers()["unet1d"]
    exact: Any = copy.deepcopy(network).double()
    exact.denoiser.time.hidden.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    expected = outcome(exact, inputs)
    error = worst(outcome(network.to(device), inputs), expected, 1e-3)
    return f"fp32 is float64 to {error:.1e}"


def check_bf16(device: torch.device) -> str:
    """Denoisers and the backbone under bf16 against fp32: what they give, as gradients of small networks vary more."""
    layer, tokens = mamba2_layer()
    said = []
    for name, (network, inputs) in {**denoisers(), "mamba2": (layer, tokens)}.items():
        fast, slow = (outcome(network.to(device), inputs, bf16)["output"] for bf16 in (True, False))
        assert not torch.equal(fast, slow), f"{name} is not computed in bf16"
        said.append(f"{name} to {worst({'output': fast}, {'output': slow}, BF16):.1e}")
    return "bf16 is fp32: " + ", ".join(said)


def check_generate_bytes(device: torch.device, runs: Path) -> str:
    """The same bytes whatever is asked for beside them, and on every device of the type."""
    names = [str(device)]
    if device.type == "cuda":
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    digests = []
    for name in names:
        generator = Generator.from_pretrained(runs / REFERENCE, name)
        for num in (3, 2):
            made = generator.generate(num, seed=5, output=runs / "generated" / f"{name}-{num}".replace(":", "-"))
            digests.append([file_digest(Path(each)) for each in made][:2])  # type: ignore[arg-type]
    assert all(each == digests[0] for each in digests), "the same seed gives other bytes"
    return f"the same seed gives the same bytes on {', '.join(names)}"


def check_same_files(runs: Path, folders: tuple[str, str]) -> str:
    """Two folders of generated networks hold the same bytes."""
    one, other = ({file.name: file_digest(file) for file in (runs / name).iterdir()} for name in folders)
    assert one and one == other, f"{folders[1]} has other bytes than {folders[0]}"
    return f"{folders[1]} has the bytes of {folders[0]}"


def check_losses(runs: Path, run: str, tolerance: float, device: torch.device) -> str:
    """A run's losses against those of one process; a network can be generated by it."""
    logs = ((runs / name / "metrics.jsonl").read_text().splitlines() for name in (REFERENCE, run))
    one, other = ([json.loads(line)["loss"] for line in lines] for lines in logs)
    error = max(abs(a - b) / max(1, abs(a)) for a, b in zip(one, other, strict=True))
    assert error <= tolerance, f"{run} has other losses than one process, by {error:.1e}"
    Generator.from_pretrained(runs / run, device).generate(1)
    return f"{len(other)} steps, losses of one process to {error:.1e}"


CHECKS: dict[str, Callable[[Any, torch.device], str]] = {
    "mamba2": lambda arguments, device: check_mamba2(device),
    "mamba2_fused": lambda arguments, device: check_mamba2_fused(device),
    "unet": lambda arguments, device: check_unet(device),
    "bf16": lambda arguments, device: check_bf16(device),
    "generate_bytes": lambda arguments, device: check_generate_bytes(device, arguments.runs),
    "same_files": lambda arguments, device: check_same_files(arguments.runs, tuple(arguments.folders)),
    "losses": lambda arguments, device: check_losses(arguments.runs, arguments.run, arguments.tolerance, device),
}


def main() -> int | None:
    parser = Parser(__doc__)
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--runs", type=Path, default=Path("runs/check_gpu"), help="folder of the runs")
    parser.add_argument("--run", default="", help="losses: which run")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="losses: the largest relative difference")
    parser.add_argument("--folders", nargs=2, default=["", ""], help="same_files: which two folders of the runs'")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        print(CHECKS[arguments.check](arguments, torch.device(arguments.device)))
    except LeftOutError as reason:
        print(reason)
        return LEFT_OUT
    return None


if __name__ == "__main__":
    run_command(main)
