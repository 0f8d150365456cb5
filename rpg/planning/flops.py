"""Floating-point operations of training steps and of generated networks, counted without computing them.

Only matrix products, convolutions and recurrences count, two operations a multiplication and addition, as is usual.

B examples, G distinct (state, condition) pairs, L tokens of a checkpoint, N sampled tokens, H model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rpg.config import Config
from rpg.generation.pdiff_sampler import GROUP
from rpg.models.pdiff import ParameterDiffusion
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.planning import memory as estimate
from rpg.planning.fake_networks import fake_conditions, fake_inputs, fake_network, meta_network
from rpg.planning.peak import fake_mode
from rpg.planning.subject import Subject


def _lstm(input_shape: Any, *arguments: Any, out_shape: Any = None, **_: Any) -> int:
    """One layer and direction ``[L, B, in]``: four gates of in + H inputs each at every place."""
    length, batch, d_input = input_shape
    d_model = out_shape[0][-1]
    return 8 * length * batch * d_model * (d_input + d_model)


def _lstm_backward(input_shape: Any, weight: Any, hidden_weight: Any, *arguments: Any, **_: Any) -> int:
    """Twice the forward pass: the gradients of inputs and of weights."""
    length, batch, d_input = input_shape
    d_model = hidden_weight[-1]
    return 16 * length * batch * d_model * (d_input + d_model)


RECURRENCES = {
    torch.ops.aten.mkldnn_rnn_layer: _lstm,
    torch.ops.aten.mkldnn_rnn_layer_backward: _lstm_backward,
}
"""What PyTorch's own counter does not know."""


@dataclass(frozen=True)
class GenerationFlops:
    """FLOPs of one generated network.

    Attributes:
        backbone: all prototypes.
        once: what is computed once per token.
        step: one call of the denoiser for one token, with its share of what a tile computes once a step.
        total: all of them, with every step of every token.
    """

    backbone: int
    once: int
    step: int
    total: int


def count_flops() -> FlopCounterMode:
    """A context in which operations are counted, those of recurrences too; ask it ``get_total_flops()``."""
    return FlopCounterMode(display=False, custom_mapping=RECURRENCES)


def training_flops(config: Config, subject: Subject, *, num_processes: int = 1) -> int:
    """FLOPs of one training step of one process: forward, backward and what activation checkpointing repeats."""
    network = meta_network(config, subject).train()
    with fake_mode():
        network = fake_network(network, config)
        inputs = fake_inputs(config, subject, network, num_processes)
        with count_flops() as counter:
            loss = network(*inputs)
            (loss if isinstance(loss, Tensor) else loss.mean).backward()
    parts = 1 if isinstance(network, ParameterDiffusion) else config.train.gradient_accumulation
    return parts * counter.get_total_flops()


@torch.no_grad()
def generation_flops(config: Config, subject: Subject, steps: int | None = None) -> GenerationFlops:
    """FLOPs of one generated network with ``steps`` sampling steps (the configuration's when None)."""
    steps = config.generate.steps if steps is None else steps
    network = meta_network(config, subject).eval()
    with fake_mode():
        network = fake_network(network, config)
        if isinstance(network, ParameterDiffusion):
            return _latent_generation(network, steps)
        return _token_generation(config, subject, network, steps)


def _token_generation(config: Config, subject: Subject, network: RecurrentDiffusion, steps: int) -> GenerationFlops:
    num_passes = estimate.num_passes(config, subject)
    states = torch.empty(1, network.state.embedding_dim) if network.state is not None else None
    with count_flops() as backbone:
        prototypes = network.prototypes(states, fake_conditions(config, subject, 1))
    num_rows = config.generate.tile_tokens
    with count_flops() as once:
        context = network.denoiser.precompute(prototypes.new_empty(num_rows, prototypes.shape[-1]))
    with count_flops() as step:
        x, time = torch.empty(num_rows, subject.layout.token_size), torch.empty(()).expand(num_rows)
        network.predict(x, time, context, None)
    per_pass = backbone.get_total_flops()
    per_token = [counter.get_total_flops() // num_rows for counter in (once, step)]
    length = subject.layout.num_tokens
    total = num_passes * (per_pass + length * (per_token[0] + steps * per_token[1]))
    return GenerationFlops(num_passes * per_pass, num_passes * per_token[0], num_passes * per_token[1], total)


def _latent_generation(network: ParameterDiffusion, steps: int) -> GenerationFlops:
    latents = torch.empty(GROUP, network.config.latent_size)
    with count_flops() as decoder:
        network.decode_standardised(latents)
    with count_flops() as step:
        if not network.config.variational:
            network.denoiser(latents, torch.empty(()).expand(GROUP))
    once, each = (counter.get_total_flops() // GROUP for counter in (decoder, step))
    return GenerationFlops(0, once, each, once + steps * each)
