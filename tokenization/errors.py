"""The one error a user's mistake raises."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in what the user gave: a file, a tensor, a field of a configuration.

    The caller writes one plain sentence that says what is wrong, where, and what to do about it::

        raise InputError(f"{path} has no tensor {name!r}; save the checkpoint again")

    The command line prints it after ``error:`` and exits with code 2. Internal invariants use ``assert`` instead.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
