"""Training on top of accelerate: the loop, the step, what a resume needs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from rpg.batches import BatchSampler, Rows, state_ids, to_batch, training_entries
from rpg.behaviour import BehaviourLoss, num_at_last_time
from rpg.config import Config, TrainConfig
from rpg.ema import ExponentialMovingAverage
from rpg.fresh import FreshLoss
from rpg.generator import Generator, Network, make_network
from rpg.model import Batch, Loss
from rpg.runs import RunFolder
from rpg.runtime import StopSignal, mixed_precision
from rpg.seeding import generator
from rpg.tasks import build_task, task_of
from tokenization.errors import InputError
from tokenization.layout import TokenLayout
from tokenization.zoo import Zoo

Progress = Callable[[int, int, float], None]


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    max_seconds: float | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train a generator on the zoo of ``config`` and write it to ``<run>/generator``.

    SIGTERM and SIGINT save a checkpoint and end the run; ``resume`` continues it exactly.

    Args:
        config: the experiment.
        resume: go on from the newest complete checkpoint of the run folder, if there is one.
        overwrite: discard the run that is in the run folder.
        max_seconds: stop, as if interrupted, once the loop has run that long.
        progress: called with (steps done, steps in all, loss) at every logged step.
        say: receives the notices of one line.

    Returns:
        The generator folder.

    Raises:
        InputError: the zoo, the configuration or the run folder does not allow it, or the loss is not finite.
    """
    started = time.monotonic()
    trainer = _trainer_of(config)(config, resume=resume, overwrite=overwrite, say=say)
    stop = StopSignal()
    with stop:
        for step, parts in trainer.sampler.prefetch(trainer.step, trainer.num_steps):
            loss = trainer.train_step(step, parts)
            done = step + 1
            finished = done == trainer.num_steps
            ended = stop.requested or (max_seconds is not None and time.monotonic() - started > max_seconds)
            stopping = not finished and trainer.any_process(ended)
            if done % config.train.log_every == 0 or finished or stopping:
                loss = trainer.log(done, loss)
                if progress is not None:
                    progress(done, trainer.num_steps, loss)
            if done % config.train.save_every == 0 or finished or stopping:
                trainer.save(done)
            if stopping:
                say(f"stopped after step {done} of {trainer.num_steps}; continue with --resume")
                break
    return trainer.finish(time.monotonic() - started)


def _trainer_of(config: Config) -> type[Trainer]:
    if config.generator == "pdiff":
        from rpg.pdiff_training import PDiffTrainer

        return PDiffTrainer
    return Trainer


