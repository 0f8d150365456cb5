"""What recurrent diffusion needs.

B examples, G distinct (state, condition) pairs, L tokens of a checkpoint, N sampled tokens, D token width, H model
width, S permutation-state width, C condition values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rpg.diffusion.objectives import build_objective
from rpg.generation.sampler import low_precision_copy
from rpg.models.batch import Batch
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.planning.estimator import Estimator, StepPart
from rpg.planning.flops import GenerationFlops, count_flops, directions_flops
from rpg.planning.memory import FLOAT_BYTES, GenerationMemory, num_bytes
from rpg.planning.peak import LiveBytes
from tokenization.layouts import cached_bytes


class RecurrentEstimator(Estimator):
    """The needs of recurrent diffusion: a step takes N tokens of each of B checkpoints."""

    @property
    def checkpoints_per_step(self) -> int:
        """B."""
        return self.config.train.batch_size

    @property
    def rows_per_step(self) -> int:
        """B times N."""
        num_tokens = self.zoo.layout.num_tokens
        return self.checkpoints_per_step * min(self.config.train.tokens or num_tokens, num_tokens)

    @property
    def num_parts(self) -> int:
        """Gradients are accumulated."""
        return self.config.train.gradient_accumulation

    @property
    def cache_bytes(self) -> int:
        """Of a zoo that is small enough."""
        return cached_bytes(self.zoo.layout, self.zoo.num_checkpoints)

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
        num_groups = (
            num_examples if self.zoo.condition_size or self.model.start else min(num_examples, self.zoo.num_states)
        )
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
            starts=self._starts(num_groups),
        )
        noise = self._states(network, num_groups) if self.model.state.noise else None
        return StepPart(lambda: network(batch, noise), num_bytes(vars(batch).values()))

    def waiting_bytes(self, num_processes: int) -> int:
        """The rows of this step's other parts and of the next step wait their turn."""
        per_process = math.ceil(self.rows_per_step / num_processes)
        num_rows = 2 * per_process - per_process // self.num_parts
        return num_rows * self.zoo.layout.token_size * FLOAT_BYTES

    def sampling_memory(self, network: RecurrentDiffusion, weights: int, loading: int) -> GenerationMemory:
        """All prototypes first, then tile after tile."""
        layout, tile_tokens = self.zoo.layout, self.config.generate.tile_tokens
        if self.config.generate.precision == "bf16":
            network = low_precision_copy(network)
            weights += num_bytes(each for each in network.parameters() if each.dtype == torch.bfloat16)
        group = max(1, tile_tokens // layout.num_tokens)
        num_rows = group * layout.num_tokens if group > 1 else min(tile_tokens, layout.num_tokens)
        states, conditions = self._states(network, group), self._conditions(group)
        with LiveBytes() as live:
            starts = self._starts(group)
            prototypes = [network.prototypes(states, conditions, starts=starts) for _ in range(self._num_passes)]
        kept = num_bytes(prototypes)
        backbone = max(0, live.peak - kept)
        with LiveBytes() as live:
            # The noise, the rows, their mask and the step before: every sampler holds about these.
            held = [torch.empty(num_rows, layout.token_size) for _ in range(4)]
            contexts = [network.denoiser.precompute(each.new_empty(num_rows, each.shape[-1])) for each in prototypes]
            time = torch.empty(()).expand(num_rows)
            predictions = [network.predict(held[0], time, context, held[1]) for context in contexts]
        del predictions
        return GenerationMemory(weights=weights, prototypes=kept, backbone=backbone, tile=live.peak, loading=loading)

    def sampling_flops(self, network: RecurrentDiffusion, steps: int) -> GenerationFlops:
        """Of the backbone and what is known of tokens, once a network; of the denoiser, for every token and step."""
        layout, num_rows = self.zoo.layout, self.config.generate.tile_tokens
        with count_flops() as backbone:
            prototypes = network.prototypes(
                self._states(network, 1), self._conditions(1), starts=self._starts(1)
            )  # [1, L, H]
        with count_flops() as centre:
            network.known(self._states(network, 1), self._conditions(1), torch.arange(layout.num_tokens))
        with count_flops() as once:
            context = network.denoiser.precompute(prototypes.new_empty(num_rows, prototypes.shape[-1]))
        with count_flops() as step:
            network.predict(torch.empty(num_rows, layout.token_size), torch.empty(()).expand(num_rows), context, None)
        per_network = self._num_passes * backbone.get_total_flops()
        per_token, per_step = (self._num_passes * (counter.get_total_flops() // num_rows) for counter in (once, step))
        known, directions = centre.get_total_flops(), directions_flops(layout)
        total = per_network + layout.num_tokens * (per_token + steps * per_step) + known + directions
        return GenerationFlops(per_network, per_token, per_step, known, directions, total)

    @property
    def _num_passes(self) -> int:
        """Predictions a sampling step makes of each token: two under classifier-free guidance."""
        return 2 if self.zoo.condition_size and self.config.generate.guidance_scale != 1 else 1

    def _states(self, network: RecurrentDiffusion, num_groups: int) -> Tensor | None:
        """Permutation states ``[G, S]``; None without any."""
        return torch.empty(num_groups, network.state.embedding_dim) if network.state is not None else None

    def _starts(self, num_groups: int) -> Tensor | None:
        """Tokens ``[G, L, D]`` to go on from; None without any."""
        if self.model.start is None:
            return None
        return torch.empty(num_groups, self.zoo.layout.num_tokens, self.zoo.layout.token_size)

    def _conditions(self, num_groups: int) -> Tensor | None:
        """Conditions ``[G, C]`` as they come from a zoo; None without any."""
        if not self.zoo.condition_size:
            return None
        return torch.empty(num_groups, 1 if self.model.condition.kind == "class" else self.zoo.condition_size)
