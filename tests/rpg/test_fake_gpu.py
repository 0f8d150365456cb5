"""Training's forward pass, sampling and scoring on tensors that say they are on a GPU and have no values.

It is no GPU: kernels, their numbers and memory are not tried. What is found is what a GPU finds first: a tensor that
was left on the CPU beside those of the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap

from rpg.config import Config
from rpg.generation import sampler
from rpg.generation.generator import Generator
from rpg.models import states
from rpg.models.recurrent_diffusion import Batch, CodeBatch
from rpg.training.data import TrainingSet
from tests.conftest import make_zoo, small_config, small_network
from tokenization.layout.layout import TokenLayout

GPU, B, C = "cuda", 4, 3

MLP, JOINT = (
    {"kind": "mlp", "width": 16, "hidden": 16, "depth": 1},
    {"kind": "joint", "width": 8, "hidden": 8, "depth": 1},
)
UNET = {"kind": "unet1d", "channels": [1, 4, 6, 4, 1]}
BACKBONES = {
    "lstm": {"kind": "lstm", "d_model": 16, "num_layers": 1},
    "transformer": {"kind": "transformer", "d_model": 16, "num_layers": 1, "num_heads": 2},
    "mamba2": {"kind": "mamba2", "d_model": 16, "num_layers": 1, "d_state": 8, "headdim": 8},
    "none": {"kind": "none", "d_model": 16},
}
RECURRENT: dict[str, dict[str, Any]] = {
    **{name: {"backbone": each} for name, each in BACKBONES.items()},
    "unet1d": {"denoiser": UNET},
    "joint": {"denoiser": JOINT},
    "ddpm": {"diffusion": {"kind": "ddpm", "num_steps": 20}},
    "velocity": {"diffusion": {"kind": "flow", "prediction": "velocity"}},
    "code": {"state": {"of": "code", "width": 2, "prior": {}}},
    "initial": {"state": {"of": "none"}, "initial": {}},
    **{position: {"position": position} for position in ("1d", "layer", "learned", "none")},
}
TRAINED_ONLY = ("ddpm", "code")
"""Their samplers read values of the schedule, which are not there."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """The mode; a GPU's random numbers, which need one, are drawn without a generator."""
    for drawing in (sampler, states):
        monkeypatch.setattr(drawing, "make_rng", lambda *_, **__: None)
    monkeypatch.setattr(sampler, "first_of_normal", lambda rows, _, width, __: torch.randn(rows, width, device=GPU))
    monkeypatch.setattr(sampler, "FEW", 1 << 20)  # equal bits are a question of values, as are padding and states
    monkeypatch.setattr(states, "stored_states", lambda _, networks, __: [0 for _ in networks])
    padding = lambda self, ids, group: torch.ones(group * len(ids), self.layout.token_size, device=GPU)  # noqa: E731
    monkeypatch.setattr(sampler.TokenSampler, "_mask", padding)
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda self: None)
    with torch.backends.cudnn.flags(enabled=False):
        yield FakeTensorMode(allow_non_fake_inputs=True)


def moved(network: Any) -> Any:
    """A network with its parameters and buffers on the GPU; call it in the mode."""
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    there = torch.empty(value.shape, dtype=value.dtype, device=GPU)
                    held[name] = nn.Parameter(there) if held is module._parameters else there
    return network


def built(folder: Path, model: dict[str, Any]) -> tuple[Config, TokenLayout, Any]:
    zoo = make_zoo(folder / "zoo", condition_size=C)
    common = {"condition": {"kind": "binary"}, "backbone": BACKBONES["transformer"], "denoiser": MLP}
    tree = {"state": {"of": "checkpoint", "noise": 0.1}, **common, **model}
    config = Config.parse({**small_config(folder).plain(), "model": tree}, "test")
    layout = TokenLayout.fit(zoo, config.tokens)
    return config, layout, TrainingSet(zoo, config).build_network(layout)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_diffusion_trains_and_samples_on_one_device(tmp_path: Path, gpu: FakeTensorMode, name: str) -> None:
    config, layout, network = built(tmp_path, RECURRENT[name])
    length, width = layout.num_tokens, layout.token_size
    with gpu:
        moved(network)
        conditions = torch.zeros(B, C, device=GPU)
        starts = torch.zeros(B, length, width, device=GPU) if network.initial is not None else None
        codes = None
        if network.prior is not None:
            drawn = torch.randn(B, network.prior.code_size, device=GPU), torch.rand(B, device=GPU)
            codes = CodeBatch(torch.zeros(B, dtype=torch.long, device=GPU), *drawn, conditions)
        time = network.objective.sample_time(B * length, None, GPU).view(B, length)
        batch = Batch(
            samples=torch.randn(B, length, width, device=GPU), mask=torch.ones(length, width, device=GPU),
            token_ids=torch.arange(length, device=GPU), time=time, noise=torch.randn(B, length, width, device=GPU),
            group=torch.arange(B, device=GPU), states=torch.zeros(B, dtype=torch.long, device=GPU),
            conditions=conditions, dropped=torch.zeros(B, dtype=torch.bool, device=GPU), initial=starts, num_last=2,
            codes=codes,
        )  # fmt: skip
        loss = network(batch)
        assert loss.mean.device.type == loss.samples.device.type == GPU
        if name in TRAINED_ONLY:
            return
        generator = Generator(config, layout, network, adapter="")
        start = None if starts is None else torch.zeros(2, length, width)
        asked = sampler.Request(
            num=2, seed=0, sampler=network.samplers[0], steps=2, eta=0.0, guidance_scale=2.0,
            state="prior" if network.prior is not None else "stored", conditions=torch.zeros(2, C), initial=start,
        )  # fmt: skip
        for _, rows in generator.sampler().sample(asked):
            assert rows.device.type == GPU and rows.shape[1:] == (length, width)


def test_networks_are_scored_side_by_side_on_one_device(gpu: FakeTensorMode) -> None:
    network = small_network()
    with gpu:
        stacked = {name: torch.randn(B, *value.shape, device=GPU) for name, value in moved(network).named_parameters()}
        buffers = dict(network.named_buffers())
        images = torch.randn(5, 1, 4, 4, device=GPU)
        logits = vmap(lambda weights: functional_call(network.eval(), {**buffers, **weights}, (images,)))(stacked)
        assert logits.shape == (B, 5, 5) and logits.device.type == GPU


def test_what_is_left_on_the_cpu_is_found(gpu: FakeTensorMode) -> None:
    with gpu, pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        torch.randn(3, device=GPU) + torch.randn(3)
