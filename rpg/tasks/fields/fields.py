"""The task ``fields``: a zoo of neural fields, one for every image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from rpg.tasks.fields.config import FieldsConfig
from rpg.tasks.fields.images import FieldImages, alter, load_images
from rpg.tasks.fields.siren import Siren, evaluate, fit, grid_points
from rpg.tasks.images.collection import open_zoo, single_threaded
from rpg.tasks.side_by_side import Stacked, stack, unstack
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.manifest import ZooEntry
from tokenization.zoo.zoo import Zoo, with_digest

LEARNED = ("train", "validation")
"""Splits of images that are altered, into the splits ``altered_train`` and ``altered_validation``."""

WRITERS = 8
"""Files written at a time: most of the time of a small file is waiting for the disk."""


def append_many(zoo: Zoo, entries: Sequence[ZooEntry], state_dicts: Sequence[Mapping[str, Tensor]]) -> None:
    """Write small checkpoints side by side and list them, all or none; much faster than one by one."""

    def write(entry: ZooEntry, state_dict: Mapping[str, Tensor]) -> ZooEntry:
        save_checkpoint(zoo.path / entry.file, state_dict)
        return with_digest(entry, Checkpoint.open(zoo.path / entry.file))

    (zoo.path / "checkpoints").mkdir(exist_ok=True)
    with ThreadPoolExecutor(WRITERS) as pool:
        zoo.extend(list(pool.map(write, entries, state_dicts)))


class FieldsTask:
    """Collects zoos of fields and renders fields. Entries: ``run`` is the image, ``step`` its copy, 0 the original.

    Args:
        config: images, network and fit.
    """

    def __init__(self, config: FieldsConfig) -> None:
        self.config = config

    @cached_property
    def data(self) -> FieldImages:
        """Images, classes and splits. Raises InputError for a folder without images."""
        return load_images(self.config)

    @property
    def condition(self) -> ConditionSpec:
        """The class of the image; those of altered copies come after those of originals."""
        names = self.data.class_names
        if self.config.altered and self.config.own_classes:
            names = (*names, *(f"{name} altered" for name in names))
        return ConditionSpec("class", len(names), names)

    def build(self) -> nn.Module:
        """The untrained field: points ``[P, 2]`` → values ``[P, C]``."""
        return Siren(self.config, self.data.images.shape[1])

    @single_threaded()
    def collect(
        self, path: Path | str, *, progress: Callable[[int, int], None] | None = None, limit: int | None = None
    ) -> Zoo:
        """Fit the fields that the zoo at ``path`` lacks.

        Args:
            path: folder of the zoo.
            progress: called with (fields written, fields in all).
            limit: fit at least this many originals only, and altered copies of none.

        Raises:
            InputError: the zoo there was collected with another configuration.
        """
        data = self.data
        zoo = open_zoo(path, self.config, self.condition)
        learned = torch.tensor([i for i, split in enumerate(data.splits) if split in LEARNED])
        copies = range(self.config.altered + 1) if limit is None else range(1)
        total = len(data.images) + (len(copies) - 1) * len(learned)
        for copy in copies:
            rows = torch.arange(len(data.images) if limit is None else limit) if copy == 0 else learned
            written = {entry.run for entry in zoo.entries if entry.step == copy}
            if len(written) < len(rows):
                images = alter(data.images[rows], self.config, copy) if copy else data.images[rows]
                self._append(zoo, fit(self.config, images), images, rows, copy, written)
            if progress is not None:
                progress(len(zoo), total)
        return zoo

    def _append(self, zoo: Zoo, fields: Stacked, images: Tensor, rows: Tensor, copy: int, written: set[int]) -> None:
        """List the fields ``rows`` of one copy, all or none of those that are not ``written``."""
        data = self.data
        errors = (self.render_stacked(fields, images.shape[-1]) - images).square().flatten(1).mean(1)
        later = len(data.class_names) if copy and self.config.own_classes else 0
        entries, state_dicts = [], []
        for row, state_dict, error in zip(rows.tolist(), unstack(fields), errors.tolist(), strict=True):
            if row not in written:
                split = f"altered_{data.splits[row]}" if copy else data.splits[row]
                entry = ZooEntry(
                    file=f"checkpoints/{row:06d}-{copy:02d}.safetensors", run=row, step=copy, split=split,
                    condition=(float(data.labels[row]) + later,), metrics={"squared_error": error},
                )  # fmt: skip
                entries.append(entry)
                state_dicts.append(state_dict)
        append_many(zoo, entries, state_dicts)

    @torch.no_grad()
    def render(self, state_dicts: Iterable[Mapping[str, Tensor]], size: int, chunk: int = 256) -> Tensor:
        """Images ``[T, C, size, size]`` of T fields; a field has no resolution, so any ``size`` will do."""
        fields = list(state_dicts)
        parts = (stack(fields[first : first + chunk]) for first in range(0, len(fields), chunk))
        return torch.cat([self.render_stacked(part, size) for part in parts])

    def render_stacked(self, fields: Stacked, size: int) -> Tensor:
        """`render` of stacked fields, all at once."""
        values = evaluate(self.config, fields, grid_points(size, size))  # [T, size², C]
        return values.mT.reshape(len(values), -1, size, size)
