"""A device computes what the CPU computes exactly: the networks' kernels, their gradients and bf16.

On the CPU by default; ``DEVICE=cuda`` runs the same on a GPU (`scripts/check_gpu.sh`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.models import mamba2, unet1d
from rpg.models.denoiser import MLPConfig
from rpg.models.mamba2 import Mamba2, fused_scan
from rpg.models.recurrent_diffusion import build_denoiser
from rpg.models.unet1d import UNet1dConfig

DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))
FP32, BF16 = 1e-4, 0.05
"""Relative errors up to which two ways of computing are the same."""


torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


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


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> None:
    """No tensor has a relative error over ``limit``."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = ((value - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)).item()
        assert error <= limit, f"{name} differs by {error:.1e}, more than {limit:g}"


def mamba2_layer() -> tuple[Mamba2, tuple[Tensor]]:
    """A layer that the kernels take, and its input."""
    torch.manual_seed(0)
    return Mamba2(128, d_state=64, headdim=32), (torch.randn(2, 300, 128),)


def test_mamba2() -> None:
    """The layer in plain PyTorch against one that takes a token at a time, on the CPU."""
    layer, inputs = mamba2_layer()
    slow = copy.deepcopy(layer)
    slow.chunk_size = 1
    layer.kernel = lambda device: None  # type: ignore[method-assign]
    assert_close(outcome(layer.to(DEVICE), inputs), outcome(slow, inputs), FP32)


@pytest.mark.skipif(DEVICE.type != "cuda" or fused_scan() is None, reason="needs a CUDA device and mamba-ssm")
def test_mamba2_fused() -> None:
    """The kernels of mamba_ssm against plain PyTorch, in fp32 and bf16."""
    layer, inputs = mamba2_layer()
    plain = copy.deepcopy(layer)
    plain.kernel = lambda device: None  # type: ignore[method-assign]
    assert layer.to(DEVICE).kernel(DEVICE) is not None, "the layer does not take the kernel"
    expected = outcome(plain.to(DEVICE), inputs)
    for bf16, limit in ((False, 2e-3), (True, BF16)):
        assert_close(outcome(layer, inputs, bf16), expected, limit)


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


def test_unet() -> None:
    """The U-Net in training, batch statistics included, against float64 on the CPU."""
    network, inputs = denoisers()["unet1d"]
    exact: Any = copy.deepcopy(network).double()
    exact.denoiser.time.hidden.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    expected = outcome(exact, inputs)
    assert_close(outcome(network.to(DEVICE), inputs), expected, 1e-3)


def test_bf16() -> None:
    """Denoisers and the backbone under bf16 against fp32: what they give, as gradients of small networks vary more."""
    layer, tokens = mamba2_layer()
    for name, (network, inputs) in {**denoisers(), "mamba2": (layer, tokens)}.items():
        fast, slow = (outcome(network.to(DEVICE), inputs, bf16)["output"] for bf16 in (True, False))
        assert not torch.equal(fast, slow), f"{name} is not computed in bf16"
        assert_close({name: fast}, {name: slow}, BF16)


def test_a_check_sees_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mamba2.chunked_scan

    def forgets(x, dt, a, b, c, chunk_size):
        """Every chunk begins with an empty state."""
        parts = [right(*(t[:, i : i + chunk_size] for t in (x, dt)), a, *(t[:, i : i + chunk_size] for t in (b, c)), 8)
                 for i in range(0, x.shape[1], chunk_size)]  # fmt: skip
        return torch.cat(parts, 1) if chunk_size > 1 else right(x, dt, a, b, c, 1)

    monkeypatch.setattr(mamba2, "chunked_scan", forgets)
    with pytest.raises(AssertionError, match="differs by"):
        test_mamba2()
    elu = F.elu
    monkeypatch.setattr(unet1d.F, "elu", lambda x, inplace=False: elu(x) if x.dtype == torch.float64 else F.relu(x))
    with pytest.raises(AssertionError, match="differs by"):
        test_unet()
    monkeypatch.setattr(torch, "autocast", lambda *args, enabled=True: torch.enable_grad())
    with pytest.raises(AssertionError, match="not computed in bf16"):
        test_bf16()
