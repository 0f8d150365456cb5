"""Denoisers: the split of the computation changes nothing, the cost is what it claims."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rpg.diffusion import FlowConfig
from rpg.models.denoiser import DecoderConfig, GatedLinear, JointConfig, MLPConfig, time_sinusoid
from rpg.models.recurrent_diffusion import DenoiserConfig, RecurrentConfig, build_denoiser
from rpg.models.unet1d import UNet1dConfig
from tests.rpg.denoiser_flops import flops_per_token

SMALL = [
    MLPConfig(width=16, hidden=24, depth=2),
    MLPConfig(width=16, hidden=24, depth=2, skip=True),
    UNet1dConfig(channels=(1, 4, 8, 4, 1), d_time=16),
]


def randomised(config, token_size=12, d_prototype=20, num_tokens=3):
    """A denoiser in evaluation mode whose output layer is not zero."""
    torch.manual_seed(0)
    denoiser = build_denoiser(config, token_size, d_prototype, num_tokens)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()


@pytest.mark.parametrize("config", [*SMALL, JointConfig(width=16, hidden=24, depth=2)])
def test_shared_time_equals_time_per_token(config):
    denoiser = randomised(config)
    x, context = torch.randn(6, 12), denoiser.precompute(torch.randn(6, 20))
    expanded = torch.tensor(321.0).expand(6)
    assert expanded.stride(0) == 0
    torch.testing.assert_close(denoiser(x, expanded, context), denoiser(x, expanded.contiguous(), context))


@pytest.mark.parametrize("config", SMALL)
def test_tokens_are_independent(config):
    denoiser = randomised(config)
    x, prototype, time = torch.randn(6, 12), torch.randn(6, 20), torch.rand(6) * 1000
    whole = denoiser(x, time, denoiser.precompute(prototype))
    context = denoiser.precompute(prototype)
    assert all(len(tensor) == 6 for tensor in context)
    part = denoiser(x[2:4], time[2:4], tuple(tensor[2:4] for tensor in context))
    torch.testing.assert_close(part, whole[2:4])


JOINT = JointConfig(width=16, hidden=24, depth=2, num_heads=2)


def test_joint_tokens_depend_on_those_of_their_own_network_alone():
    denoiser = randomised(JOINT)
    x, prototype, time = torch.randn(6, 12), torch.randn(6, 20), torch.rand(6) * 1000
    context = denoiser.precompute(prototype)
    whole = denoiser(x, time, context)
    other = x.clone()
    other[5] += 1.0  # the last token of the second of two networks of three tokens
    changed = (denoiser(other, time, context) - whole).abs().amax(1) > 1e-6
    assert changed.tolist() == [False] * 3 + [True] * 3
    alone = denoiser(x[3:], time[3:], tuple(each[3:] for each in context))
    torch.testing.assert_close(alone, whole[3:])


def test_joint_attends_as_written_out():
    config = JointConfig(width=16, hidden=24, depth=1, num_heads=2)
    block = randomised(config).blocks[0]
    x, shift, scale, gate = torch.randn(4, 3, 16)
    y = shift + F.layer_norm(x, (16,)) * scale
    q, k, v = block.qkv(y).chunk(3, -1)
    heads = [(q[:, part] @ k[:, part].T / 8**0.5).softmax(-1) @ v[:, part] for part in (slice(0, 8), slice(8, 16))]
    expected = x + gate * block.attention_out(torch.cat(heads, -1))
    y = shift + F.layer_norm(expected, (16,)) * scale
    expected = expected + gate * block.output(F.silu(block.hidden(y)))
    torch.testing.assert_close(block(x, shift, scale, gate), expected)


@pytest.mark.parametrize("config", [*SMALL, JOINT])
def test_every_input_and_parameter_matters(config):
    denoiser = randomised(config)
    x, prototype = torch.randn(6, 12, requires_grad=True), torch.randn(6, 20, requires_grad=True)
    time = (torch.rand(6) * 1000).requires_grad_()
    denoiser(x, time, denoiser.precompute(prototype)).square().sum().backward()
    for tensor in (x, prototype, time, *denoiser.parameters()):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("config", SMALL)
def test_runs_under_autocast(config):
    denoiser = randomised(config)
    x, prototype, time = torch.randn(6, 12), torch.randn(6, 20), torch.rand(6) * 1000
    expected = denoiser(x, time, denoiser.precompute(prototype))
    with torch.autocast("cpu", torch.bfloat16):
        found = denoiser(x, time, denoiser.precompute(prototype))
        found.float().square().sum().backward()
    assert (found.float() - expected).norm() / expected.norm() < 0.05


def test_mlp_starts_at_zero():
    denoiser = build_denoiser(MLPConfig(), 32, 256, 4)
    output = denoiser(torch.randn(4, 32), torch.rand(4) * 1000, denoiser.precompute(torch.randn(4, 256)))
    assert (output == 0).all()


def test_mlp_modulates_as_written_out():
    denoiser = randomised(MLPConfig(width=16, hidden=24, depth=1))
    x, prototype, time = torch.randn(3, 12), torch.randn(3, 20), torch.rand(3) * 1000
    modulation = denoiser.prototype_modulation(F.silu(prototype))
    modulation = modulation + denoiser.time_modulation(F.silu(denoiser.time(time)))
    shift, scale, gate, last_shift, last_scale = modulation.split(16, dim=-1)
    h = denoiser.input(x)
    (block,) = denoiser.blocks
    y = block.output(F.silu(block.hidden(F.layer_norm(h, (16,)) * (1 + scale) + shift)))
    h = h + gate * y
    expected = denoiser.output(F.layer_norm(h, (16,)) * (1 + last_scale) + last_shift)
    torch.testing.assert_close(denoiser(x, time, denoiser.precompute(prototype)), expected)


def counted_flops(denoiser, num_tokens: int, token_size: int, d_prototype: int) -> int:
    context = denoiser.precompute(torch.zeros(num_tokens, d_prototype))
    time = torch.tensor(0.0).expand(num_tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(torch.zeros(num_tokens, token_size), time, context)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [*SMALL, MLPConfig(), UNet1dConfig(channels=(1, 64, 96, 64, 1))])
def test_flops_per_token_are_those_counted(config):
    denoiser = build_denoiser(config, 128, 256, 4)
    # Of a second and third token: the first pays for the time they share.
    additional = counted_flops(denoiser, 3, 128, 256) - counted_flops(denoiser, 2, 128, 256)
    assert additional == flops_per_token(denoiser)


def test_joint_flops_are_those_counted():
    denoiser = build_denoiser(JOINT, 128, 256, 3)
    additional = counted_flops(denoiser, 6, 128, 256) - counted_flops(denoiser, 3, 128, 256)
    assert additional == 3 * flops_per_token(denoiser)


def test_unet1d_costs_what_the_paper_pays():
    with torch.device("meta"):
        denoiser = build_denoiser(UNet1dConfig(), 8192, 8192, 4)
    assert flops_per_token(denoiser) == 14 * 8192 * 20544
    assert round(flops_per_token(denoiser) / 1e9, 2) == 2.36


def test_mlp_stays_small_where_tokens_are_wide():
    with torch.device("meta"):
        denoiser = build_denoiser(MLPConfig(width=512, hidden=1024), 16_384, 512, 4)
    assert max(parameter.numel() for parameter in denoiser.parameters()) == 16_384 * 512


def test_time_sinusoid_endpoints_and_wavelengths():
    x = time_sinusoid(torch.tensor([0.0, 500.0]), 8)
    torch.testing.assert_close(x[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    angle = 500 * torch.tensor([1.0, 1e-1, 1e-2, 1e-3])
    torch.testing.assert_close(x[1], torch.cat([angle.cos(), angle.sin()]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"kind": "unet1d", "kernel_size": 6}, "kernel_size"),
        ({"kind": "unet1d", "channels": [2, 4, 2]}, "channels"),
        ({"kind": "unet1d", "channels": [1, 4, 8, 1]}, "channels"),
        ({"kind": "unet1d", "channels": [1, 4, 4, 1]}, "channels"),
        ({"kind": "unet1d", "d_time": 15}, "d_time"),
        ({"kind": "unet1d", "checkpoint_rows": 4}, "checkpoint_rows"),
        ({"kind": "mlp", "width": 0}, "width"),
    ],
)
def test_impossible_configurations_name_the_field(section, field):
    with pytest.raises(ValidationError, match=field):
        TypeAdapter(DenoiserConfig).validate_python(section)


def test_a_gate_multiplies() -> None:
    layer = GatedLinear(2, 1)
    with torch.no_grad():
        layer.both.weight.copy_(torch.eye(2))
        layer.both.bias.zero_()
    x = torch.tensor([[3.0, 20.0], [-3.0, 20.0], [5.0, 0.0]])  # SiLU(20) = 20 to float32, SiLU(0) = 0
    assert layer(x).flatten().tolist() == pytest.approx([60.0, -60.0, 0.0])


def test_a_gated_decoder_without_hidden_layers_is_linear() -> None:
    decoder = build_denoiser(DecoderConfig(depth=0, gated=True), 5, 4, 1)
    torch.nn.init.normal_(decoder.network[-1].weight)
    a, b = torch.randn(2, 3, 4)
    assert torch.allclose(decoder.network(a + b), decoder.network(a) + decoder.network(b), atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_decoder_starts_at_zero_and_looks_at_prototypes_alone(gated, depth) -> None:
    decoder = build_denoiser(DecoderConfig(width=8, depth=depth, gated=gated), 5, 4, 1)
    rng = torch.Generator().manual_seed(0)
    prototypes, noise = torch.randn(3, 4, generator=rng), torch.randn(3, 5, generator=rng)
    assert torch.equal(decoder(noise, torch.ones(3), decoder.precompute(prototypes)), torch.zeros(3, 5))
    torch.nn.init.normal_(decoder.network[-1].weight, generator=rng)
    made = decoder(noise, torch.ones(3), decoder.precompute(prototypes))
    assert torch.equal(made, decoder(0 * noise, torch.zeros(3), decoder.precompute(prototypes)))
    assert not torch.allclose(made[0], made[1])
    with pytest.raises(ValueError, match="decoder predicts clean tokens"):
        RecurrentConfig(denoiser=DecoderConfig(), diffusion=FlowConfig(prediction="velocity"))
