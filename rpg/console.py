"""What the command line shows: one console, progress bars, and every mistake as one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenization.errors import InputError

console = Console(quiet=os.environ.get("RANK", "0") != "0")
"""Where the command line speaks; of several launched processes the first one does."""


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A progress bar that appears with its first report; yields its callback (done, total, loss=None, note="").

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

    def advance(done: int, total: int, loss: float | None = None, note: str = "") -> None:
        if not tasks:
            bar.start()
            tasks.append(bar.add_task(title, total=total, note=""))
        bar.update(tasks[0], completed=done, total=total, note=note if loss is None else f"loss {loss:.4f}")
        if done >= total:
            bar.stop()
            tasks.clear()

    try:
        yield advance
    finally:
        if tasks:  # one that never began would still print an empty line
            bar.stop()


def run_command(command: Callable[[], object]) -> None:
    """Run a command; whatever the user or the disk got wrong is one line on standard error and exit code 2.

    A fault of the program itself keeps its traceback.
    """
    try:
        code = command()
    except InputError as error:
        code = _refuse(str(error))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        code = _refuse(f"{error.filename}: {reason}" if error.filename else reason)
    except Exception as error:
        if not hasattr(error, "format_message"):  # as typer's own errors have it, in every version
            raise
        code = _refuse(_usage(error))
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(text: str) -> int:
    print("error: " + " ".join(text.split()), file=sys.stderr)
    return 2


def _usage(error: Any) -> str:
    """What is wrong with the words of a command line, and where its help is."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "rpg"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"
