"""The one way to a zoo of training steps: from a base network, fine-tune, and keep checkpoints on the way.

p-diff (arXiv 2402.13144, section 3.1 and appendix A.1) and RPG (arXiv 2501.11587) train a network to convergence, or
take a pretrained one, fine-tune all or parts of it, and keep what is fine-tuned after each of some steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpg.devices import task_device, use_threads
from rpg.seeding import derive_seed
from rpg.tasks.collecting import Progress, SavedTraining, Tick, chosen_parameters, cosine_decay, open_zoo, train_step
from rpg.tasks.images.image_cache import batches_to_score, batches_to_train
from rpg.tasks.images.networks import check_structure
from tokenization.checkpoint.checkpoint import StateDict, read_state_dict, save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

SAVE_EVERY = 100
"""Steps on the way to the base network after which a kill loses nothing."""

TRAINING = "training.safetensors"
"""In a zoo folder: where fine-tuning goes on after a kill; gone when the zoo is whole."""

Kept = tuple[int, Mapping[str, Tensor], Tensor | None]
"""A fine-tuning step, from 1 on, the tensors of its checkpoint, which may change with the next step, and its loss."""


class StepwiseTask(ABC):
    """Collects a zoo run by run; a task of its own says how a run is trained.

    Attributes:
        unrecorded: fields of the configuration that change no checkpoint, so that a zoo may be completed under others.
        runs: independent runs.
        threads: of training and scoring on a CPU; as many as torch has when None.
    """

    unrecorded: tuple[str, ...] = ("device", "workers")
    runs = 1
    threads: int | None = None
    config: Any

    @abstractmethod
    def train_run(self, zoo: Zoo, run: int, tick: Tick) -> Iterator[Kept]:
        """Train a run and yield each fine-tuning step; what a resume needs is kept in the folder of ``zoo``."""

    @property
    @abstractmethod
    def first_steps(self) -> int:
        """Steps before the first of fine-tuning."""

    def steps(self) -> list[int]:
        """The fine-tuning steps after which a checkpoint is kept, ascending."""
        return list(range(1, self.config.steps + 1))

    def stored(self, tensors: Mapping[str, Tensor]) -> StateDict:
        """The checkpoint that is written."""
        return {name: value.detach().cpu().clone() for name, value in tensors.items()}

    def metrics(self, stored: StateDict, loss: Tensor | None) -> dict[str, float]:
        """What the manifest says of a checkpoint."""
        return {}

    def collect(self, path: Path | str, *, progress: Progress | None = None, limit: int | None = None) -> Zoo:
        """Train the runs and append every checkpoint that the zoo at ``path`` lacks.

        A run is decided by the configuration and its number alone. One that was cut short is trained again, and what
        the zoo has of it stays.
        """
        steps, every = self.steps(), self.config.hold_out
        length = self.first_steps + steps[-1]  # data that are missing are missed before there is a folder
        zoo = open_zoo(path, self.config, ignore=self.unrecorded)
        saved = {(entry.run, entry.step) for entry in zoo.entries}
        for run in range(self.runs):
            missing = {step for step in steps if (run, step) not in saved}
            if not missing or (limit is not None and len(zoo) >= limit):
                continue

            def tick(done: int, before: int = run * length) -> None:
                if progress is not None:
                    progress(before + done, self.runs * length)

            with use_threads(self.threads) if self.threads is not None else nullcontext():
                for step, tensors, loss in self.train_run(zoo, run, tick):
                    if step in missing:
                        stored = self.stored(tensors)
                        split = "held_out" if every and (steps.index(step) + 1) % every == 0 else "train"
                        zoo.append(stored, run=run, step=step, split=split, metrics=self.metrics(stored, loss))
                    if limit is not None and len(zoo) >= limit:
                        break
        if progress is not None and len(zoo) == self.runs * len(steps):  # runs that were complete have not ticked
            progress(self.runs * length, self.runs * length)
        return zoo


class FinetunedTask(StepwiseTask):
    """One run, from a base network that is kept in a file; a task of its own brings network, data and loss."""

    resumed = False
    """Whether fine-tuning that was cut short goes on from its last checkpoint, rather than from the base."""

    def __init__(self, config: Any) -> None:
        self.config, self.threads = config, getattr(config, "threads", None)
        self.device = task_device(config.device)
        self._base: StateDict | None = None

    @abstractmethod
    def make_network(self) -> nn.Module:
        """The target network that training begins with, from torch's global random state."""

    @abstractmethod
    def batches_after(self, done: int) -> Iterator[Any]:
        """The training batches of all steps but the first ``done``, without end, whatever was drawn before."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any, step: int) -> Tensor:
        """The loss of a batch; what it draws is decided by ``step``."""

    def rate(self, step: int) -> float:
        """The learning rate of a fine-tuning step, counted from 0."""
        return self.config.finetune_learning_rate

    @property
    def first_steps(self) -> int:
        """Steps to the base network."""
        return self.config.train_steps

    @property
    def save_every(self) -> int:
        """Steps to the base network between two saves."""
        return SAVE_EVERY

    def build(self) -> nn.Module:
        """The target network, untrained or pretrained; the configuration's seed decides its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "initialisation"))
            return self.make_network()

    def placed(self) -> nn.Module:
        """`build`, where the task computes."""
        return self.build().to(self.device)

    @property
    def is_whole(self) -> bool:
        """Whether checkpoints are whole networks, buffers included."""
        return "*" in self.config.finetune

    def chosen(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are fine-tuned. Raises InputError if a pattern matches none."""
        return chosen_parameters(network, self.config.finetune or last_norms(network, self.config.num_norms))

    def part(self, network: nn.Module) -> Mapping[str, Tensor]:
        """What a checkpoint holds of ``network``. Raises InputError if a pattern matches no parameter."""
        return network.state_dict() if self.is_whole else self.chosen(network)

    def train_run(self, zoo: Zoo, run: int, tick: Tick) -> Iterator[Kept]:
        """Train the base network unless its file exists, and fine-tune it; checkpoints may be moving averages."""
        network, steps, average = self.base_network(tick), self.steps(), getattr(self.config, "average", 0.0)
        names = set(self.part(network))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in names)
        network.train(self.is_whole)  # what is not fine-tuned stays, running statistics included
        optimizer = self._optimizer(parameter for parameter in network.parameters() if parameter.requires_grad)
        training = SavedTraining(zoo.path / TRAINING, network, optimizer)
        done = training.load() if self.resumed else 0
        tracked = {name: value for name, value in network.state_dict().items() if name in names}
        kept = {name: value.detach().cpu().clone() for name, value in tracked.items()} if average else tracked
        batches = self.batches_after(self.first_steps + done)  # other than those of the first steps
        for step in range(done + 1, steps[-1] + 1):
            place = self.first_steps + step - 1
            loss = self._step(network, optimizer, next(batches), place, self.rate(step - 1))
            for name, mean in kept.items() if average else ():
                value = tracked[name].detach().cpu()
                kept[name] = value.lerp(mean, average) if value.is_floating_point() else value.clone()
            tick(place + 1)
            yield step, kept, loss
            if self.resumed and step in steps[:-1]:
                training.save(step)
        training.remove()

    def base_network(self, tick: Tick = lambda done: None) -> nn.Module:
        """The whole network before fine-tuning: read from ``base``, or trained and written there.

        Training that a kill cut short goes on from the last step it saved, to the same bits. Raises InputError if the
        file at ``base`` is another network's.
        """
        config, path = self.config, Path(self.config.base)
        network = self.placed()
        if path.is_file():
            network.load_state_dict(self.base())
            return network
        optimizer = self._optimizer(network.parameters())
        training = SavedTraining(path.with_suffix(".training.safetensors"), network.train(), optimizer)
        path.parent.mkdir(parents=True, exist_ok=True)
        done = training.load()
        batches = self.batches_after(done)
        for step in range(done, self.first_steps):
            rate = config.learning_rate * cosine_decay(step, self.first_steps)
            self._step(network, optimizer, next(batches), step, rate)
            tick(step + 1)
            if (step + 1) % self.save_every == 0 and step + 1 < self.first_steps:
                training.save(step + 1)
        save_checkpoint(path, {name: value.cpu() for name, value in network.state_dict().items()})
        training.remove()
        return network

    def _optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1.0, weight_decay=self.config.weight_decay)

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, step: int, rate: float) -> Tensor:
        return train_step(optimizer, partial(self.loss, network, batch, step), rate, self.config.seed, step)

    def base(self) -> StateDict:
        """The base network's tensors. Raises InputError if the file is missing or is another network's."""
        path = Path(self.config.base)
        if not path.is_file():
            raise InputError(f"task.base {path} is not there; collect the zoo, which writes it, or name the right file")
        if self._base is None:
            self._base = read_state_dict(path)
            check_structure(self._base, self.build().state_dict(), f"task.base {path}")
        return self._base

    @cached_property
    def _scored(self) -> tuple[nn.Module, Collection[str]]:
        network = self.placed()
        return network.eval(), self.chosen(network)

    def network_with(self, tensors: Mapping[str, Tensor], where: str = "a network") -> nn.Module:
        """The network with a checkpoint's tensors in it and the base's for the rest; the same object each time.

        Raises InputError if a tensor of the network called ``where`` does not fit, or a base is needed and missing.
        """
        network, chosen = self._scored
        whole = network.state_dict()
        is_part = not self.is_whole and len(tensors) < len(whole)
        check_structure(tensors, {name: whole[name] for name in chosen} if is_part else whole, where)
        network.load_state_dict({**self.base(), **tensors} if is_part else dict(tensors))
        return network


class DatasetTask(FinetunedTask):
    """One whose batches are read from data sets; a task of its own opens them and puts samples together."""

    splits: tuple[str, ...] = ("train", "validation", "test")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._datasets: dict[str, Any] = {}

    @property
    def fetches_weights(self) -> bool:
        """Whether `build` asks the hub: not where there is a base, and not for a plan, which wants no values."""
        known = Path(self.config.base).is_file() or torch.get_default_device().type == "meta"
        return self.config.pretrained and not known

    @abstractmethod
    def open_split(self, split: str) -> Any:
        """The data set of one of ``splits``. Raises InputError where the folder lacks it."""

    @abstractmethod
    def batch(self, samples: list[Any]) -> Any:
        """Samples as the loss takes them, where the task computes."""

    def dataset(self, split: str) -> Any:
        """The data set of a split, opened once. Raises InputError for an unknown split, or as `open_split` does."""
        if split not in self.splits:
            raise InputError(f"there is no split {split!r}; choose one of {', '.join(self.splits)}")
        if split not in self._datasets:
            self._datasets[split] = self.open_split(split)
        return self._datasets[split]

    def batches(self, split: str) -> Iterator[Any]:
        """All samples of a split, in order. Raises InputError if one cannot be read."""
        return map(self.batch, batches_to_score(self.dataset(split), self.config))

    def batches_after(self, done: int) -> Iterator[Any]:
        """The training batches but the first ``done`` ones, without end."""
        return map(self.batch, batches_to_train(self.dataset("train"), self.config, done))


def last_norms(network: nn.Module, num: int) -> tuple[str, ...]:
    """Names of the parameters of the last ``num`` normalisation layers, in the order in which they are registered."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    norms = [
        name for name, module in network.named_modules() if isinstance(module, kinds) and module.weight is not None
    ]
    return tuple(f"{name}.{kind}" for name in norms[-num:] for kind in ("weight", "bias"))
