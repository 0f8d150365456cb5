"""Mamba-2: the chunked form against a step-by-step recurrence and against transformers' mixer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.models import mamba2
from rpg.models.mamba2 import Mamba2, chunked_scan


def step_by_step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence as its definition has it, one token at a time."""
    state = torch.zeros(x.shape[0], *x.shape[2:], b.shape[-1])  # [B, A, P, S]
    outputs = []
    for i in range(x.shape[1]):
        decay = torch.exp(dt[:, i] * a)[:, :, None, None]
        state = decay * state + torch.einsum("ba,bap,bs->baps", dt[:, i], x[:, i], b[:, i])
        outputs.append(torch.einsum("baps,bs->bap", state, c[:, i]))
    return torch.stack(outputs, dim=1)


def scan_inputs(length: int) -> list[Tensor]:
    torch.manual_seed(length)
    x, b, c = torch.randn(2, length, 3, 4), torch.randn(2, length, 5), torch.randn(2, length, 5)
    dt = F.softplus(torch.randn(2, length, 3) - 1)
    a = -torch.rand(3) * 4 - 0.1
    return [t.requires_grad_() for t in (x, dt, a, b, c)]


@pytest.mark.parametrize(("length", "chunk_size"), [(1, 8), (7, 8), (8, 8), (9, 8), (33, 8), (30, 1), (20, 64)])
def test_chunks_equal_the_recurrence(length, chunk_size):
    inputs = scan_inputs(length)
    cotangent = torch.randn(2, length, 3, 4)
    slow = step_by_step(*inputs)
    fast = chunked_scan(*inputs, chunk_size)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(slow, inputs, cotangent)
    found = torch.autograd.grad(fast, inputs, cotangent)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_strong_decays_stay_finite():
    x, dt, a, b, c = scan_inputs(40)
    y = chunked_scan(x, dt * 100, a * 100, b, c, 16)
    gradients = torch.autograd.grad(y.sum(), [x, dt, a, b, c])
    assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.fixture(scope="module")
def pair():
    """Our layer and transformers' with the same weights, loaded without any renaming."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    ours = Mamba2(32, d_state=16, headdim=16, chunk_size=8)
    config = Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=16, n_groups=1, num_hidden_layers=1, chunk_size=8
    )
    mixer = Mamba2Mixer(config, layer_idx=0)
    mixer.load_state_dict(ours.state_dict(), strict=True)
    return ours, mixer


@pytest.mark.parametrize("length", [5, 16, 37])
def test_layer_equals_the_mixer_of_transformers(pair, length):
    ours, mixer = pair
    x = torch.randn(2, length, 32)
    cotangent = torch.randn(2, length, 32)
    outputs, gradients = [], []
    for layer in (ours, mixer):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(cotangent)
        outputs.append(y)
        gradients.append({"x": leaf.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}})
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_parameter_names_are_those_of_mamba_ssm():
    names = {name: tuple(value.shape) for name, value in Mamba2(32, d_state=16, headdim=16).state_dict().items()}
    assert names == {
        "in_proj.weight": (64 + 64 + 2 * 16 + 4, 32),
        "conv1d.weight": (96, 1, 4),
        "conv1d.bias": (96,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }


def test_initial_step_sizes_and_decays_lie_in_their_ranges():
    layer = Mamba2(256)
    dt = F.softplus(layer.dt_bias)
    assert dt.min() > 0.9e-3 and dt.max() < 1.1e-1
    assert layer.A_log.exp().min() * 1.0001 >= 1 and layer.A_log.exp().max() < 16.001


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 parameters"])
def test_bf16_is_close_to_fp32(autocast):
    torch.manual_seed(0)
    layer = Mamba2(64, d_state=16, headdim=16, chunk_size=16)
    x = torch.randn(2, 100, 64)
    expected = layer(x)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
    else:
        found = layer.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 0.02


def test_which_way_the_layers_are_computed_is_said(monkeypatch):
    network = nn.Sequential(nn.Linear(8, 8), Mamba2(32, d_state=16, headdim=16))  # rows of 164 values: no kernel
    fitting = nn.Sequential(Mamba2(64, d_state=16, headdim=16))  # rows of 296 values
    cuda = torch.device("cuda")
    monkeypatch.setattr(mamba2, "fused_scan", lambda: None)
    assert mamba2.describe_kernels(network[:1], cuda) is None
    assert mamba2.describe_kernels(fitting, torch.device("cpu")) == "Mamba-2 layers run in plain PyTorch"
    assert "pip install 'mamba-ssm>=2.2' 'causal-conv1d>=1.4'" in mamba2.describe_kernels(fitting, cuda)
    monkeypatch.setattr(mamba2, "fused_scan", lambda: F.silu)
    assert mamba2.describe_kernels(fitting, cuda) == "Mamba-2 layers run on the kernels of mamba_ssm"
    assert mamba2.describe_kernels(network, cuda) == "Mamba-2 layers run in plain PyTorch"
