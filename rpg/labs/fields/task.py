"""The task ``fields``: a zoo of neural fields, one for every image or solid shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from rpg.devices import single_threaded
from rpg.labs.fields.config import FieldsConfig
from rpg.labs.fields.data import FieldData, alter, load_data
from rpg.labs.fields.siren import Siren, evaluate, fit, grid_points
from rpg.tasks.collecting import append_many, open_zoo
from rpg.tasks.side_by_side import Stacked, stack, unstack
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.manifest import ZooEntry
from tokenization.zoo.zoo import Zoo

TURN, TILT = math.radians(35), math.radians(28)
"""The viewer's azimuth and elevation."""
LIGHT = (-0.4, 0.55, 0.75)
"""Direction to the light, in the viewer's axes: right, up, towards the viewer."""
REACH, SAMPLES, SLOPE = 1.25, 64, 0.01
"""Half the width of the view; samples along each ray; step of the finite differences for normals."""
DRAWN = 16
"""Fields that are drawn at once."""


def axes() -> Tensor:
    """The viewer's right, up and forward (towards the viewer) as unit vectors, ``[3, 3]``."""
    sideways = torch.tensor([-math.sin(TURN), math.cos(TURN), 0.0])
    towards = torch.tensor([math.cos(TURN) * math.cos(TILT), math.sin(TURN) * math.cos(TILT), math.sin(TILT)])
    return torch.stack([sideways, torch.linalg.cross(towards, sideways), towards])


def views(values: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Render T solid shapes.

    Args:
        values: maps points ``[P, 3]``, or each field's own ``[T, P, 3]``, to values ``[T, P]``, positive inside.
        size: S.

    Returns:
        Ink ``[T, 1, S, S]``: 0 for the background, more in the shade.
    """
    right, up, towards = axes()
    across = grid_points(size, size)  # row, column
    origins = REACH * (across[:, 1:] * right - across[:, :1] * up)  # [S², 3]
    depths = REACH * torch.linspace(1, -1, SAMPLES)
    points = origins[:, None] + depths[:, None] * towards  # [S², D, 3]
    within = points.abs().amax(-1) <= 1
    shown = values(points.flatten(0, 1)).view(-1, size * size, SAMPLES)
    shown = torch.where(within, shown, -1.0)  # [T, S², D]
    inside = shown > 0
    hit, first = inside.any(-1), inside.float().argmax(-1)  # [T, S²]
    before = (first - 1).clamp(min=0)
    now, then = (shown.gather(-1, each[..., None])[..., 0] for each in (first, before))
    share = (now / (now - then).clamp(min=1e-6)).clamp(0, 1)  # of the way back to the sample outside
    depth = depths[first] + share * (depths[before] - depths[first])
    surface = (origins + depth[..., None] * towards).clamp(-1, 1)  # [T, S², 3]
    slopes = [values(surface - SLOPE * axis) - values(surface + SLOPE * axis) for axis in torch.eye(3)]
    normals = torch.nn.functional.normalize(torch.stack(slopes, -1), dim=-1)  # outwards
    light = torch.nn.functional.normalize(torch.tensor(LIGHT), dim=0) @ torch.stack([right, up, towards])
    ink = 0.85 - 0.7 * (normals @ light).clamp(min=0)
    return torch.where(hit, ink, 0.0).view(-1, 1, size, size)


LEARNED = ("train", "validation")
"""Splits with altered copies, which form the splits ``altered_train`` and ``altered_validation``."""


class FieldsTask:
    """Collects zoos of fields and renders fields. Entries: ``run`` is the datum, ``step`` its copy, 0 the original."""

    def __init__(self, config: FieldsConfig) -> None:
        self.config = config

    @cached_property
    def data(self) -> FieldData:
        """Values, classes and splits. Raises InputError for a folder without data."""
        return load_data(self.config)

    @property
    def condition(self) -> ConditionSpec:
        """The class of the datum; classes of altered copies follow those of originals."""
        names = self.data.class_names
        if self.config.altered:
            names = (*names, *(f"{name} altered" for name in names))
        return ConditionSpec("class", len(names), names)

    def build(self) -> nn.Module:
        """The untrained field: points ``[P, d]`` → values ``[P, C]``."""
        return Siren(self.config, self.data.values.shape[1])

    @single_threaded()
    def collect(
        self, path: Path | str, *, progress: Callable[[int, int], None] | None = None, limit: int | None = None
    ) -> Zoo:
        """Fit the fields that the zoo at ``path`` lacks."""
        data = self.data
        zoo = open_zoo(path, self.config, self.condition)
        learned = torch.tensor([i for i, split in enumerate(data.splits) if split in LEARNED])
        copies = range(self.config.altered + 1) if limit is None else range(1)
        total = len(data.values) + (len(copies) - 1) * len(learned)
        for copy in copies:
            rows = torch.arange(len(data.values) if limit is None else limit) if copy == 0 else learned
            written = {entry.run for entry in zoo.entries if entry.step == copy}
            if len(written) < len(rows):
                append_many(zoo, [each for each in self._fitted(rows, copy) if each[0].run not in written])
            if progress is not None:
                progress(len(zoo), total)
        return zoo

    def _fitted(self, rows: Tensor, copy: int) -> Iterator[tuple[ZooEntry, dict[str, Tensor]]]:
        """Fields of the data ``rows``, or of one altered copy of these."""
        data, values = self.data, self.data.values[rows]
        values = alter(values, self.config, copy) if copy else values
        fields = fit(self.config, values)
        errors = (self.sample_stacked(fields, data.size) - values).square().flatten(1).mean(1)
        later, before = (len(data.class_names), "altered_") if copy else (0, "")
        for row, field, error in zip(rows.tolist(), unstack(fields), errors.tolist(), strict=True):
            entry = ZooEntry(
                file=f"checkpoints/{row:06d}-{copy:02d}.safetensors", run=row, step=copy,
                split=before + data.splits[row], condition=(float(data.labels[row]) + later,),
                metrics={"squared_error": error},
            )  # fmt: skip
            yield entry, field

    @torch.no_grad()
    def sample(self, state_dicts: Iterable[Mapping[str, Tensor]], size: int) -> Tensor:
        """Values of T fields on a grid of any size, ``[T, C, *grid]``."""
        return self.sample_stacked(stack(list(state_dicts)), size)

    @torch.no_grad()
    def render(self, state_dicts: Iterable[Mapping[str, Tensor]], size: int) -> Tensor:
        """Pictures ``[T, C, size, size]`` of T fields, in ink 0 … 1: images themselves, or views of shapes."""
        draw = self.sample_stacked if self.config.dimensions == 2 else self._view_stacked
        fields = list(state_dicts)
        return torch.cat([draw(stack(fields[i : i + DRAWN]), size) for i in range(0, len(fields), DRAWN)])

    def sample_stacked(self, fields: Stacked, size: int) -> Tensor:
        """`sample` for stacked fields, all at once."""
        sizes = [size] * self.config.dimensions
        values = evaluate(self.config, fields, grid_points(*sizes))  # [T, P, C]
        return values.mT.reshape(len(values), -1, *sizes)

    def shown(self, weights: Stacked) -> Tensor:
        """`sample_stacked` on the data's own grid, ``[T, F]``."""
        return self.sample_stacked(weights, self.data.size).flatten(1)

    def _view_stacked(self, fields: Stacked, size: int) -> Tensor:
        return views(lambda points: evaluate(self.config, fields, points)[..., 0], size)
