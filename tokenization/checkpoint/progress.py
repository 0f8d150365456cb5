"""How far long work is: whoever shows it listens, and what computes needs no callback through every call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from typing import Any, TypeVar

T = TypeVar("T")

Listener = Callable[[str, float], AbstractContextManager[Callable[[int, int], Any]]]
"""Given what is done, and after how many seconds that is worth showing, a context whose value is called with (done, in
all)."""

_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Show the progress of what computes in this process by ``listener``; None for nobody."""
    global _listener
    _listener = listener


def steps(title: str, items: Iterable[T], total: int | None = None, after: float = 1.0) -> Iterator[T]:
    """The items; each counts as done when the next one is asked for.

    Args:
        total: how many there are, where ``items`` has no length.
        after: seconds from when on it is worth showing; 0 where a single one may take long.
    """
    num = total if total is not None else len(items) if isinstance(items, Sized) else 0
    with _listener(title, after) if _listener is not None else contextlib.nullcontext(lambda *_: None) as tell:
        tell(0, max(num, 1))
        for done, item in enumerate(items, start=1):
            yield item
            tell(done, max(num, done))
