"""The state of a training run and its step: everything around the loop in rpg/training/loop.py."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.generation.request import KnownRange, condition_codes
from rpg.generation.sampler import check_tiles
from rpg.models.mamba2 import describe_kernels
from rpg.models.recurrent_diffusion import CodeBatch, RecurrentDiffusion
from rpg.seeding import make_rng
from rpg.tasks import task_of
from rpg.tasks.base import TaskFamily, TaskSimulator
from rpg.tasks.collecting import single_threaded
from rpg.tasks.side_by_side import stack
from rpg.training.batches import BatchSampler, Rows, to_batch, with_own_initial
from rpg.training.data import Descriptions, TrainingSet, zoo_conditions
from rpg.training.distributed import DistributedContext
from rpg.training.losses import AuxiliaryLosses, num_at_last_time
from rpg.training.optim import ExponentialMovingAverage, build_optimizer, learning_rate
from rpg.training.run_folder import AVERAGE, MODEL, OPTIMIZER, RunFolder, require_learned, seconds_of
from tokenization.errors import InputError
from tokenization.layouts import Layout, fit_layout
from tokenization.zoo.zoo import Zoo

READING_WEIGHT = 1000.0
"""Beside a behaviour loss of some hundreds."""

NUM_FRESH = 200
"""Validation tasks that are drawn beside the zoo's, where the training drew its own."""

NUM_SETS = 5
"""Sets of examples of every validation task."""


