"""Training of models of whole networks: p-diff in two stages that are one resumable run, kernel ridge in closed form.

B examples, K training checkpoints, d values of a flattened checkpoint, Z latent width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rpg.config import Config, TrainConfig
from rpg.generation.whole_networks import flatten_tokens
from rpg.models.pdiff import ParameterDiffusion, PDiffConfig
from rpg.seeding import make_rng, permutation
from rpg.tasks.collecting import cosine_decay
from rpg.training.data import all_tokens, check_zoo, training_conditions, training_entries
from rpg.training.distributed import DistributedContext
from rpg.training.run_folder import RunFolder
from rpg.training.trainer import Trainer, build_network, trained_generator
from tokenization.errors import InputError
from tokenization.layouts import Layout, fit_layout
from tokenization.zoo.zoo import Zoo

OF_STAGES = ("steps", "batch_size", "learning_rate", "weight_decay")
"""What each stage of ``model`` has for itself, in place of ``train``."""
OF_RECURRENT = ("betas", "warmup_steps", "tokens", "optimizer", "behaviour", "new_states", "imitation")
"""What only recurrent diffusion is trained with."""


def require_one_process(trainer: Trainer, world_size: int) -> None:
    """Raise InputError for several processes, DeepSpeed, compilation and accumulation."""
    kind = trainer.config.model.kind
    if world_size > 1 or trainer.distributed.spread != "none":
        raise InputError(
            f"model.kind {kind} trains in one process without DeepSpeed or FSDP, not in {world_size} or with them; "
            "launch it so"
        )
    if trainer.config.train.compile or trainer.config.train.gradient_accumulation > 1:
        raise InputError(
            f"train.compile and train.gradient_accumulation have no use with model.kind {kind}, whose networks are "
            "small; leave them out"
        )


class VectorSampler:
    """Holds the whole zoo as normalised vectors and names the checkpoints of each step.

    Args:
        indices: the entries that are trained on; they are held, 4·K·d bytes.
        layout: how they are normalised, and which values are chosen.
        batch_sizes: of each step, by stage.
        stage_steps: optimizer steps of the first stage.
    """

    rank, world_size = 0, 1

    def __init__(
        self,
        zoo: Zoo,
        indices: list[int],
        layout: Layout,
        seed: int,
        batch_sizes: tuple[int, int],
        stage_steps: int,
    ) -> None:
        self.vectors = torch.stack([flatten_tokens(layout, layout.encode(zoo.checkpoint(i))) for i in indices])
        self.seed, self.batch_sizes, self.stage_steps = seed, batch_sizes, stage_steps

    def __len__(self) -> int:
        return len(self.vectors)

    def examples(self, step: int) -> list[int]:
        """Checkpoints of ``step``: epoch after epoch of its stage, each in its own random order."""
        stage = int(step >= self.stage_steps)
        size, count = self.batch_sizes[stage], len(self)
        first = (step - stage * self.stage_steps) * size
        places = range(first, first + size)
        orders = {e: permutation(count, self.seed, "epoch", stage, e) for e in {place // count for place in places}}
        return [int(orders[place // count][place % count]) for place in places]

    def prefetch(self, first_step: int, last_step: int) -> Iterator[tuple[int, list[int]]]:
        """Yield each step with its examples."""
        for step in range(first_step, last_step):
            yield step, self.examples(step)


class PDiffTrainer(Trainer):
    """The state of a p-diff run.

    One optimizer serves both stages: it passes over parameters without a gradient, which are those of the other stage.
    The averaged weights are the denoiser's alone, since latents are measured with the autoencoder as trained.
    """

    network: ParameterDiffusion
    sampler: VectorSampler

    @property
    def settings(self) -> PDiffConfig:
        """The section ``model`` of the configuration."""
        return cast(PDiffConfig, self.config.model)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of both stages."""
        return self.settings.num_steps

    def check(self, zoo: Zoo) -> None:
        """Raise InputError for what cannot be trained, and for settings without effect on p-diff."""
        super().check(zoo)
        defaults = TrainConfig()
        for name in OF_STAGES + OF_RECURRENT:
            if getattr(self.config.train, name) != getattr(defaults, name):
                cure = "set it in model.autoencoder and model.latent" if name in OF_STAGES else "leave it out"
                raise InputError(f"train.{name} has no effect on p-diff (model.kind: pdiff); {cure}.")

    def fit_closed_form(self) -> None:
        """Nothing: its latents are measured once the autoencoder is trained."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW with one group a stage."""
        network, stages = self.network, (self.settings.autoencoder, self.settings.latent)
        first = [*network.encoder.parameters(), *network.decoder.parameters()]
        groups = [
            {"params": parameters, "lr": stage.learning_rate, "weight_decay": stage.weight_decay}
            for parameters, stage in zip((first, list(network.denoiser.parameters())), stages, strict=True)
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)

    def build_sampler(self, rank: int, world_size: int) -> VectorSampler:
        """The zoo in memory. Raises InputError for several processes, DeepSpeed, compilation and accumulation."""
        require_one_process(self, world_size)
        stages = self.settings.autoencoder, self.settings.latent
        sizes = (stages[0].batch_size, stages[1].batch_size)
        self._latents: Tensor | None = None
        indices = training_entries(self.zoo, self.config.train.splits)
        return VectorSampler(self.zoo, indices, self.layout, self.config.seed, sizes, stages[0].steps)

    def averaged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The denoiser's parameters."""
        return ((f"denoiser.{name}", parameter) for name, parameter in self.network.denoiser.named_parameters())

    def learning_rate(self, step: int) -> float:
        """A cosine to 0 in each stage."""
        first, second = self.settings.autoencoder, self.settings.latent
        stage, done = (first, step) if step < first.steps else (second, step - first.steps)
        return stage.learning_rate * cosine_decay(done, stage.steps)

    def train_step(self, step: int, examples: list[int]) -> float:  # type: ignore[override]
        """One optimizer step of the stage that ``step`` is in; returns its loss."""
        stage = int(step >= self.settings.autoencoder.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.model.train()
        loss = self.model(stage, *self._inputs(stage, step, examples))
        value = loss.item()
        if not math.isfinite(value):
            name = ("autoencoder", "latent")[stage]
            raise InputError(f"the loss of step {step + 1} is {value}; lower model.{name}.learning_rate")
        self.backward_and_step(step, loss)
        if stage:
            self.update_average()
        return value

    def _inputs(self, stage: int, step: int, examples: list[int]) -> tuple[Tensor, ...]:
        """The tensors of a step's loss, their random numbers decided by (seed, step)."""
        device, latent_size = self.accelerator.device, self.settings.latent_size
        rng = make_rng(self.config.seed, "pdiff", step)
        noise = torch.randn(len(examples), latent_size, generator=rng)
        if stage == 0:
            values = self.sampler.vectors[examples]
            parameter_noise = torch.randn(values.shape, generator=rng)
            return values.to(device), parameter_noise.to(device), noise.to(device)
        time = self.network.objective.sample_time(len(examples), rng, device)
        return self.latents()[examples], noise.to(device), time

    @torch.no_grad()
    def latents(self) -> Tensor:
        """Latents of all training checkpoints by the trained encoder, ``[K, Z]``; measured when first asked for."""
        if self._latents is None:
            with self.accelerator.autocast():
                chunks = self.sampler.vectors.split(self.settings.autoencoder.batch_size)
                encoded = [self.network.encode(chunk.to(self.accelerator.device))[0] for chunk in chunks]
            self._latents = torch.cat(encoded)
            self.network.measure_latents(self._latents)
        return self._latents


class ClosedFormTrainer:
    """A run without steps; the loop sees the interface of `rpg.training.trainer.Trainer`.

    Args:
        config, resume, overwrite, say: as of `rpg.training.loop.train`; a run that was interrupted is fitted again.
    """

    step = num_steps = 0

    def __init__(self, config: Config, *, resume: bool, overwrite: bool, say: Callable[[str], None]) -> None:
        self.started = time.monotonic()
        self.config = config
        self.folder = RunFolder(config.run)
        self.zoo = Zoo.open(config.zoo)
        check_zoo(self.zoo, config.train.splits, config.model.condition.kind)
        self.distributed = DistributedContext(config.train, str(self.folder.path))
        self.distributed.on_main(lambda: self.folder.check(config, resume=resume, overwrite=overwrite))
        self.distributed.on_main(lambda: self.folder.start(config, resume=resume))
        self.sampler = self

    def prefetch(self, first_step: int, last_step: int) -> Iterator[tuple[int, list[Any]]]:
        """No steps."""
        return iter(())

    def finish(self) -> Path:
        """Fit, and write the generator folder."""
        self.distributed.on_main(self._fit)
        return self.folder.generator

    def _fit(self) -> None:
        config, indices = self.config, training_entries(self.zoo, self.config.train.splits)
        layout = fit_layout(self.zoo, config.tokens, indices)
        network: Any = build_network(config, layout, self.zoo)
        conditions = training_conditions(self.zoo, indices, config.model.condition)
        error = network.fit(all_tokens(self.zoo, layout, indices), conditions, layout.token_weight)
        facts: dict[str, Any] = {
            "training seconds": round(time.monotonic() - self.started, 1),
            "training checkpoints": len(indices),
        }
        if conditions is not None:
            facts["leave-one-out error, part of the variance"] = round(error, 4)
        trained_generator(config, layout, network, self.zoo, facts).save_pretrained(self.folder.generator)
