"""What each kind of model will need before it is made: parameters, FLOPs, bytes read, peak memory.

The models' own code runs on tensors without values (`rpg.planning.measuring`), so that estimates cannot drift from it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rpg.config import Config
from rpg.diffusion import build_objective
from rpg.generation.sampler import GROUP, low_precision_copy
from rpg.models import build_network
from rpg.models.kernel_regression import KernelRidgeGenerator
from rpg.models.pdiff import ParameterDiffusion
from rpg.models.recurrent_diffusion import Batch, RecurrentDiffusion
from rpg.planning.machine import (
    FLOAT_BYTES,
    GenerationMemory,
    TrainingMemory,
    checkpoint_bytes,
    moment_bytes,
    num_bytes,
)
from rpg.planning.measuring import GenerationFlops, LiveBytes, StepPart, count_flops, fake_copy
from rpg.planning.zoo_summary import ZooSummary
from tokenization.layout.directions import fitting_bytes
from tokenization.layouts import SpectralLayout, cached_bytes


class Estimator(ABC):
    """The needs of one kind of model, each kind a class of its own.

    A kind that is not fitted by gradient steps overrides `training_flops` and `training_memory` instead of `step_part`.

    Attributes:
        checkpoints_per_step: checkpoints in one training step, over all processes.
        rows_per_step: token rows in one training step, over all processes.
        num_parts: parts of a training step, each with a forward and a backward pass.
        cache_bytes: of the encoded zoo that training keeps in memory; 0 where the rows are read from disk.
    """

    checkpoints_per_step: int
    rows_per_step: int
    num_parts: int = 1
    cache_bytes: int

    def __init__(self, config: Config, zoo: ZooSummary) -> None:
        self.config = config
        self.model: Any = config.model  # each kind knows what its own section holds
        self.zoo = zoo

    @abstractmethod
    def step_part(self, network: Any, num_processes: int) -> StepPart:
        """One process's part of a training step on a `fake_network`, in a `FakeTensorMode`."""

    def waiting_bytes(self, num_processes: int) -> int:
        """Bytes of the rows that a process reads ahead; none unless the kind does so."""
        return 0

    def scratch_bytes(self, network: Any) -> int:
        """Bytes that kernels take while they compute, which no tensor of a step holds."""
        return 0

    def averaged(self, network: Any) -> nn.Module:
        """The part of the networks whose moving average is kept."""
        return network

    @abstractmethod
    def sampling_memory(self, network: Any, weights: int) -> GenerationMemory:
        """Peak memory of generation by a `fake_network` of ``weights`` bytes, in a `FakeTensorMode`.

        Loading is counted here only where it takes other than the parameters once more.
        """

    @abstractmethod
    def sampling_flops(self, network: Any, steps: int) -> GenerationFlops:
        """FLOPs, less the directions', of a network that a `fake_network` makes in ``steps`` steps; likewise."""

    @property
    def fitting_bytes(self) -> int:
        """What finding the zoo's directions takes at its peak; 0 where tokens are values."""
        layout = self.zoo.layout
        return fitting_bytes(self.zoo.num_checkpoints, layout.basis.shape) if isinstance(layout, SpectralLayout) else 0

    @property
    def bytes_read_per_step(self) -> int:
        """Bytes of checkpoints that a training step's rows come from, on average; none are read twice if cached.

        Coefficients are in memory from the start.
        """
        layout = self.zoo.layout
        if isinstance(layout, SpectralLayout):
            return 0
        return round(checkpoint_bytes(layout) / layout.num_tokens * self.rows_per_step)

    def meta_network(self) -> Any:
        """The generator's networks without storage (on the meta device)."""
        with torch.device("meta"):
            return build_network(self.config.model, self.zoo.layout, self.zoo.num_states, self.zoo.condition_size)

    def fake_network(self, network: Any) -> Any:
        """Give a `meta_network`, which was made outside of it, shapes on the CPU in a `FakeTensorMode`, in place."""
        return fake_copy(network)

    def parameters(self) -> dict[str, int]:
        """Number of parameters by component; they add up to all."""
        counts: Counter[str] = Counter()
        for name, parameter in self.meta_network().named_parameters():
            component = name.split(".")[0].removesuffix("_embedding").removesuffix("_projection")
            counts["condition" if component == "denoiser_condition" else component] += parameter.numel()
        return dict(counts)

    def training_flops(self, num_processes: int = 1) -> int:
        """FLOPs of a training step of one process: forward, backward and what activation checkpointing repeats."""
        network = self.meta_network().train()
        with FakeTensorMode():
            part = self.step_part(self.fake_network(network), num_processes)
            with count_flops() as counter:
                part.forward()[0].backward()
        return self.num_parts * counter.get_total_flops()

    def training_memory(self, *, bf16: bool = False, num_processes: int = 1) -> TrainingMemory:
        """Peak memory of one of ``num_processes`` training processes, data parallel; ``bf16``: under autocast."""
        network = self.meta_network().train()
        with FakeTensorMode():
            network = self.fake_network(network)
            gradients = num_bytes(network.parameters())
            weights = gradients + num_bytes(network.buffers())
            part = self.step_part(network, num_processes)
            with LiveBytes() as live:
                for _ in range(min(2, self.num_parts)):  # a second part finds the first one's gradients
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        outputs = part.forward()
                    outputs[0].backward()
                    del outputs
            moments = sum(moment_bytes(self.config.train.optimizer, each) for each in network.parameters())
            average = num_bytes(self.averaged(network).parameters())
        return TrainingMemory(
            weights=weights,
            gradients=gradients,
            optimizer=moments,
            ema=average,
            activations=max(0, live.peak - gradients) + self.scratch_bytes(network),
            batch=part.num_bytes,
            waiting=self.waiting_bytes(num_processes),
            cache=self.cache_bytes,
            fitting=self.fitting_bytes,
        )

    @torch.no_grad()
    def generation_flops(self, steps: int | None = None) -> GenerationFlops:
        """FLOPs of one generated network with ``steps`` sampling steps (the configuration's when None)."""
        network = self.meta_network().eval()
        with FakeTensorMode():
            found = self.sampling_flops(self.fake_network(network), steps or self.config.generate.steps)
        if not isinstance(layout := self.zoo.layout, SpectralLayout):
            return found
        products = 2 * math.prod(layout.basis.shape)  # of a network's coefficients with L·k·D numbers
        return replace(found, directions=products, total=found.total + products)

    @torch.no_grad()
    def generation_memory(self) -> GenerationMemory:
        """Peak memory of generating into files, however many networks."""
        network = self.meta_network().eval()
        bf16 = self.config.generate.precision == "bf16"
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            network = self.fake_network(network)
            parameters = num_bytes(network.parameters())
            weights = parameters + num_bytes(network.buffers())
            found = self.sampling_memory(network, weights)
            return replace(found, loading=found.loading or weights + parameters)


