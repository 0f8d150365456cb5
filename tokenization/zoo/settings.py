"""Settings: the named numbers of a condition, declared with their ranges, and what a network sees of them.

B conditions, C settings, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenization.errors import InputError

SettingKind = Literal["real", "periodic", "boolean"]

HARMONICS = 2
"""Of a periodic setting: cosine and sine of it and of its double."""


@dataclass(frozen=True)
class Setting:
    """One number of a condition.

    Attributes:
        name: what users call it.
        low, high: the least and greatest value that was learned; of a periodic one they mean the same.
        kind: ``real``; ``periodic``, whose range closes to a circle; ``boolean``, 0 or 1.
        default: its value where a user names none.
    """

    name: str
    low: float
    high: float
    kind: SettingKind = "real"
    default: float = 0.0

    @classmethod
    def from_json(cls, content: Any, where: str) -> Setting:
        """Read what ``dataclasses.asdict`` gives. Raises InputError that names ``where``."""
        wanted = {"name", "low", "high", "kind", "default"}
        if not isinstance(content, dict) or content.keys() != wanted or content["kind"] not in get_args(SettingKind):
            raise InputError(f"{where}: a setting is {content!r}; write {', '.join(sorted(wanted))}")
        numbers = [content[key] for key in ("low", "high", "default")]
        if not all(isinstance(each, int | float) for each in numbers) or not numbers[0] < numbers[1]:
            raise InputError(f"{where}: setting {content['name']!r} has no range; write numbers with low below high")
        low, high, default = (float(each) for each in numbers)
        return cls(str(content["name"]), low, high, content["kind"], default)

    def check(self, value: float) -> float:
        """The value, if it lies in the range. Raises InputError if not."""
        if self.kind == "boolean" and value not in (0, 1):
            raise InputError(f"setting {self.name} is {value:g}; give true or false")
        if not self.low <= value <= self.high:  # neither does NaN
            raise InputError(f"setting {self.name} is {value:g}; give {self.low:g} to {self.high:g}")
        return value


def parse_settings(settings: Sequence[Setting], given: Mapping[str, Any]) -> list[float]:
    """The values of all settings, defaults where none is given; texts are read as numbers, true or false.

    Raises:
        InputError: there is no such setting, or a value is no number or lies outside the range.
    """
    known = {each.name: each for each in settings}
    values = {each.name: each.default for each in settings}
    for name, value in given.items():
        if name not in known:
            raise InputError(f"there is no setting {name!r}; choose among {', '.join(known)}")
        words = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
        try:
            number = words[value.lower()] if isinstance(value, str) and value.lower() in words else float(value)
        except (TypeError, ValueError):
            raise InputError(f"setting {name} is {value!r}; give a number") from None
        values[name] = known[name].check(number)
    return list(values.values())


def num_features(settings: Sequence[Setting]) -> int:
    """F."""
    return settings_features(settings, torch.zeros(1, len(settings))).shape[1]


def settings_features(settings: Sequence[Setting], values: Tensor) -> Tensor:
    """What networks and regressions see of settings: ``[B, C]`` → ``[B, F]``, every feature in -1 … 1.

    A real setting is scaled, a boolean is ±1, a periodic one becomes cosines and sines. Signs turn angles around, so
    that each boolean is also multiplied with the first cosine and sine of each periodic setting.
    """
    features: list[Tensor] = []
    circles: list[Tensor] = []
    signs: list[Tensor] = []
    for setting, value in zip(settings, values.unbind(-1), strict=True):
        share = (value - setting.low) / (setting.high - setting.low)
        if setting.kind == "periodic":
            angles = [2 * math.pi * share * (k + 1) for k in range(HARMONICS)]
            waves = [wave for angle in angles for wave in (angle.cos(), angle.sin())]
            features += waves
            circles += waves[:2]
        else:
            features.append(2 * share - 1)
            signs += features[-1:] if setting.kind == "boolean" else []
    return torch.stack(features + [sign * wave for sign in signs for wave in circles], -1)
