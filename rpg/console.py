"""What the command line shows while it works: one console, and progress bars."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(quiet=os.environ.get("RANK", "0") != "0")
"""Where the command line speaks; of several launched processes the first one does."""


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A progress bar that appears with its first report; yields its callback (done, total, loss=None).

    A report after the last one begins a line of its own: several runs, one after the other.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        redirect_stdout=False,
    )
    tasks: list[Any] = []

    def advance(done: int, total: int, loss: float | None = None) -> None:
        if not tasks:
            bar.start()
            tasks.append(bar.add_task(title, total=total, note=""))
        bar.update(tasks[0], completed=done, total=total, note="" if loss is None else f"loss {loss:.4f}")
        if done >= total:
            bar.stop()
            tasks.clear()

    try:
        yield advance
    finally:
        if tasks:  # one that never began would still print an empty line
            bar.stop()
