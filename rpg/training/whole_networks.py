"""Training of models of whole networks: p-diff in two stages that are one resumable run, kernel ridge in closed form.

B examples, K training checkpoints, d values of a flattened checkpoint, Z latent width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from rpg.config import Config, TrainConfig
from rpg.models.pdiff import ParameterDiffusion, PDiffConfig, flatten_tokens
from rpg.seeding import in_turns, make_rng
from rpg.tasks.collecting import cosine_decay
from rpg.training.data import TrainingSet
from rpg.training.distributed import DistributedContext
from rpg.training.run_folder import RunFolder
from rpg.training.trainer import Trainer
from tokenization.errors import InputError
from tokenization.layouts import Layout, fit_layout
from tokenization.zoo.zoo import Zoo

OF_STAGES = ("steps", "batch_size", "learning_rate", "weight_decay")
"""What each stage of p-diff's ``model`` has for itself, in place of ``train``."""
OF_RECURRENT = ("tokens", "behaviour", "new_states", "imitation")
"""What only recurrent diffusion is trained with."""


class VectorSampler:
    """Holds the whole zoo as normalised vectors and names the checkpoints of each step.

    Args:
        data: the checkpoints that are trained on; they are held, 4·K·d bytes.
        layout: how they are normalised, and which values are chosen.
        batch_sizes: of each step, by stage.
        stage_steps: optimizer steps of the first stage.
    """

    def __init__(self, data: TrainingSet, layout: Layout, batch_sizes: tuple[int, int], stage_steps: int) -> None:
        tokens = (layout.encode(data.zoo.checkpoint(index)) for index in data.indices)
        self.vectors = torch.stack([flatten_tokens(layout, each) for each in tokens])
        self.seed, self.batch_sizes, self.stage_steps = data.config.seed, batch_sizes, stage_steps

    def __len__(self) -> int:
        return len(self.vectors)

    def examples(self, step: int) -> list[int]:
        """Checkpoints of ``step``: epoch after epoch of its stage, each in its own random order."""
        stage = int(step >= self.stage_steps)
        size = self.batch_sizes[stage]
        first = (step - stage * self.stage_steps) * size
        return in_turns(range(first, first + size), len(self), self.seed, "epoch", stage)

    def prefetch(self, first_step: int, last_step: int) -> Iterator[tuple[int, list[int]]]:
        """Yield each step with its examples."""
        for step in range(first_step, last_step):
            yield step, self.examples(step)


class WholeNetworkTrainer(Trainer):
    """The state of a run that takes whole checkpoints, from memory and in one process; a kind adds its `loss`.

    Attributes:
        title: what the kind is called.
        unused: fields of ``train`` that have no effect on it, and what to do about each.
    """

    sampler: VectorSampler
    title: str
    unused: ClassVar[dict[str, str]] = dict.fromkeys(OF_RECURRENT, "leave it out")

    @property
    def stages(self) -> tuple[tuple[int, int], int]:
        """Checkpoints a step of both stages, and the steps of the first; there is one here."""
        return (self.config.train.batch_size,) * 2, self.num_steps

    def check(self) -> None:
        """Raise InputError for what cannot be trained, and for settings without effect."""
        super().check()
        defaults, kind = TrainConfig(), self.config.model.kind
        for name, cure in self.unused.items():
            if getattr(self.config.train, name) != getattr(defaults, name):
                raise InputError(f"train.{name} has no effect on {self.title} (model.kind: {kind}); {cure}.")

    def fit_closed_form(self) -> None:
        """Nothing: what is fitted needs the trained networks."""

    def build_sampler(self) -> VectorSampler:
        """The zoo in memory. Raises InputError for several processes, DeepSpeed, compilation and accumulation."""
        train, distributed, kind = self.config.train, self.distributed, self.config.model.kind
        if distributed.world_size > 1 or distributed.spread != "none":
            raise InputError(
                f"model.kind {kind} trains in one process without DeepSpeed or FSDP, not in {distributed.world_size} "
                "or with them; launch it so"
            )
        if train.compile or train.gradient_accumulation > 1:
            raise InputError(
                f"train.compile and train.gradient_accumulation have no use with model.kind {kind}, whose networks are "
                "small; leave them out"
            )
        return VectorSampler(self.data, self.layout, *self.stages)

    def loss(self, step: int, examples: list[int]) -> Tensor:
        """The loss of a step's checkpoints, its random numbers decided by (seed, step)."""
        raise NotImplementedError

    def is_averaged(self, step: int) -> bool:
        """Whether the weights' average moves after ``step``."""
        return True

    def rate_field(self, step: int) -> str:
        """The field that sets the learning rate of ``step``."""
        return "train.learning_rate"

    def train_step(self, step: int, examples: list[int]) -> float:  # type: ignore[override]
        """One optimizer step; returns its loss."""
        self.begin_step(step)
        loss = self.loss(step, examples)
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"the loss of step {step + 1} is {value}; lower {self.rate_field(step)}")
        self.backward_and_step(step, loss)
        if self.is_averaged(step):
            self.update_average()
        return value


