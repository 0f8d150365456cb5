"""A generator's networks and their inputs without values: shapes that the model's own code can be run on.

N sampled tokens, D token width, C condition values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.diffusion.objectives import build_objective
from rpg.models import Network, PDiffConfig, build_network
from rpg.models.pdiff import ParameterDiffusion
from rpg.models.recurrent_diffusion import Batch, RecurrentDiffusion
from rpg.planning.peak import fake_copy
from rpg.planning.subject import Subject, rows_per_step


def meta_network(config: Config, subject: Subject) -> Network:
    """The generator's networks without storage (on the meta device)."""
    layout = subject.layout
    with torch.device("meta"):
        if isinstance(config.model, PDiffConfig):
            return build_network(config.model, layout)
        # As there, but with the positions on the meta device too: their embedding can take gigabytes.
        positions = layout.positions.to("meta")
        return RecurrentDiffusion(
            config.model, positions, layout.token_size, subject.num_states, subject.condition_size
        )


def fake_network(network: Network, config: Config) -> Network:
    """Give a `meta_network` shapes on the CPU, in place; call it in a fake mode."""
    fake_copy(network)
    if isinstance(network, RecurrentDiffusion):
        network.objective = build_objective(config.model.diffusion)  # its tables would be on the meta device
    return network


def fake_inputs(config: Config, subject: Subject, network: Network, num_processes: int) -> tuple[Any, ...]:
    """Arguments for ``network.forward`` in the shapes of one process's part of a step; call it in a fake mode."""
    if isinstance(network, ParameterDiffusion):
        num_examples = network.config.autoencoder.batch_size
        values = (num_examples, subject.layout.num_coordinates)
        return 0, torch.empty(values), torch.empty(values), torch.empty(num_examples, network.config.latent_size)
    num_examples = max(1, config.train.batch_size // num_processes // config.train.gradient_accumulation)
    num_sampled = rows_per_step(config, subject) // config.train.batch_size
    # A condition of its own for every example is the most there can be.
    num_groups = num_examples if subject.condition_size else min(num_examples, subject.num_states)
    rows = (num_examples, num_sampled, subject.layout.token_size)

    def zeros(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long)

    batch = Batch(
        samples=torch.empty(rows),
        mask=torch.empty(rows[1:]),
        token_ids=zeros(num_sampled),
        time=network.objective.sample_time(num_examples * num_sampled, None).view(rows[:2]),
        noise=torch.empty(rows),
        group=zeros(num_examples),
        states=zeros(num_groups),
        conditions=fake_conditions(config, subject, num_groups),
        dropped=torch.zeros(num_groups, dtype=torch.bool) if subject.condition_size else None,
    )
    if network.state is None or not config.model.state.noise:
        return batch, None
    return batch, torch.empty(num_groups, network.state.embedding_dim)


def fake_conditions(config: Config, subject: Subject, num_groups: int) -> Tensor | None:
    """Conditions ``[num_groups, C]`` as they come from a zoo; None without any."""
    if not subject.condition_size:
        return None
    return torch.empty(num_groups, 1 if config.model.condition.kind == "class" else subject.condition_size)
