"""What a generator will need before it is made: parameters, bytes read, peak memory of training and of generation.

The networks are built without storage and their operations run on tensors without values, so that the largest
configuration is measured in seconds on any machine. Kernels' own scratch memory and the allocator's waste are not seen.

B examples, G distinct (state, condition) pairs, L tokens of a checkpoint, N sampled tokens, D token width, d values of
a flattened checkpoint, Z latent width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rpg.config import Config
from rpg.generation.pdiff_sampler import GROUP
from rpg.generation.sampler import low_precision_copy
from rpg.models import PDiffConfig
from rpg.models.pdiff import ParameterDiffusion
from rpg.models.recurrent_diffusion import Batch, RecurrentDiffusion
from rpg.planning.fake_networks import fake_conditions, fake_inputs, fake_network, meta_network
from rpg.planning.peak import LiveBytes, fake_mode
from rpg.planning.subject import Subject, rows_per_step
from tokenization.layouts import Layout, cached_bytes

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes by component; the components are the fields."""

    def components(self) -> dict[str, int]:
        """``{component: bytes}``."""
        return dataclasses.asdict(self)

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return sum(self.components().values())


@dataclass(frozen=True)
class TrainingMemory(Memory):
    """Peak memory of a training process.

    Attributes:
        weights: parameters and buffers, fp32.
        gradients: of every parameter, fp32.
        optimizer: AdamW's two moments, of 4 bytes each or of 1.
        ema: the weights' moving average.
        activations: what the forward and the backward pass hold at their peak, gradients apart.
        batch: the token rows that are computed at a time, and their noise.
        waiting: rows that are read ahead, always in the host's memory.
        cache: the encoded zoo, where it is small enough to be kept; in the host's memory too.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    batch: int
    waiting: int
    cache: int

    @property
    def on_device(self) -> int:
        """The part of the peak that an accelerator has to hold."""
        return self.total - self.waiting - self.cache


@dataclass(frozen=True)
class GenerationMemory(Memory):
    """Peak memory of generation into files. The residual means are read from the memory map and let go.

    Attributes:
        weights: parameters and buffers, fp32, and in bf16 once more what is multiplied in bf16.
        prototypes: of one network, or of the networks of one tile.
        backbone: what the backbone holds beyond them while it computes them.
        tile: the rows that are denoised together and what the denoiser makes of them.
        loading: the fp32 weights as they are and as they are read, before anything else.
    """

    weights: int
    prototypes: int
    backbone: int
    tile: int
    loading: int

    @property
    def total(self) -> int:
        """Peak in bytes: the backbone is done when the first tile begins, and loading before both."""
        return max(self.loading, self.weights + self.prototypes + max(self.backbone, self.tile))


def parameters(network: nn.Module) -> dict[str, int]:
    """Number of parameters by component; they add up to all."""
    counts: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        component = name.split(".")[0].removesuffix("_embedding").removesuffix("_projection")
        component = "condition" if component == "denoiser_condition" else component
        counts[component] = counts.get(component, 0) + parameter.numel()
    return counts


def bytes_read_per_step(config: Config, subject: Subject) -> int:
    """Bytes of checkpoints that a training step's rows come from, on average; none are read twice if cached."""
    per_token = checkpoint_bytes(subject.layout) / subject.layout.num_tokens
    return round(per_token * rows_per_step(config, subject))


def checkpoint_bytes(layout: Layout) -> int:
    """Bytes of the tokenised tensors of one checkpoint."""
    return sum(layer.num_values * layer.dtype.itemsize for layer in layout.layers)


def cache_bytes(config: Config, subject: Subject) -> int:
    """Bytes of the encoded zoo that training keeps in memory; 0 where the rows are read from disk."""
    if isinstance(config.model, PDiffConfig):
        return subject.num_checkpoints * subject.layout.num_coordinates * FLOAT_BYTES
    return cached_bytes(subject.layout, subject.num_checkpoints)


