"""Batches of images of any size with what is known of them: an order by seed and epoch, and a start in its midst."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from rpg.seeding import make_rng
from rpg.tasks.images.image_cache import AddressedImages, CheckedImages, LaterBatches
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
