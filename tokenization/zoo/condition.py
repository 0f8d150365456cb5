"""What conditions mean: binary, classes, texts, named settings and their values, or a metric on a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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

    Raises InputError if there is no such setting, or a value is not a number or lies outside the range.
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


ConditionKind = Literal["binary", "class", "vector", "text", "examples"]


WITHHELD = 0.5
"""What stands for a bit of a binary condition that is not told: halfway between 0 and 1."""


@dataclass(frozen=True)
class ConditionSpec:
    """What the condition of an entry means.

    ===========  ==========================================================================
    kind         condition of an entry
    ===========  ==========================================================================
    ``binary``   ``size`` numbers, each 0 or 1
    ``vector``   ``size`` real numbers
    ``class``    one number, the index of the class among ``size``
    ``text``     one number, the index of the text among the ``size`` texts in ``names``
    ``examples`` of a generator alone: any number of examples of ``size`` numbers, of the classes in ``names``
    ===========  ==========================================================================

    ``names`` are what the components, classes or texts are called; they may be empty except for ``text``. A vector of
    declared numbers has ``settings``: their kinds and ranges, in the order of ``names``.
    """

    kind: ConditionKind
    size: int
    names: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConditionKind):
            kinds = ", ".join(get_args(ConditionKind))
            raise InputError(f"condition: kind is {self.kind!r}; choose one of {kinds}")
        if not isinstance(self.size, int) or self.size < 1:
            raise InputError(f"condition: size is {self.size!r}; write a whole number from 1 on")
        unnamed = not self.names and self.kind != "text"
        if self.kind == "examples":
            return
        if not unnamed and (len(self.names) != self.size or len(set(self.names)) != self.size):
            raise InputError(f"condition: names has {len(self.names)} of them; write {self.size} different ones")
        if self.settings and (self.kind != "vector" or self.names != tuple(each.name for each in self.settings)):
            raise InputError("condition: settings do not fit; give a vector with a setting for each of its names")

    @classmethod
    def of_settings(cls, settings: Sequence[Setting]) -> ConditionSpec:
        """A vector of declared settings."""
        return cls("vector", len(settings), tuple(each.name for each in settings), tuple(settings))

    @property
    def num_inputs(self) -> int:
        """How many numbers networks see of a condition; of a class how many classes there are."""
        return num_features(self.settings) if self.settings else self.size

    def inputs(self, conditions: Tensor) -> Tensor:
        """What networks see of conditions ``[B, C]``: features of settings, anything else as it is."""
        return settings_features(self.settings, conditions) if self.settings else conditions

    def to_json(self) -> dict[str, Any]:
        """Plain values for `from_json`."""
        content = asdict(self)
        if not self.settings:
            del content["settings"]
        return content

    @classmethod
    def from_json(cls, content: Any, where: str) -> ConditionSpec:
        """Read what `to_json` gives. Raises InputError that names ``where``."""
        known = {"kind", "size", "names", "settings"}
        if not isinstance(content, dict) or not {"kind", "size"} <= content.keys() <= known:
            raise InputError(f"{where}: condition is {content!r}; write kind, size and names")
        names = content.get("names", [])
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{where}: condition: names is {names!r}; write a list of texts")
        settings = content.get("settings", [])
        if not isinstance(settings, list | tuple):
            raise InputError(f"{where}: condition: settings is {settings!r}; write a list")
        return cls(
            content["kind"], content["size"], tuple(names), tuple(Setting.from_json(each, where) for each in settings)
        )

    def require(self, condition: Sequence[float] | None, where: str) -> None:
        """Check the condition of an entry. Raises InputError that names ``where``."""
        if self.kind == "examples":
            raise InputError(f"{where}: condition is of examples, which only generators take; write what they show")
        length = self.size if self.kind in ("binary", "vector") else 1
        if condition is None or len(condition) != length:
            what = "is missing" if condition is None else f"has {len(condition)} numbers"
            raise InputError(f"{where}: condition {what}; a {self.kind} condition has {length}")
        for value in condition:
            if self.kind == "binary" and value not in (0, 1):
                raise InputError(f"{where}: condition has {value}; a binary one is made of 0 and 1")
            if self.kind in ("class", "text") and not (value == int(value) and 0 <= value < self.size):
                raise InputError(f"{where}: condition is {value}; write an index from 0 to {self.size - 1}")


def require_condition(spec: ConditionSpec | None, condition: Sequence[float] | None, where: str) -> None:
    """`ConditionSpec.require`, of a zoo that may have no conditions. Raises InputError that names ``where``."""
    if spec is not None:
        spec.require(condition, where)
    elif condition is not None:
        raise InputError(f"{where} has a condition, but the zoo has none; create the zoo with a condition")


@dataclass(frozen=True)
class MetricScale:
    """How far a metric of the manifest reaches among the checkpoints to learn, mapped to -1 … 1."""

    name: str
    low: float
    high: float
    log: bool

    @classmethod
    def of_values(cls, name: str, values: Sequence[float], log: bool, where: Path) -> MetricScale:
        """Measure the values of a zoo's checkpoints. Raises InputError that names ``where`` if all are alike."""
        low, high = min(values), max(values)
        if low == high:
            raise InputError(f"{where} has the same {name} for all its checkpoints, which asks for nothing")
        if log and low <= 0:
            what = f"{where} has a {name} of {low:g}, which has no logarithm"
            raise InputError(f"{what}; set model.condition.scale to linear")
        return cls(name, low, high, log)

    @property
    def condition(self) -> ConditionSpec:
        """What a generator's conditions mean: one number, the metric as it is measured."""
        return ConditionSpec("vector", 1, (self.name,))

    def scaled(self, values: Tensor) -> Tensor:
        """Values as they are measured, of any shape, on the scale; differentiable."""
        low, high = (math.log(end) if self.log else end for end in (self.low, self.high))
        if self.log:
            values = values.clamp(min=1e-12).log()
        return 2 * (values - low) / (high - low) - 1

    def asked(self, values: Tensor) -> Tensor:
        """`scaled`, of what a user asks for. Raises InputError if a value has no logarithm on a logarithmic scale."""
        if self.log and float(values.min()) <= 0:
            raise InputError(f"{self.name} {float(values.min()):g} has no logarithm; ask for more than 0")
        return self.scaled(values)

    def warning(self, values: Tensor) -> str | None:
        """What to warn of, if values that are asked for lie outside the zoo's."""
        slack = 1e-4 * (self.high - self.low)
        outside = [each for each in values.flatten().tolist() if not self.low - slack <= each <= self.high + slack]
        if not outside:
            return None
        return (
            f"{self.name} {outside[0]:g} lies outside what was learned, {self.low:.3g} to {self.high:.3g}: "
            "what comes is a guess"
        )
