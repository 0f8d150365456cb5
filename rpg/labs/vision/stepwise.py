"""One base network, and the checkpoints of its fine-tuning steps: what tasks share that differ in network and loss.

p-diff's way to a zoo (arXiv 2402.13144, section 3.1) for whole networks and for parts of them. What is not fine-tuned
is in one base checkpoint, and a zoo of parts holds those alone.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from rpg.devices import task_device
from rpg.labs.vision.config import StepwiseConfig
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.collecting import (
    Progress,
    SavedTraining,
    chosen_parameters,
    cosine_decay,
    open_zoo,
    train_step,
    use_threads,
)
from rpg.tasks.images.image_cache import AddressedImages, CheckedImages, LaterBatches
from rpg.tasks.images.images import check_structure
from rpg.tasks.images.timm_finetune import last_norms
from tokenization.checkpoint.checkpoint import read_state_dict, save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

SAVE_EVERY = 100
"""Steps on the way to the base network after which a kill loses nothing."""


class StepwiseTask(ABC):
    """Collects the zoo and puts checkpoints into the base network; a task of its own adds network, data and loss."""

    unrecorded: tuple[str, ...] = ("device",)
    """Fields of the configuration that change no checkpoint, so that a zoo may be gone on with when they change."""

    def __init__(self, config: StepwiseConfig) -> None:
        self.settings = config
        self.device = task_device(config.device)

    @abstractmethod
    def make_network(self) -> nn.Module:
        """The untrained target network, from torch's global random state."""

    @abstractmethod
    def batches_after(self, done: int) -> Iterator[Any]:
        """The training batches of all steps but the first ``done``, without end, whatever was drawn before."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any, step: int) -> Tensor:
        """The loss of a batch; what it draws is decided by ``step``."""

    def build(self) -> nn.Module:
        """The target network, untrained; the configuration's seed decides its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.settings.seed, "initialisation"))
            return self.make_network()

    @property
    def is_whole(self) -> bool:
        """Whether checkpoints are whole networks, buffers included."""
        return "*" in self.settings.finetune

    def chosen(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are fine-tuned. Raises InputError if a pattern matches none."""
        return chosen_parameters(network, self.settings.finetune or last_norms(network, self.settings.num_norms))

    def part(self, network: nn.Module) -> Mapping[str, Tensor]:
        """What a checkpoint holds of ``network``. Raises InputError if a pattern matches no parameter."""
        if self.is_whole:
            return network.state_dict()
        return self.chosen(network)

    def collect(self, path: Path | str, *, progress: Progress | None = None, limit: int | None = None) -> Zoo:
        """Train the base network if there is none yet, fine-tune it, and save what is fine-tuned after each step.

        Raises:
            InputError: the data are not there, the base is another network's, or the zoo at ``path`` is another one.
        """
        config, zoo = self.settings, open_zoo(path, self.settings, ignore=self.unrecorded)
        missing = set(range(1, config.steps + 1)) - {entry.step for entry in zoo.entries}
        if not missing:
            return zoo
        with use_threads(config.threads):
            network = self.base_network()
            for step in self._finetune(network):
                if step in missing and (limit is None or len(zoo) < limit):
                    held_out = config.hold_out and step % config.hold_out == 0
                    zoo.append(self._kept, run=0, step=step, split="held_out" if held_out else "train")
                if progress is not None:
                    progress(step, config.steps)
                if limit is not None and len(zoo) >= limit:
                    break
        return zoo

    def _finetune(self, network: nn.Module) -> Iterator[int]:
        """The fine-tuning steps; after each its number, and in ``_kept`` what is saved of it."""
        config, names = self.settings, self.chosen(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in names)
        network.train(self.is_whole)  # what is not fine-tuned stays, running statistics included
        values = network.state_dict()  # shares the network's memory
        tracked = {name: values[name] for name in (values if self.is_whole else names)}
        self._kept = {name: value.detach().cpu().clone() for name, value in tracked.items()}
        optimizer = self._optimizer(parameter for parameter in network.parameters() if parameter.requires_grad)
        batches = self.batches_after(config.train_steps)  # other than those of the first steps
        for step in range(1, config.steps + 1):
            self._step(network, optimizer, next(batches), config.train_steps + step - 1, config.finetune_learning_rate)
            for name, mean in self._kept.items():
                value = tracked[name].detach().cpu()
                self._kept[name] = value.lerp(mean, config.average) if value.is_floating_point() else value.clone()
            yield step

    def base_network(self) -> nn.Module:
        """The whole network before fine-tuning: read from ``base``, or trained and written there.

        Training that a kill cut short goes on from the last step it saved, to the same bits.

        Raises:
            InputError: the file at ``base`` is another network's.
        """
        config, path = self.settings, Path(self.settings.base)
        network = self.build().to(self.device)
        if path.is_file():
            network.load_state_dict(self._base)
            return network
        optimizer = self._optimizer(network.parameters())
        training = SavedTraining(path.with_suffix(".training.safetensors"), network.train(), optimizer)
        path.parent.mkdir(parents=True, exist_ok=True)
        done = training.load()
        batches = self.batches_after(done)
        for step in range(done, config.train_steps):
            rate = config.learning_rate * cosine_decay(step, config.train_steps)
            self._step(network, optimizer, next(batches), step, rate)
            if (step + 1) % SAVE_EVERY == 0 and step + 1 < config.train_steps:
                training.save(step + 1)
        save_checkpoint(path, {name: value.cpu() for name, value in network.state_dict().items()})
        training.remove()
        return network

    def _optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1.0, weight_decay=self.settings.weight_decay)

    def _step(self, network: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, step: int, rate: float) -> None:
        train_step(optimizer, partial(self.loss, network, batch, step), rate, self.settings.seed, step)

    @cached_property
    def _base(self) -> dict[str, Tensor]:
        path = Path(self.settings.base)
        if not path.is_file():
            raise InputError(f"task.base {path} is not there; collect the zoo, which writes it, or name the right file")
        found = read_state_dict(path)
        check_structure(found, self.build().state_dict(), f"task.base {path}")
        return found

    @cached_property
    def _scored(self) -> tuple[nn.Module, Collection[str]]:
        network = self.build().to(self.device)
        return network.eval(), self.chosen(network)

    def network_with(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The network with a checkpoint's tensors in it and the base's for the rest; the same object each time.

        Raises:
            InputError: a tensor does not fit, or there is no base checkpoint where one is needed.
        """
        network, chosen = self._scored
        whole = network.state_dict()
        is_part = not self.is_whole and len(tensors) < len(whole)
        check_structure(tensors, {name: whole[name] for name in chosen} if is_part else whole, "a network")
        network.load_state_dict({**self._base, **tensors} if is_part else dict(tensors))
        return network


class Loading(Protocol):
    """What of a configuration decides batches."""

    @property
    def seed(self) -> int:
        """Decides order and alterations."""

    @property
    def batch_size(self) -> int:
        """Images of a batch."""

    @property
    def workers(self) -> int:
        """Processes that read."""


def batches_to_score(dataset: Any, config: Loading) -> Iterator[list[Any]]:
    """All samples in their order. Raises InputError where one cannot be read."""
    yield from _checked(dataset, dataset, SequentialSampler(dataset), config)


def batches_to_train(dataset: Any, config: Loading, done: int = 0) -> Iterator[list[Any]]:
    """Full batches, without end, but for the first ``done`` ones; a smaller data set gives all it has.

    Raises:
        InputError: an image cannot be read.
    """
    per_epoch = max(1, len(dataset) // config.batch_size)
    first, skip = divmod(done, per_epoch)
    for epoch in itertools.count(first):
        order = RandomSampler(dataset, generator=make_rng(config.seed, "batches", epoch))
        altered = AddressedImages(dataset, config.seed, epoch)
        yield from itertools.islice(_checked(altered, dataset, order, config, skip), per_epoch - skip)
        skip = 0


def _checked(read: Any, dataset: Any, order: Any, config: Loading, skip: int = 0) -> Iterator[list[Any]]:
    loader: Any = DataLoader(
        CheckedImages(read, dataset),
        batch_sampler=LaterBatches(order, config.batch_size, skip),
        num_workers=config.workers,
        collate_fn=list,
        generator=make_rng(config.seed, "workers"),  # else each loader takes a number of torch's global state
    )
    for samples in loader:
        for sample in samples:
            if isinstance(sample, str):
                raise InputError(sample)
        yield samples
