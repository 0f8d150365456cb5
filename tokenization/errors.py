"""The one error a user's mistake raises."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in what the user gave: a file, a tensor, a field of a configuration.

    Its text is a single line, ``<where>: found <found>, expected <expected>; <cure>``; the command line
    prints it after ``error:`` and exits with code 2. Internal invariants use ``assert`` instead.

    Args:
        where: the file, tensor or field at fault, e.g. ``zoo/a.safetensors: tensor 'fc.weight'``.
        found: what is there.
        expected: what should be there; left out when empty.
        cure: what to do about it; left out when empty.
    """

    def __init__(self, where: str, found: str = "", expected: str = "", cure: str = "") -> None:
        text = f"{where}: found {found}" if found else where
        if expected:
            text += f", expected {expected}"
        if cure:
            text += f"; {cure}"
        super().__init__(" ".join(text.split()))