class PDiffTrainer(WholeNetworkTrainer):
    """The state of a p-diff run.

    One optimizer serves both stages: it passes over parameters without a gradient, which are those of the other stage.
    The averaged weights are the denoiser's alone, since latents are measured with the autoencoder as trained.
    """

    network: ParameterDiffusion
    title = "p-diff"
    unused: ClassVar[dict[str, str]] = {
        **dict.fromkeys(OF_STAGES, "set it in model.autoencoder and model.latent"),
        **dict.fromkeys((*OF_RECURRENT, "betas", "warmup_steps", "optimizer"), "leave it out"),
    }
    _latents: Tensor | None = None

    @property
    def settings(self) -> PDiffConfig:
        """The section ``model`` of the configuration."""
        return cast(PDiffConfig, self.config.model)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of both stages."""
        return self.settings.num_steps

    @property
    def stages(self) -> tuple[tuple[int, int], int]:
        """Of the autoencoder, and of diffusion."""
        first, second = self.settings.autoencoder, self.settings.latent
        return (first.batch_size, second.batch_size), first.steps

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW with one group a stage."""
        network, stages = self.network, (self.settings.autoencoder, self.settings.latent)
        first = [*network.encoder.parameters(), *network.decoder.parameters()]
        groups = [
            {"params": parameters, "lr": stage.learning_rate, "weight_decay": stage.weight_decay}
            for parameters, stage in zip((first, list(network.denoiser.parameters())), stages, strict=True)
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)

    def averaged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The denoiser's parameters."""
        return ((f"denoiser.{name}", parameter) for name, parameter in self.network.denoiser.named_parameters())

    def learning_rate(self, step: int) -> float:
        """A cosine to 0 in each stage."""
        first, second = self.settings.autoencoder, self.settings.latent
        stage, done = (first, step) if step < first.steps else (second, step - first.steps)
        return stage.learning_rate * cosine_decay(done, stage.steps)

    def is_averaged(self, step: int) -> bool:
        """In the second stage."""
        return step >= self.settings.autoencoder.steps

    def rate_field(self, step: int) -> str:
        """That of the stage."""
        return f"model.{'latent' if self.is_averaged(step) else 'autoencoder'}.learning_rate"

    def loss(self, step: int, examples: list[int]) -> Tensor:
        """The loss of the stage that ``step`` is in."""
        device, latent_size = self.accelerator.device, self.settings.latent_size
        rng = make_rng(self.config.seed, "pdiff", step)
        noise = torch.randn(len(examples), latent_size, generator=rng)
        if not self.is_averaged(step):
            values = self.sampler.vectors[examples]
            parameter_noise = torch.randn(values.shape, generator=rng)
            return self.model(0, values.to(device), parameter_noise.to(device), noise.to(device))
        time = self.network.objective.sample_time(len(examples), rng, device)
        return self.model(1, self.latents()[examples], noise.to(device), time)

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
    """A run without steps, with the interface of `rpg.training.trainer.Trainer`; an interrupted one is fitted again."""

    step = num_steps = 0

    def __init__(self, config: Config, *, resume: bool, overwrite: bool, say: Callable[[str], None]) -> None:
        self.started = time.monotonic()
        self.config = config
        self.folder = RunFolder(config.run)
        self.data = TrainingSet(Zoo.open(config.zoo), config)
        self.data.check()
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
        data = self.data
        layout = fit_layout(data.zoo, self.config.tokens, data.indices)
        network: Any = data.build_network(layout)
        error = network.fit(data.tokens(layout), data.conditions, layout.token_weight)
        facts: dict[str, Any] = {
            "training seconds": round(time.monotonic() - self.started, 1),
            "training checkpoints": len(data),
        }
        if data.conditions is not None:
            facts["leave-one-out error, part of the variance"] = round(error, 4)
        data.generator(layout, network, facts).save_pretrained(self.folder.generator)