class Trainer:
    """The state of a training run of recurrent diffusion, and its step; p-diff's overrides what differs."""

    def __init__(self, config: Config, *, resume: bool, overwrite: bool, say: Callable[[str], None]) -> None:
        self.started = time.monotonic()
        self.config = config
        self._saved: frozenset[str] | None = None  # names of a state dict, which takes long to ask for in every step
        self.folder = RunFolder(config.run)
        self.zoo = Zoo.open(config.zoo)
        self.data = TrainingSet(self.zoo, config)
        self.check()
        self.distributed = DistributedContext(config.train, str(self.folder.path))
        self.accelerator = self.distributed.accelerator
        self.say = say if self.distributed.is_main else lambda _: None
        self.distributed.on_main(lambda: self.folder.check(config, resume=resume, overwrite=overwrite))
        self.layout = fit_layout(self.zoo, config.tokens, indices=self.data.indices)
        self.learned = self.data.digest(self.layout)
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
            self.network.load_state_dict(load_file(saved / MODEL))  # which nothing has spread yet
        if config.train.compile:
            for part in (self.network.backbone, self.network.denoiser):  # each is compiled on its first call
                part.compile(backend=config.train.compile)
        self.model, self.optimizer, self.shards = self.distributed.prepare(self.network, self.build_optimizer)
        self.ema = ExponentialMovingAverage(self._averaged_shards(), config.train.ema_decay)
        if saved is not None:
            self.shards.load_average(self.ema, load_file(saved / AVERAGE))
            self.shards.load_optimizer(load_file(saved / OPTIMIZER))
        self.auxiliary = AuxiliaryLosses(self.data, self.layout, self.network, self.distributed)
        self.examples = self.data.examples
        # Only now: a run that is refused above leaves nothing behind, and does not discard the one before it.
        self.distributed.on_main(lambda: self.folder.start(config, resume=resume))
        self.accelerator.init_trackers("tensorboard")
        if self.distributed.world_size > 1 or self.distributed.spread != "none":
            self.say(str(self.distributed))
        if (kernels := describe_kernels(self.network, self.distributed.device)) is not None:
            self.say(kernels)

    def check(self) -> None:
        """Raise InputError for what cannot be trained."""
        self.data.check()

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.steps

    def build_network(self) -> Any:
        """The untrained networks."""
        network = self.data.build_network(self.layout)
        if isinstance(network, RecurrentDiffusion):
            check_tiles(network, self.layout, self.config.generate)
        return network

    def fit_closed_form(self) -> None:
        """Fit the closed-form part; a resumed run fits it again, with the same result."""
        self.data.fit_closed_form(self.network, self.layout)

    def complete(self, network: Any) -> None:
        """Measure what generation needs of the trained networks: nothing."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """That of the configuration, over all parameters."""
        return build_optimizer(self.config.train, self.network.parameters())

    def build_sampler(self) -> Any:
        """What reads the rows of each step."""
        initial, distributed = self.config.model.initial, self.distributed
        if initial is not None and initial.own:
            distributed.require_single("model.initial.own")
        return BatchSampler(self.data, self.layout, distributed.rank, distributed.world_size)

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
        task, spec = self.examples.task, self.zoo.condition  # new tasks, drawn by their family, in place of the zoo's
        assert isinstance(task, TaskSimulator) and spec is not None
        rng = make_rng(self.config.seed, "fresh codes", step, self.sampler.number(part))
        tasks = task.draw_tasks(len(codes.noise), rng).to(codes.noise)
        return replace(codes, tasks=spec.inputs(tasks), conditions=tasks)

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
        average = self.shards.whole_average(self.ema) | {"num_updates": torch.tensor(self.ema.num_updates)}
        files = {MODEL: self.shards.whole_model(), AVERAGE: average, OPTIMIZER: self.shards.whole_optimizer()}
        keep = self.config.train.keep
        self.distributed.on_main(lambda: self.folder.save(done, files, keep, self.seconds, self.learned))

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
        return self.shards.whole_model() | self.shards.whole_average(self.ema)

    def generator(self, weights: dict[str, torch.Tensor] | None = None, **facts: Any) -> Generator:
        """The generator as it is now, of the averaged weights."""
        network = self.build_network()
        network.load_state_dict(self._averaged_weights() if weights is None else weights)
        self.complete(network)
        return self.data.generator(self.layout, network, facts)

    def _write_generator(self, weights: dict[str, torch.Tensor]) -> None:
        facts: dict[str, Any] = {
            "training seconds": round(self.seconds, 1),
            "parameters": self.num_parameters,
            "training checkpoints": len(self.sampler),
            **self.auxiliary.facts(time.monotonic() - self.started),
        }
        generator = self.generator(weights, **facts)
        generator.known = measure_known_range(generator, self.data)
        generator.save_pretrained(self.folder.generator)


READER = "condition.reader."


def take_networks(network: RecurrentDiffusion, layout: Layout, run: str) -> None:
    """Take another run's networks but for what reads requests as settings, which alone is left to be trained.

    Raises:
        InputError: nothing reads requests, or the run's networks or zoo are others.
    """
    if getattr(network.condition, "reader", None) is None:
        raise InputError(
            "train.networks needs requests that are read as settings; set model.condition.read: true, or phrases"
        )
    other = Generator.from_pretrained(run)
    taken, own = ({name: value for name, value in each.state_dict().items() if not name.startswith(READER)}
                  for each in (other.network, network))  # fmt: skip
    means, wanted = (each.decode_batch(layout.mask.float()[None], constants=True) for each in (other.layout, layout))
    shapes, own_shapes = ({name: value.shape for name, value in each.items()} for each in (taken, own))
    same = shapes == own_shapes and means.keys() == wanted.keys()
    if not same or not all(torch.equal(value, wanted[name]) for name, value in means.items()):
        raise InputError(
            f"train.networks {run} has other networks, or learned from another zoo; give it the same zoo, tokens, "
            "backbone and denoiser"
        )
    network.load_state_dict(taken, strict=False)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(READER))


def measure_known_range(generator: Generator, data: TrainingSet) -> KnownRange | None:
    """Generate for validation tasks and score on validation images.

    None if conditions have no distances, or there are no validation tasks that were kept out of training.
    """
    config, spec, zoo = generator.config, generator.condition, data.zoo
    held_out = zoo.subset("validation") if "validation" not in config.train.splits else []
    measured = spec is not None and (spec.settings or spec.kind == "examples" or config.model.condition.phrases)
    if spec is None or not measured or not held_out or zoo.condition is None:
        return None
    task = task_of(zoo, config.task)
    if not isinstance(task, TaskFamily):
        return None
    rng = make_rng(config.seed, "known range")
    seen, tasks, examples = data.tasks, zoo_conditions(zoo, held_out), data.examples
    if config.train.draws_tasks and isinstance(task, TaskSimulator):
        tasks = torch.cat([tasks, task.draw_tasks(NUM_FRESH, rng)])
    requests: Any = tasks
    if examples is None:
        shown, asked = zoo.condition.inputs(seen), zoo.condition.inputs(tasks)
    else:
        tasks = tasks.repeat(NUM_SETS, 1) if len(tasks) < NUM_FRESH else tasks
        if isinstance(examples, Descriptions):
            texts = examples.describe(tasks, rng, "validation")
            shown, asked = (examples.table.conditions_of(each) for each in (spec.names, texts))
            requests = texts
        else:
            shown, asked = examples.draw(seen, rng), examples.draw(tasks, rng)
            requests = asked.unflatten(1, (-1, spec.size))
    with single_threaded():
        networks = stack(list(generator.one_by_one(len(tasks), seed=config.seed, condition=requests)))
        errors = 1 - task.accuracies(networks, tasks, "validation")
        known, wanted = (condition_codes(generator.network, spec, each) for each in (shown, asked))
    return None if known is None or wanted is None else KnownRange.measured(known[:, 0], wanted, errors)
