"""What the conditions of a zoo's entries mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from tokenization.errors import InputError
from tokenization.zoo.settings import Setting, num_features, settings_features

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

    Attributes:
        kind: as above.
        size: as above, at least 1.
        names: what the components, classes or texts are called; may be empty except for ``text``.
        settings: of a vector whose numbers are declared settings: their kinds and ranges, in the order of ``names``.
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