class Trainer:
    """The state of a training run of recurrent diffusion, and its step; p-diff's overrides what differs."""

    def __init__(self, config: Config, *, resume: bool, overwrite: bool, say: Callable[[str], None]) -> None:
        self.config = config
        self.folder = RunFolder(config.run)
        self.zoo = zoo = Zoo.open(config.zoo)
        self._check(zoo)
        # An earlier run of this process, perhaps one that failed, may have asked for another precision.
        AcceleratorState._reset_state(reset_partial_state=False)
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision(config.train.precision),
            gradient_accumulation_steps=config.train.gradient_accumulation,
            log_with="tensorboard",
            project_dir=str(self.folder.path),
        )
        if self.accelerator.is_main_process:
            self.folder.start(config, resume=resume, overwrite=overwrite)
        self.accelerator.wait_for_everyone()
        self.layout = TokenLayout.fit(zoo, config.tokens, indices=training_entries(zoo, config))
        self.network = self.build_network()
        self.num_parameters = sum(parameter.numel() for parameter in self.network.parameters())
        self.ema = ExponentialMovingAverage(self.averaged_parameters(), config.train.ema_decay)
        self.model, self.optimizer = self.accelerator.prepare(self.network, self.build_optimizer())
        self.sampler = self.build_sampler(*self._place())
        for name, shadow in self.ema.shadow.items():
            self.ema.shadow[name] = shadow.to(self.accelerator.device)
        self.behaviour = self._build_behaviour()
        self.fresh = self._build_fresh()
        self.step = self._restore(say) if resume else 0
        self.accelerator.init_trackers("tensorboard")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.train.steps

    def build_network(self) -> Any:
        """The untrained networks."""
        return build_network(self.config, self.layout, self.zoo)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over all parameters."""
        settings = self.config.train
        return torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def build_sampler(self, rank: int, world_size: int) -> Any:
        """What reads the rows of each step."""
        _check_split(self.config.train, world_size)
        return BatchSampler(self.zoo, self.layout, self.config, rank, world_size)

    def _build_behaviour(self) -> BehaviourLoss | None:
        settings = self.config.train.behaviour
        if settings is None or not settings.weight:
            return None
        if self.config.train.tokens is not None and self.config.train.tokens < self.layout.num_tokens:
            raise InputError(
                "train.tokens", str(self.config.train.tokens), "null with train.behaviour: a whole network"
            )
        if self.config.model.condition.kind == "none":
            raise InputError("train.behaviour", "no condition", "model.condition.kind that names the task")
        task = build_task(self.config.task) if self.config.task is not None else task_of(self.zoo)
        return BehaviourLoss(task, self.layout, settings, self.zoo)

    def _build_fresh(self) -> FreshLoss | None:
        if self.config.train.fresh is None:
            return None
        if self.sampler.world_size > 1:
            raise InputError("train.fresh", f"{self.sampler.world_size} processes", "one")
        task = build_task(self.config.task) if self.config.task is not None else task_of(self.zoo)
        return FreshLoss(self.network, task, self.layout, self.config.train.fresh)

    def averaged_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters whose moving average is what the generator folder holds."""
        return self.network.named_parameters()

    def learning_rate(self, step: int) -> float:
        """The learning rate of ``step``."""
        return learning_rate(self.config.train, step)

    def _check(self, zoo: Zoo) -> None:
        if not training_entries(zoo, self.config):
            raise InputError(str(zoo.path), "no checkpoint to train on", "at least one", "fill it with `rpg collect`")
        wanted = self.config.model.condition.kind
        if wanted == "none":
            return
        found = zoo.condition.kind if zoo.condition else "none"
        if found != wanted:
            raise InputError(f"{zoo.path}: condition", found, wanted, "set model.condition.kind to what the zoo holds")

    def _place(self) -> tuple[int, int]:
        """Rank and world size; accelerate counts one process per rank under DeepSpeed, so ask torch."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return self.accelerator.process_index, self.accelerator.num_processes

    def train_step(self, step: int, parts: list[Rows]) -> float:
        """One optimizer step over the step's rows; returns the loss of this process."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.model.train()
        total = 0.0
        for rows in parts:
            num_last = num_at_last_time(self.config.train.behaviour, len(rows.samples))
            batch = to_batch(rows, self.network.objective, self.accelerator.device, num_last)
            with self.accelerator.accumulate(self.model):
                loss = self.model(batch, self._state_noise(step, batch))
                mean = loss.mean if self.behaviour is None else loss.mean + self._behaviour(step, batch, loss)
                mean = mean + self._fresh(step)
                value = mean.item()
                if not math.isfinite(value):
                    raise self._not_finite(step, batch, loss.per_token)
                self.accelerator.backward(mean)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.gradient_clip)
                    if norm is not None and not math.isfinite(float(norm)):
                        raise InputError(
                            f"step {step + 1}",
                            "a gradient that is not finite",
                            "finite gradients",
                            "lower train.learning_rate or set train.precision to fp32",
                        )
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += value / len(parts)
        self.ema.update(self.averaged_parameters())
        return total

    def _behaviour(self, step: int, batch: Batch, loss: Loss) -> torch.Tensor:
        assert self.behaviour is not None and loss.samples is not None and batch.conditions is not None
        rows = batch.group[: batch.num_last]
        dropped = None if batch.dropped is None else batch.dropped[rows]
        stream = generator(self.config.seed, "behaviour", step, self.sampler.rank)
        return self.behaviour(loss.samples, batch.conditions[rows], dropped, stream)

    def _fresh(self, step: int) -> torch.Tensor | float:
        """The fresh-state loss, once it has set in."""
        settings = self.config.train.fresh
        if self.fresh is None or settings is None or step < settings.start * self.config.train.steps:
            return 0.0
        with self.accelerator.autocast():
            return self.fresh(generator(self.config.seed, "fresh", step))

    def _state_noise(self, step: int, batch: Batch) -> torch.Tensor | None:
        if self.network.state is None or not self.config.model.state.noise:
            return None
        shape = (len(batch.states), self.config.model.state.width)
        stream = generator(self.config.seed, "state", step, self.sampler.rank, device=self.accelerator.device)
        return torch.randn(shape, generator=stream, device=self.accelerator.device)

    def _not_finite(self, step: int, batch: Batch, per_token: torch.Tensor) -> InputError:
        bad = (~torch.isfinite(per_token)).nonzero()
        token = int(batch.token_ids[bad[0, 0]]) if len(bad) else 0
        layer = self.layout.layers[int(self.layout.positions[token, 0])].name
        return InputError(
            f"step {step + 1}, layer {layer!r}",
            "a loss that is not finite",
            "a finite loss",
            "the weights of the last save are kept; lower train.learning_rate or check the zoo with `rpg inspect`",
        )

    def any_process(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process."""
        return self.sum_over_processes(float(flag)) > 0

    def sum_over_processes(self, value: float) -> float:
        """The sum of every process's ``value``."""
        if self.sampler.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        torch.distributed.all_reduce(total)
        return total.item()

    def log(self, done: int, loss: float) -> float:
        """Append the loss, averaged over processes, to ``metrics.jsonl`` and to TensorBoard; returns it."""
        loss = self.sum_over_processes(loss) / self.sampler.world_size
        values = {"loss": loss, "learning_rate": self.learning_rate(done - 1)}
        self.accelerator.log(values, step=done)
        if self.accelerator.is_main_process:
            with self.folder.metrics.open("a") as handle:
                handle.write(json.dumps({"step": done, **values}) + "\n")
        return loss

    def save(self, done: int) -> None:
        """Publish everything that a resume needs."""

        def write(folder: Path) -> None:
            self.accelerator.save_state(str(folder))
            averages = {name: value.cpu().contiguous() for name, value in self.ema.state_dict().items()}
            save_file(averages, folder / "ema.safetensors")

        if self.sampler.world_size == 1 or self.accelerator.is_main_process:
            self.folder.save(done, write, self.config.train.keep)
        self.accelerator.wait_for_everyone()

    def _restore(self, say: Callable[[str], None]) -> int:
        newest = self.folder.newest(say)
        if newest is None:
            return 0
        step, folder = newest
        self.accelerator.load_state(str(folder))
        self.ema.load_state_dict(load_file(folder / "ema.safetensors"))
        _truncate_metrics(self.folder.metrics, step)
        return step

    def finish(self, seconds: float) -> Path:
        """Write the generator folder from the averaged weights."""
        if self.accelerator.is_main_process:
            network = self.build_network()
            network.load_state_dict({**self.network.state_dict(), **self.ema.shadow})
            facts: dict[str, Any] = {
                "training seconds": round(seconds, 1),
                "parameters": self.num_parameters,
                "training checkpoints": len(self.sampler),
            }
            if self.behaviour is not None:
                facts["behaviour loss, share of training seconds"] = self.behaviour.share_of(seconds)
            Generator(self.config, self.layout, network, self.zoo.condition, facts).save_pretrained(
                self.folder.generator
            )
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.folder.generator


def build_network(config: Config, layout: TokenLayout, zoo: Zoo) -> Network:
    """The untrained networks for a zoo, initialised from the seed."""
    num_states = int(state_ids(zoo, config).max()) + 1
    condition_size = zoo.condition.size if zoo.condition and config.model.condition.kind != "none" else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return make_network(config, layout, num_states, condition_size)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to 0 at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def _check_split(config: TrainConfig, world_size: int) -> None:
    parts = world_size * config.gradient_accumulation
    if config.batch_size % parts:
        raise InputError(
            "train.batch_size", str(config.batch_size), f"a multiple of processes x gradient_accumulation = {parts}"
        )


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that the run goes on from."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
