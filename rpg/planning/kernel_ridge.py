"""What kernel ridge needs: no steps, but the tokens of the whole zoo in memory. n checkpoints, T tokens, k values."""

from __future__ import annotations

from rpg.models.kernel_ridge import KernelRidgeGenerator
from rpg.planning.estimator import Estimator, StepPart
from rpg.planning.flops import GenerationFlops, directions_flops
from rpg.planning.memory import FLOAT_BYTES, GenerationMemory, TrainingMemory


class KernelRidgeEstimator(Estimator):
    """The needs of a regression in closed form."""

    num_parts = 1

    @property
    def tokens(self) -> int:
        """Values of a checkpoint's tokens, T·k."""
        return self.zoo.layout.num_tokens * self.zoo.layout.token_size

    @property
    def checkpoints_per_step(self) -> int:
        """All of them, once."""
        return self.zoo.num_checkpoints

    @property
    def rows_per_step(self) -> int:
        """Every token of the zoo, once."""
        return self.checkpoints_per_step * self.zoo.layout.num_tokens

    @property
    def cache_bytes(self) -> int:
        """The tokens of the zoo."""
        return FLOAT_BYTES * self.zoo.num_checkpoints * self.tokens

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
            weights=self._fitted_bytes, gradients=0, optimizer=0, ema=0, activations=6 * self.cache_bytes,
            batch=0, waiting=0, cache=self.cache_bytes, fitting=self.fitting_bytes,
        )  # fmt: skip

    def sampling_memory(self, network: KernelRidgeGenerator, weights: int, loading: int) -> GenerationMemory:
        """What was fitted, and the rows of a tile."""
        group = max(1, self.config.generate.tile_tokens // self.zoo.layout.num_tokens)
        rows = FLOAT_BYTES * max(group * self.tokens, self.config.generate.tile_tokens * self.zoo.layout.token_size)
        fitted = self._fitted_bytes
        return GenerationMemory(weights=fitted, prototypes=0, backbone=0, tile=2 * rows, loading=2 * fitted)

    def sampling_flops(self, network: KernelRidgeGenerator, steps: int) -> GenerationFlops:
        """Two combinations of n checkpoints; one without a condition."""
        once = 2 * self.zoo.num_checkpoints * self.zoo.layout.token_size * (2 if self.zoo.condition_size else 1)
        known, directions = once * self.zoo.layout.num_tokens, directions_flops(self.zoo.layout)
        return GenerationFlops(0, 0, 0, known, directions, known + directions)
