"""What the conditions of a zoo's entries mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokenization.errors import InputError

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
    """

    kind: ConditionKind
    size: int
    names: tuple[str, ...] = ()

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

    @classmethod
    def from_json(cls, content: Any, where: str) -> ConditionSpec:
        """Read what ``dataclasses.asdict`` gives. Raises InputError that names ``where``."""
        if not isinstance(content, dict) or not {"kind", "size"} <= content.keys() <= {"kind", "size", "names"}:
            raise InputError(f"{where}: condition is {content!r}; write kind, size and names")
        names = content.get("names", [])
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{where}: condition: names is {names!r}; write a list of texts")
        return cls(content["kind"], content["size"], tuple(names))

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