class RecurrentEstimator(Estimator):
    """The needs of recurrent diffusion: a step takes N tokens of each of B checkpoints."""

    def __init__(self, config: Config, zoo: ZooSummary) -> None:
        super().__init__(config, zoo)
        train, num_tokens = config.train, zoo.layout.num_tokens
        self.checkpoints_per_step, self.num_parts = train.batch_size, train.gradient_accumulation
        self.rows_per_step = train.batch_size * min(train.tokens or num_tokens, num_tokens)
        self.cache_bytes = cached_bytes(zoo.layout, zoo.num_checkpoints)

    def meta_network(self) -> RecurrentDiffusion:
        """Without storage; what is measured of a zoo has the sizes that it will have."""
        network = super().meta_network()
        if network.centre is not None:
            code_size = network.state.embedding_dim if self.model.state.of == "code" else 0
            network.centre.resize(self.zoo.num_checkpoints, code_size)
        return network

    def fake_network(self, network: RecurrentDiffusion) -> RecurrentDiffusion:
        """Shapes on the CPU, in place."""
        super().fake_network(network)
        network.objective = build_objective(self.model.diffusion)  # its tables would be on the meta device
        return network

    def step_part(self, network: RecurrentDiffusion, num_processes: int) -> StepPart:
        """The rows of ``B / processes / parts`` checkpoints."""
        num_examples = max(1, self.checkpoints_per_step // num_processes // self.num_parts)
        num_sampled = self.rows_per_step // self.checkpoints_per_step
        # A condition of its own for every example is the most there can be.
        distinct = num_examples if self.zoo.condition_size or self.model.initial else self.zoo.num_states
        num_groups = min(num_examples, distinct)
        rows = (num_examples, num_sampled, self.zoo.layout.token_size)
        batch = Batch(
            samples=torch.empty(rows),
            mask=torch.empty(rows[1:]),
            token_ids=torch.zeros(num_sampled, dtype=torch.long),
            time=network.objective.sample_time(num_examples * num_sampled, None).view(rows[:2]),
            noise=torch.empty(rows),
            group=torch.zeros(num_examples, dtype=torch.long),
            states=torch.zeros(num_groups, dtype=torch.long),
            conditions=self._conditions(num_groups),
            dropped=torch.zeros(num_groups, dtype=torch.bool) if self.zoo.condition_size else None,
            initial=self._initial(num_groups),
        )
        noise = self._states(network, num_groups) if self.model.state.noise else None
        return StepPart(lambda: network(batch, noise), num_bytes(vars(batch).values()))

    def waiting_bytes(self, num_processes: int) -> int:
        """The rows of this step's other parts and of the next step wait their turn."""
        per_process = math.ceil(self.rows_per_step / num_processes)
        num_rows = 2 * per_process - per_process // self.num_parts
        return num_rows * self.zoo.layout.token_size * FLOAT_BYTES

    def sampling_memory(self, network: RecurrentDiffusion, weights: int) -> GenerationMemory:
        """All prototypes first, then tile after tile."""
        layout, tile_tokens = self.zoo.layout, self.config.generate.tile_tokens
        if self.config.generate.precision == "bf16":
            network = low_precision_copy(network)
            weights += num_bytes(each for each in network.parameters() if each.dtype == torch.bfloat16)
        group = max(1, tile_tokens // layout.num_tokens)
        num_rows = group * layout.num_tokens if group > 1 else min(tile_tokens, layout.num_tokens)
        states, conditions = self._states(network, group), self._conditions(group)
        with LiveBytes() as live:
            initial = self._initial(group)
            prototypes = [network.prototypes(states, conditions, initial=initial) for _ in range(self._num_passes)]
        kept = num_bytes(prototypes)
        backbone = max(0, live.peak - kept)
        with LiveBytes() as live:
            # The noise, the rows, their mask and the step before: every sampler holds about these.
            held = [torch.empty(num_rows, layout.token_size) for _ in range(4)]
            contexts = [network.denoiser.precompute(each.new_empty(num_rows, each.shape[-1])) for each in prototypes]
            time = torch.empty(()).expand(num_rows)
            predictions = [network.predict(held[0], time, context, held[1]) for context in contexts]
        del predictions
        return GenerationMemory(weights, prototypes=kept, backbone=backbone, tile=live.peak)

    def sampling_flops(self, network: RecurrentDiffusion, steps: int) -> GenerationFlops:
        """Of the backbone and what is known of tokens, once a network; of the denoiser, for every token and step."""
        layout, num_rows = self.zoo.layout, self.config.generate.tile_tokens
        states, conditions = self._states(network, 1), self._conditions(1)
        with count_flops() as backbone:
            prototypes = network.prototypes(states, conditions, initial=self._initial(1))  # [1, L, H]
        with count_flops() as centre:
            network.known(states, conditions, torch.arange(layout.num_tokens))
        with count_flops() as once:
            context = network.denoiser.precompute(prototypes.new_empty(num_rows, prototypes.shape[-1]))
        with count_flops() as step:
            network.predict(torch.empty(num_rows, layout.token_size), torch.empty(()).expand(num_rows), context, None)
        per_network = self._num_passes * backbone.get_total_flops()
        per_token, per_step = (self._num_passes * (counter.get_total_flops() // num_rows) for counter in (once, step))
        known = centre.get_total_flops()
        total = per_network + layout.num_tokens * (per_token + steps * per_step) + known
        return GenerationFlops(per_network, per_token, per_step, known, total)

    @property
    def _num_passes(self) -> int:
        """Predictions a sampling step makes of each token: two under classifier-free guidance."""
        return 2 if self.zoo.condition_size and self.config.generate.guidance_scale != 1 else 1

    def _states(self, network: RecurrentDiffusion, num_groups: int) -> Tensor | None:
        """Permutation states ``[G, S]``; None without any."""
        return torch.empty(num_groups, network.state.embedding_dim) if network.state is not None else None

    def _initial(self, num_groups: int) -> Tensor | None:
        """Tokens ``[G, L, D]`` to go on from; None without any."""
        if self.model.initial is None:
            return None
        return torch.empty(num_groups, self.zoo.layout.num_tokens, self.zoo.layout.token_size)

    def _conditions(self, num_groups: int) -> Tensor | None:
        """Conditions ``[G, C]`` as they come from a zoo; None without any."""
        if not self.zoo.condition_size:
            return None
        return torch.empty(num_groups, 1 if self.model.condition.kind == "class" else self.zoo.condition_size)


class WholeNetworksEstimator(Estimator):
    """The needs of models that take whole checkpoints, B a step, from the flattened zoo in memory."""

    def __init__(self, config: Config, zoo: ZooSummary, batch_size: int) -> None:
        super().__init__(config, zoo)
        self.checkpoints_per_step, self.rows_per_step = batch_size, batch_size * zoo.layout.num_tokens
        self.cache_bytes = zoo.num_checkpoints * zoo.layout.num_coordinates * FLOAT_BYTES


class PDiffEstimator(WholeNetworksEstimator):
    """The needs of p-diff: a step takes whole checkpoints; the autoencoder's are the larger ones of both stages."""

    def __init__(self, config: Any, zoo: ZooSummary) -> None:
        super().__init__(config, zoo, config.model.autoencoder.batch_size)

    def step_part(self, network: ParameterDiffusion, num_processes: int) -> StepPart:
        """A whole step of the autoencoder: values and their noise ``[B, d]``, the latents' noise ``[B, Z]``."""
        num_examples, num_values = self.checkpoints_per_step, self.zoo.layout.num_coordinates
        inputs = [torch.empty(num_examples, size) for size in (num_values, num_values, network.config.latent_size)]
        return StepPart(lambda: (network(0, *inputs),), num_bytes(inputs))

    def scratch_bytes(self, network: ParameterDiffusion) -> int:
        """The largest convolution's input and output again, in blocks of 16 channels, as oneDNN computes on them."""
        largest, values = 0, network.encoder.padded
        for layer in cast("list[nn.Conv1d]", list(network.encoder.convolutions)):
            after = values // network.config.stride
            blocks = math.ceil(layer.in_channels / 16) * values + math.ceil(layer.out_channels / 16) * after
            largest, values = max(largest, 16 * blocks), after
        return self.checkpoints_per_step * largest * FLOAT_BYTES

    def averaged(self, network: ParameterDiffusion) -> nn.Module:
        """The autoencoder keeps its last weights."""
        return network.denoiser

    def sampling_memory(self, network: ParameterDiffusion, weights: int) -> GenerationMemory:
        """A tile of whole networks is decoded."""
        layout = self.zoo.layout
        with LiveBytes() as live:
            network.decode_standardised(torch.empty(GROUP, network.config.latent_size))  # [GROUP, d]
        rows = GROUP * layout.num_tokens * layout.token_size * FLOAT_BYTES
        return GenerationMemory(weights, tile=live.peak + rows)

    def sampling_flops(self, network: ParameterDiffusion, steps: int) -> GenerationFlops:
        """Of the decoder, once a network; of the latent's denoiser, unless a VAE has none."""
        latents = torch.empty(GROUP, network.config.latent_size)
        with count_flops() as decoder:
            network.decode_standardised(latents)
        with count_flops() as step:
            if not network.config.variational:
                network.denoiser(latents, torch.empty(()).expand(GROUP))
        once, each = (counter.get_total_flops() // GROUP for counter in (decoder, step))
        return GenerationFlops(0, once, each, 0, once + steps * each)


class KernelRidgeEstimator(WholeNetworksEstimator):
    """The needs of a regression in closed form."""

    def __init__(self, config: Config, zoo: ZooSummary) -> None:
        super().__init__(config, zoo, zoo.num_checkpoints)
        self.tokens = zoo.layout.num_tokens * zoo.layout.token_size  # values of a checkpoint's tokens, T·k
        self.cache_bytes = FLOAT_BYTES * zoo.num_checkpoints * self.tokens

    @property
    def _fitted_bytes(self) -> int:
        """The two tensors ``[n, T, k]`` that predictions and draws are made of; one without a condition."""
        return self.cache_bytes * (2 if self.zoo.condition_size else 1)

    def step_part(self, network: KernelRidgeGenerator, num_processes: int) -> StepPart:
        """There is none."""
        raise NotImplementedError

    def training_flops(self, num_processes: int = 1) -> int:
        """Of the Gram matrix and of the products with ``[n, n]`` matrices."""
        return 6 * self.zoo.num_checkpoints**2 * self.tokens

    def training_memory(self, *, bf16: bool = False, num_processes: int = 1) -> TrainingMemory:
        """The zoo's tokens, in float64 three times over while they are fitted, and what comes out."""
        return TrainingMemory(
            self._fitted_bytes, activations=6 * self.cache_bytes, cache=self.cache_bytes, fitting=self.fitting_bytes
        )

    def sampling_memory(self, network: KernelRidgeGenerator, weights: int) -> GenerationMemory:
        """What was fitted, and the rows of a tile."""
        group = max(1, self.config.generate.tile_tokens // self.zoo.layout.num_tokens)
        rows = FLOAT_BYTES * max(group * self.tokens, self.config.generate.tile_tokens * self.zoo.layout.token_size)
        fitted = self._fitted_bytes
        return GenerationMemory(fitted, tile=2 * rows, loading=2 * fitted)

    def sampling_flops(self, network: KernelRidgeGenerator, steps: int) -> GenerationFlops:
        """Two combinations of n checkpoints; one without a condition."""
        once = 2 * self.zoo.num_checkpoints * self.zoo.layout.token_size * (2 if self.zoo.condition_size else 1)
        known = once * self.zoo.layout.num_tokens
        return GenerationFlops(0, 0, 0, known, known)
