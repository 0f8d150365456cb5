"""Generators' networks, one kind of model each; a kind is a class of configuration and a class of networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field

from rpg.models.kernel_ridge import KernelRidgeConfig, KernelRidgeGenerator
from rpg.models.pdiff import ParameterDiffusion, PDiffConfig
from rpg.models.recurrent_diffusion import RecurrentConfig, RecurrentDiffusion
from rpg.models.sane import SaneConfig, TokenAutoencoder
from tokenization.layouts import Layout

ModelConfig = Annotated[RecurrentConfig | PDiffConfig | KernelRidgeConfig | SaneConfig, Field(discriminator="kind")]
Network = RecurrentDiffusion | ParameterDiffusion | KernelRidgeGenerator | TokenAutoencoder

__all__ = [
    "KernelRidgeConfig",
    "ModelConfig",
    "Network",
    "PDiffConfig",
    "RecurrentConfig",
    "SaneConfig",
    "build_network",
]


def _recurrent(config: RecurrentConfig, layout: Layout, num_states: int, condition_size: int) -> RecurrentDiffusion:
    # Under `torch.device("meta")` the positions have to be there too: their embedding can take gigabytes.
    positions = layout.positions.to(torch.get_default_device())
    regress = layout.options.centre == "condition"
    return RecurrentDiffusion(config, positions, layout.token_size, num_states, condition_size, regress)


def _pdiff(config: PDiffConfig, layout: Layout, num_states: int, condition_size: int) -> ParameterDiffusion:
    return ParameterDiffusion(config, layout.num_coordinates)


def _kernel_ridge(
    config: KernelRidgeConfig, layout: Layout, num_states: int, condition_size: int
) -> KernelRidgeGenerator:
    return KernelRidgeGenerator(config, layout.num_tokens, layout.token_size, condition_size)


def _sane(config: SaneConfig, layout: Layout, num_states: int, condition_size: int) -> TokenAutoencoder:
    return TokenAutoencoder(config, layout.positions.to(torch.get_default_device()), layout.token_size)


NETWORKS: dict[str, Callable[[Any, Layout, int, int], Network]] = {
    "recurrent": _recurrent,
    "pdiff": _pdiff,
    "kernel_ridge": _kernel_ridge,
    "sane": _sane,
}
"""What builds the networks of each kind of model."""


def build_network(config: ModelConfig, layout: Layout, num_states: int = 1, condition_size: int = 0) -> Network:
    """The untrained networks that a configuration describes, drawn from torch's global random state.

    Args:
        config: kind and sizes.
        layout: how checkpoints become tokens.
        num_states: permutation states.
        condition_size: values of a condition (width of the sentence encoder, if it is a text); 0 without one.
    """
    return NETWORKS[config.kind](config, layout, num_states, condition_size)
