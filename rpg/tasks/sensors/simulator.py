"""What a sensor sees: images turned, scaled, shifted and perhaps inverted.

T sensors, B images, C channels, S height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.tasks.sensors.config import SensorsConfig
from tokenization.zoo.condition import Setting, SettingKind

DECIMALS = {"angle": 1}
"""To how many decimals settings are drawn, if not to three."""


def declared_settings(config: SensorsConfig) -> tuple[Setting, ...]:
    """The settings of the family's sensors; one whose range is a point is none.

    ``angle`` in degrees counter-clockwise, ``scale``, ``shift_right`` and ``shift_down`` in half frames, ``inverted``.
    """
    low, high = config.angle
    kind: SettingKind = "periodic" if high - low == 360 else "real"
    ranges = [
        Setting("angle", low, high, kind, min(max(0.0, low), high)),
        Setting("scale", *config.scale, default=min(max(1.0, config.scale[0]), config.scale[1])),
        Setting("shift_right", -config.shift, config.shift),
        Setting("shift_down", -config.shift, config.shift),
        Setting("inverted", 0.0, 1.0 if config.inverted else 0.0, "boolean"),
    ]
    return tuple(each for each in ranges if each.low < each.high)


def draw_settings(settings: tuple[Setting, ...], num: int, rng: torch.Generator) -> Tensor:
    """Sensors drawn evenly from the ranges, ``[num, settings]``."""
    share = torch.rand(num, len(settings), generator=rng)
    columns = []
    for setting, each in zip(settings, share.unbind(1), strict=True):
        if setting.kind == "boolean":
            columns.append((each < 0.5).float())
        else:
            value = setting.low + (setting.high - setting.low) * each
            columns.append(value.round(decimals=DECIMALS.get(setting.name, 3)))
    return torch.stack(columns, 1)


def seen_by(images: Tensor, settings: tuple[Setting, ...], values: Tensor) -> Tensor:
    """Images as sensors see them, ``[T, B, C, S, S]``.

    Args:
        images: in 0 … 1, the same for all sensors ``[B, C, S, S]`` or those of each ``[T, B, C, S, S]``.
        settings: what the columns of ``values`` are.
        values: ``[T, settings]``.

    What lies outside the image is 0, dark; of an inverted sensor 1.
    """
    num, shape = len(values), images.shape[-4:]
    known = {setting.name: column for setting, column in zip(settings, values.unbind(1), strict=True)}
    zero = values.new_zeros(num)
    turn = torch.deg2rad(known.get("angle", zero))
    scale, right, down = known.get("scale", zero + 1), known.get("shift_right", zero), known.get("shift_down", zero)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    # Where in the image a place of the frame lies: the shift is taken back first, then the turn.
    rows = [
        torch.stack([cos, -sin, sin * down - cos * right], 1),
        torch.stack([sin, cos, -sin * right - cos * down], 1),
    ]
    size = shape[-1]
    grid = F.affine_grid(torch.stack(rows, 1), [num, 1, size, size], align_corners=False)
    layers = images.expand(num, *shape).flatten(1, 2)  # [T, B·C, S, S]: one place of the frame for all of them
    frames = F.grid_sample(layers, grid, align_corners=False).view(num, *shape)
    inverted = known.get("inverted", zero)[:, None, None, None, None]
    return torch.lerp(frames, 1 - frames, inverted)
