"""Another form of a zoo's checkpoints, in which they become tokens."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.zoo.zoo import Zoo

MARK = "rpg.canonical"
"""Metadata of an opened checkpoint in another form: the key of the form."""


class Form(ABC):
    """Opens checkpoints in their other form, and keeps them for the next call."""

    def __init__(self) -> None:
        self._opened: tuple[Zoo | None, dict[int, Checkpoint]] = (None, {})
        self._lock = threading.Lock()

    def checkpoint(self, zoo: Zoo, index: int) -> Checkpoint:
        """An entry of a zoo in this form: what differs from the zoo's cache, made if need be, the rest as it is.

        Raises:
            InputError: the checkpoint is broken, or there is no place to write.
        """
        with self._lock:
            if self._opened[0] is not zoo:
                self._opened = (zoo, {})
            opened = self._opened[1]
            if index not in opened:
                opened[index] = self._open(zoo, index)
            return opened[index]

    @abstractmethod
    def _open(self, zoo: Zoo, index: int) -> Checkpoint:
        """An entry in this form, with `MARK` among its metadata."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Form.__init__(self)
        self.__dict__.update(state)
