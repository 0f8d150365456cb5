"""The state of a training run and its step: everything around the loop in rpg/training/loop.py."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.generation.sampler import check_tiles
from rpg.models import Network
from rpg.models import build_network as build
from rpg.models.centre import TaskTable
from rpg.models.mamba2 import describe_kernels
from rpg.models.recurrent_diffusion import CodeBatch, RecurrentDiffusion
from rpg.seeding import make_rng
from rpg.tasks import task_of
from rpg.tasks.base import FunctionTask
from rpg.training import checkpointing
from rpg.training.data import (
    BatchSampler,
    Rows,
    all_tokens,
    check_split,
    check_zoo,
    condition_size,
    metric_scale,
    sample_differences,
    state_ids,
    task_numbers,
    to_batch,
    training_conditions,
    training_entries,
    with_own_initial,
)
from rpg.training.distributed import DistributedContext
from rpg.training.losses import AuxiliaryLosses, num_at_last_time
from rpg.training.optim import ExponentialMovingAverage, build_optimizer, learning_rate
from rpg.training.requests import Descriptions, example_conditions, fresh_codes, take_networks
from rpg.training.run_folder import RunFolder, require_learned, seconds_of
from rpg.training.validation_errors import measure_known_range
from tokenization.errors import InputError
from tokenization.layouts import Layout, fit_layout
from tokenization.zoo.zoo import Zoo

READING_WEIGHT = 1000.0
"""Beside a behaviour loss of some hundreds."""


def fit_closed_form(network: RecurrentDiffusion, config: Config, layout: Layout, zoo: Zoo) -> None:
    """Fit the model's closed-form part, if it has one, to the training checkpoints."""
    indices = training_entries(zoo, config.train.splits)
    if isinstance(network.state, TaskTable):
        network.state.measure(task_numbers(zoo, indices, network.state.embedding_dim))
    if config.model.initial is not None:
        network.fit_initial(sample_differences(zoo, layout, indices, config.model.initial, config.seed))
    elif network.centre is not None:
        conditions = training_conditions(zoo, indices, config.model.condition)
        tokens = all_tokens(zoo, layout, indices)
        shown = _shown(tokens, config, layout, zoo) if config.model.state.shown else None
        network.fit_centre(tokens, conditions, layout.token_weight, shown)


def _shown(tokens: torch.Tensor, config: Config, layout: Layout, zoo: Zoo) -> torch.Tensor:
    """What checkpoints ``[n, L, D]`` show, ``[n, F]``."""
    task = task_of(zoo, config.task)
    if not isinstance(task, FunctionTask):
        raise InputError(
            f"{type(task).__name__} has no networks that show something; set model.state.shown to false, or choose the "
            "task fields"
        )
    return task.shown(layout.decode_batch(tokens, constants=True))


