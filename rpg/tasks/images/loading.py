"""Batches of images that are read from the disk: prepared, in an order that resumes anywhere, their faults in words."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from rpg.seeding import derive_seed, make_rng
from tokenization.errors import InputError


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


def steps_an_epoch(dataset: Any, config: Loading) -> int:
    """Full batches of a data set; a smaller data set is one batch."""
    return max(1, len(dataset) // config.batch_size)


def batches_to_train(dataset: Any, config: Loading, done: int = 0) -> Iterator[list[Any]]:
    """Full batches, without end, but for the first ``done`` ones; their samples are not read.

    A batch of one image would be too few for a batch norm of global features.

    Raises:
        InputError: a sample cannot be read.
    """
    per_epoch = steps_an_epoch(dataset, config)
    first, skip = divmod(done, per_epoch)
    for epoch in itertools.count(first):
        order = RandomSampler(dataset, generator=make_rng(config.seed, "batches", epoch))
        altered = AddressedSamples(dataset, config.seed, epoch)
        yield from itertools.islice(_checked(altered, dataset, order, config, skip), per_epoch - skip)
        skip = 0


def _checked(read: Any, dataset: Any, order: Any, config: Loading, skip: int = 0) -> Iterator[list[Any]]:
    loader: Any = DataLoader(
        CheckedSamples(read, dataset),
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


class LaterBatches(torch.utils.data.BatchSampler):
    """The batches of an order but for the first ``skip``."""

    def __init__(self, order: torch.utils.data.Sampler[int], size: int, skip: int) -> None:
        super().__init__(order, size, drop_last=False)
        self.skip = skip

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(super().__iter__(), self.skip, None)


class AddressedSamples(torch.utils.data.Dataset[Any]):
    """A data set with addressed augmentation: a sample's random numbers do not depend on order or process.

    timm draws crops from Python's generator and mirrors by torch's; both are left as they were.

    Args:
        dataset: the samples; ``dataset[index]`` may draw.
        seed: decides the draws, with ``parts``.
        parts: what else names them, as the number of the epoch.
    """

    def __init__(self, dataset: Any, seed: int, *parts: int | str) -> None:
        self.dataset, self.seed, self.parts = dataset, seed, parts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        seed, before = derive_seed(self.seed, "alterations", *self.parts, index), random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            try:
                return self.dataset[index]
            finally:
                random.setstate(before)


class CheckedSamples(torch.utils.data.Dataset[Any]):
    """The samples of ``read``; for one that cannot be read the error message, since words cross processes."""

    def __init__(self, read: Any, dataset: Any) -> None:
        self.read, self.dataset = read, dataset

    def __len__(self) -> int:
        return len(self.read)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read[index]
        except (OSError, SyntaxError, ValueError) as error:  # pillow's for what is truncated or no image
            return str(unreadable(self.dataset, index, error))


def unreadable(dataset: Any, index: int, error: Exception) -> InputError:
    """What to raise for an image of a data set of torchvision that cannot be read."""
    samples = getattr(dataset, "samples", None)
    name = samples[index][0] if samples is not None else f"image {index} of {type(dataset).__name__}"
    return InputError(f"{name} cannot be read ({str(error).splitlines()[0]}); replace it or take it out")