def training_memory(config: Config, subject: Subject, *, bf16: bool = False, num_processes: int = 1) -> TrainingMemory:
    """Peak memory of one training process, data parallel.

    Args:
        config: the experiment.
        subject: what it learns from.
        bf16: whether it computes in bf16 (autocast).
        num_processes: processes the batch is split over.
    """
    network = meta_network(config, subject).train()
    with fake_mode():
        network = fake_network(network, config)
        gradients = _num_bytes(network.parameters())
        weights = gradients + _num_bytes(network.buffers())
        averaged = network.denoiser if isinstance(network, ParameterDiffusion) else network
        inputs = fake_inputs(config, subject, network, num_processes)
        with LiveBytes() as live:
            for _ in range(min(2, config.train.gradient_accumulation)):  # a second part finds the first one's gradients
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = network(*inputs)
                (loss if isinstance(loss, Tensor) else loss.mean).backward()
                del loss
        batch = _num_bytes(vars(inputs[0]).values() if isinstance(inputs[0], Batch) else inputs)
        moments = sum(_moment_bytes(config.train.optimizer, each) for each in network.parameters())
    waiting = 0
    if isinstance(network, RecurrentDiffusion):
        # The rows of this step's other parts and of the next step wait their turn.
        per_process = math.ceil(rows_per_step(config, subject) / num_processes)
        num_rows = 2 * per_process - per_process // config.train.gradient_accumulation
        waiting = num_rows * subject.layout.token_size * FLOAT_BYTES
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        ema=_num_bytes(averaged.parameters()),
        activations=max(0, live.peak - gradients),
        batch=batch,
        waiting=waiting,
        cache=cache_bytes(config, subject),
    )


@torch.no_grad()
def generation_memory(config: Config, subject: Subject) -> GenerationMemory:
    """Peak memory of generating into files, however many networks."""
    network = meta_network(config, subject).eval()
    with fake_mode(), torch.autocast("cpu", torch.bfloat16, enabled=config.generate.precision == "bf16"):
        network = fake_network(network, config)
        weights = _num_bytes(network.parameters()) + _num_bytes(network.buffers())
        loading = weights + _num_bytes(network.parameters())
        if isinstance(network, RecurrentDiffusion) and config.generate.precision == "bf16":
            network = low_precision_copy(network)
            weights += _num_bytes(each for each in network.parameters() if each.dtype == torch.bfloat16)
        if isinstance(network, ParameterDiffusion):
            with LiveBytes() as live:
                values = network.decode_standardised(torch.empty(GROUP, network.config.latent_size))
                del values
            rows = GROUP * subject.layout.num_tokens * subject.layout.token_size * FLOAT_BYTES
            return GenerationMemory(weights=weights, prototypes=0, backbone=0, tile=live.peak + rows, loading=loading)
        return _recurrent_generation(config, subject, network, weights, loading)


def _recurrent_generation(
    config: Config, subject: Subject, network: RecurrentDiffusion, weights: int, loading: int
) -> GenerationMemory:
    """`generation_memory` of a network of fake tensors."""
    layout, settings = subject.layout, config.generate
    group = max(1, settings.tile_tokens // layout.num_tokens)
    num_rows = group * layout.num_tokens if group > 1 else min(settings.tile_tokens, layout.num_tokens)
    states = torch.empty(group, network.state.embedding_dim) if network.state is not None else None
    conditions = fake_conditions(config, subject, group)
    with LiveBytes() as live:
        prototypes = [network.prototypes(states, conditions) for _ in range(num_passes(config, subject))]
    kept = _num_bytes(prototypes)
    backbone = max(0, live.peak - kept)
    with LiveBytes() as live:
        # The noise, the rows, their mask and the step before: every sampler holds about these.
        held = [torch.empty(num_rows, layout.token_size) for _ in range(4)]
        contexts = [network.denoiser.precompute(each.new_empty(num_rows, each.shape[-1])) for each in prototypes]
        time = torch.empty(()).expand(num_rows)
        predictions = [network.predict(held[0], time, context, held[1]) for context in contexts]
    del predictions
    return GenerationMemory(weights=weights, prototypes=kept, backbone=backbone, tile=live.peak, loading=loading)


def num_passes(config: Config, subject: Subject) -> int:
    """Predictions a sampling step makes of each token: two under classifier-free guidance."""
    return 2 if subject.condition_size and config.generate.guidance_scale != 1 else 1


def held_bytes(layout: Layout) -> int:
    """What each network adds when networks are generated into memory: its tokens and its state dict."""
    return layout.num_tokens * layout.token_size * FLOAT_BYTES + checkpoint_bytes(layout)


def _moment_bytes(optimizer: str, parameter: Tensor) -> int:
    """AdamW's two moments of a parameter; in 8 bits (arXiv 2110.02861) a block of 256 shares a scale of 4 bytes."""
    if optimizer == "adamw8bit" and parameter.numel() >= 4096:
        return 2 * (parameter.numel() + FLOAT_BYTES * math.ceil(parameter.numel() / 256))
    return 2 * FLOAT_BYTES * parameter.numel()


def _num_bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