class Trainer:
    """The state of a training run of recurrent diffusion, and its step; p-diff's overrides what differs."""

    def __init__(self, config: Config, *, resume: bool, overwrite: bool, say: Callable[[str], None]) -> None:
        self.started = time.monotonic()
        self.config = config
        self._saved: frozenset[str] | None = None  # names of a state dict, which takes long to ask for in every step
        self.folder = RunFolder(config.run)
        self.zoo = zoo = Zoo.open(config.zoo)
        self.check(zoo)
        self.distributed = DistributedContext(config.train, str(self.folder.path))
        self.accelerator = self.distributed.accelerator
        self.say = say if self.distributed.is_main else lambda _: None
        self.distributed.on_main(lambda: self.folder.check(config, resume=resume, overwrite=overwrite))
        indices = training_entries(zoo, config.train.splits)
        self.layout = fit_layout(zoo, config.tokens, indices=indices)
        self.learned = _digest_of(zoo, indices, self.layout)
        self.sampler = self.build_sampler()
        self.network = self.build_network()
        self.fit_closed_form()
        if config.train.networks is not None:
            take_networks(self.network, self.layout, config.train.networks)
        self.num_parameters = sum(parameter.numel() for parameter in self.network.parameters())
        self.step, saved = self._newest() if resume else (0, None)
        self.earlier_seconds = 0.0 if saved is None else seconds_of(saved)
        if saved is not None:
            single = next((layer.name for layer in self.layout.layers if layer.num_values == 1), None)
            require_learned(saved, self.learned, single)
            self.say(f"going on after step {self.step} of {self.num_steps}")
            checkpointing.load_model(saved, self.network)
        if config.train.compile:
            self.compile()
        self.model, self.optimizer, self.shards = self.distributed.prepare(self.network, self.build_optimizer)
        self.ema = ExponentialMovingAverage(self._averaged_shards(), config.train.ema_decay)
        if saved is not None:
            checkpointing.load_average(saved, self.ema, self.shards)
            checkpointing.load_optimizer(saved, self.shards)
        self.auxiliary = AuxiliaryLosses(config, zoo, self.layout, self.network, self.distributed)
        self.examples = example_conditions(zoo, config.model.condition, config.seed)
        # Only now: a run that is refused above leaves nothing behind, and does not discard the one before it.
        self.distributed.on_main(lambda: self.folder.start(config, resume=resume))
        self.accelerator.init_trackers("tensorboard")
        if self.distributed.world_size > 1 or self.distributed.spread != "none":
            self.say(str(self.distributed))
        if (kernels := describe_kernels(self.network, self.distributed.device)) is not None:
            self.say(kernels)

    def check(self, zoo: Zoo) -> None:
        """Raise InputError for what cannot be trained."""
        condition = self.config.model.condition
        check_zoo(zoo, self.config.train.splits, "examples" if condition.phrases else condition.kind)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.steps

    def build_network(self) -> Any:
        """The untrained networks."""
        network = build_network(self.config, self.layout, self.zoo)
        if isinstance(network, RecurrentDiffusion):
            check_tiles(network, self.layout, self.config.generate)
        return network

    def fit_closed_form(self) -> None:
        """Fit the closed-form part; a resumed run fits it again, with the same result."""
        fit_closed_form(self.network, self.config, self.layout, self.zoo)

    def complete(self, network: Any) -> None:
        """Measure what generation needs of the trained networks: nothing."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """That of the configuration, over all parameters."""
        return build_optimizer(self.config.train, self.network.parameters())

    def build_sampler(self) -> Any:
        """What reads the rows of each step."""
        config, distributed = self.config, self.distributed
        check_split(config.train.batch_size, distributed.world_size, config.train.gradient_accumulation)
        if config.model.initial is not None and config.model.initial.own:
            distributed.require_single("model.initial.own")
        return BatchSampler(self.zoo, self.layout, config, distributed.rank, distributed.world_size)

    def compile(self) -> None:
        """Compile the networks in place, each on its first call."""
        for part in (self.network.backbone, self.network.denoiser):
            part.compile(backend=self.config.train.compile)

    def averaged_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters whose moving average is what the generator folder holds, and their running statistics.

        Averaged weights need the statistics of the same steps, not the last step's.
        """
        yield from self.network.named_parameters()
        if self._saved is None:
            self._saved = frozenset(self.network.state_dict())
        yield from ((name, buffer) for name, buffer in self.network.named_buffers() if name in self._saved)

    def _averaged_shards(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.averaged_tensors():
            yield name, self.shards.local_shard(tensor) if name in self.shards.parameters else tensor

    def update_average(self) -> None:
        """Move the averaged weights towards those of the last step."""
        self.ema.update(self._averaged_shards())

    def learning_rate(self, step: int) -> float:
        """The learning rate of ``step``."""
        return learning_rate(self.config.train, step)

    def begin_step(self, step: int) -> None:
        """Set the learning rate of ``step``, and what is to be trained to training."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.model.train()

    def train_step(self, step: int, parts: Sequence[Rows | None]) -> float:
        """One optimizer step over the step's rows; returns the loss of this process."""
        self.begin_step(step)
        total = 0.0
        for part, rows in enumerate(parts):
            with self.accelerator.accumulate(self.model):
                mean, bad_tokens = self._imitate(step, part, rows) if rows is not None else self._teach(step, part)
                mean = mean + self._reading_loss(step, part)
                value = mean.item()
                self.check_finite(step, value, bad_tokens)
                self.backward_and_step(step, mean)
            total += value / len(parts)
        self.update_average()
        return total

    def _imitate(self, step: int, part: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch of checkpoints, behaviour included, and ids of tokens whose loss is not finite."""
        num_last = num_at_last_time(self.config.train, len(rows.samples))
        codes = self._codes(step, part)
        batch = to_batch(rows, self.network.objective, self.distributed.device, num_last, codes)
        if self.config.model.initial is not None and self.config.model.initial.own:
            rng = make_rng(self.config.seed, "own starts", step, part)
            with self.accelerator.autocast():
                batch = with_own_initial(self.network, batch, self.layout.mask.float().to(batch.samples), rng)
        shown = batch if self.examples is None else self.examples(batch, step, self.sampler.number(part))
        with self.accelerator.autocast():
            loss = self.model(shown, self._state_noise(rows))
        mean = self.config.train.imitation * loss.mean + self.auxiliary(step, batch, loss)
        return mean, batch.token_ids[~torch.isfinite(loss.per_token)]

    def _teach(self, step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The behaviour loss of drawn tasks, and the prior's."""
        mean, codes = self.auxiliary.alone(step, part), self._codes(step, part)
        if codes is not None:
            if self.examples is not None:
                codes = self.examples.shown(codes, make_rng(self.config.seed, "examples", step, part))
            with self.accelerator.autocast():
                mean = mean + self.network.prior_loss(codes)
        return mean, torch.empty(0, dtype=torch.long)

    def _reading_loss(self, step: int, part: int) -> torch.Tensor | float:
        """How badly descriptions are read as settings, where they are the condition."""
        encoder = self.network.condition
        if not isinstance(self.examples, Descriptions) or encoder is None or part:
            return 0.0
        return READING_WEIGHT * self.examples.reading_loss(encoder.reader, step, self.config.train.draws_tasks)

    def backward_and_step(self, step: int, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``; with those of a step's last part, step the optimizer.

        Raises InputError if the gradients are not finite; the parameters are as they were.
        """
        self.accelerator.backward(loss)  # under DeepSpeed this clips and steps too, or skips what is not finite
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.gradient_clip)
            skipped = self.distributed.spread == "zero" and self.optimizer.step_was_skipped
            if skipped or (norm is not None and not math.isfinite(float(norm))):
                raise InputError(
                    f"a gradient of step {step + 1} is not finite; lower train.learning_rate or set train.precision "
                    "to fp32"
                )
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _codes(self, step: int, part: int) -> CodeBatch | None:
        """The batch of the prior over codes, if there is one."""
        prior = self.network.prior
        if prior is None:
            return None
        codes = self.sampler.codes(step, prior.config, prior.code_size, part, self.distributed.device)
        if self.examples is None or not self.config.train.draws_tasks:
            return codes
        rng = make_rng(self.config.seed, "fresh codes", step, self.sampler.number(part))
        return fresh_codes(codes, self.examples.task, self.zoo.condition, rng)

    def _state_noise(self, rows: Rows) -> torch.Tensor | None:
        """Noise ``[G, S]`` for the embeddings of the permutation states, each group's from its own seed."""
        if self.network.state is None or not self.config.model.state.noise:
            return None
        device, width = self.distributed.device, self.network.state.embedding_dim
        rngs = [torch.Generator(device).manual_seed(seed) for seed in rows.group_seeds]
        return torch.stack([torch.randn(width, generator=rng, device=device) for rng in rngs])

    def check_finite(self, step: int, loss: float, bad_tokens: torch.Tensor) -> None:
        """Raise InputError on all processes if the loss of one is not finite.

        It names the step and the layer of one of ``bad_tokens`` (ids, ``[n]`` long).
        """
        code = 0 if math.isfinite(loss) else 1 if not len(bad_tokens) else 2 + int(bad_tokens[0])
        code = int(self.distributed.reduce(code, "max"))
        if not code:
            return
        where = f"step {step + 1}"
        if code > 1:
            where += f", layer {self.layout.layers[int(self.layout.positions[code - 2, 0])].name!r}"
        raise InputError(
            f"{where} has a loss that is not finite; the weights of the last save are kept, so lower "
            "train.learning_rate or check the zoo with `rpg inspect`"
        )

    def log(self, done: int, loss: float) -> float:
        """Append the loss, averaged over processes, to ``metrics.jsonl`` and to TensorBoard; returns it."""
        loss = self.distributed.reduce(loss, "sum") / self.distributed.world_size
        values = {"loss": loss, "learning_rate": self.learning_rate(done - 1)}
        if self.distributed.is_main:
            self.accelerator.log(values, step=done)
            with self.folder.metrics.open("a") as handle:
                handle.write(json.dumps({"step": done, **values}) + "\n")
        return loss

    def save(self, done: int) -> None:
        """Save everything that resuming needs."""
        files = checkpointing.gather(self.network, self.ema, self.shards, keep=self.distributed.is_main)
        write, keep = (lambda folder: checkpointing.write(folder, files)), self.config.train.keep
        self.distributed.on_main(lambda: self.folder.save(done, write, keep, self.seconds, self.learned))

    def _newest(self) -> tuple[int, Path | None]:
        """The checkpoint to go on from; the main process chooses, and cuts the metrics off after it."""

        def choose() -> tuple[int, Path | None]:
            step, path = self.folder.newest(self.say) or (0, None)
            self.folder.truncate_metrics(step)
            return step, path

        return self.distributed.decide(choose)

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, with the sessions that it was resumed from."""
        return self.earlier_seconds + time.monotonic() - self.started

    def finish(self) -> Path:
        """Write the generator folder from the averaged weights."""
        weights = self._averaged_weights()
        self.distributed.on_main(lambda: self._write_generator(weights))
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.folder.generator

    def _averaged_weights(self) -> dict[str, torch.Tensor]:
        weights = checkpointing.gather_model(self.network, self.shards, keep=self.distributed.is_main)
        return weights | checkpointing.gather_average(self.ema, self.shards, keep=self.distributed.is_main)

    def generator(self, weights: dict[str, torch.Tensor] | None = None, **facts: Any) -> Generator:
        """The generator as it is now, of the averaged weights."""
        network = self.build_network()
        network.load_state_dict(self._averaged_weights() if weights is None else weights)
        self.complete(network)
        return trained_generator(self.config, self.layout, network, self.zoo, facts)

    def _write_generator(self, weights: dict[str, torch.Tensor]) -> None:
        facts: dict[str, Any] = {
            "training seconds": round(self.seconds, 1),
            "parameters": self.num_parameters,
            "training checkpoints": len(self.sampler),
            **self.auxiliary.facts(time.monotonic() - self.started),
        }
        generator = self.generator(weights, **facts)
        generator.known = measure_known_range(generator, self.zoo)
        generator.save_pretrained(self.folder.generator)


def _digest_of(zoo: Zoo, indices: Sequence[int], layout: Layout) -> str:
    """A digest of the training data: the checkpoints' digests and labels, and the learned layers."""
    trained = [zoo.entries[index] for index in indices]
    entries = [(entry.sha256, entry.run, entry.step, entry.condition) for entry in trained]
    layers = [(layer.name, layer.num_values) for layer in layout.layers]
    return hashlib.sha256(json.dumps([entries, layers]).encode()).hexdigest()


def build_network(config: Config, layout: Layout, zoo: Zoo) -> Network:
    """The untrained networks for a zoo, initialised from the seed."""
    indices = training_entries(zoo, config.train.splits)
    num_states = int(state_ids(zoo, indices, config.model.state).max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(config.model, layout, num_states, condition_size(zoo, config.model.condition))


def trained_generator(config: Config, layout: Layout, network: Network, zoo: Zoo, facts: dict[str, Any]) -> Generator:
    """The generator of trained networks; ``facts`` of the training are for its model card."""
    scale = metric_scale(zoo, training_entries(zoo, config.train.splits), config.model.condition)
    examples = example_conditions(zoo, config.model.condition)
    condition = examples.spec if examples is not None else zoo.condition if scale is None else scale.condition
    texts = examples.table if isinstance(examples, Descriptions) else None
    return Generator(config, layout, network, condition, facts, texts=texts, metric=scale)
