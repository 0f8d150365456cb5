"""What the command line shows: one console, progress bars, and every mistake as one line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tokenization.errors import InputError

console = Console(quiet=os.environ.get("RANK", "0") != "0")
"""Where the command line speaks; of several launched processes the first one does."""


@dataclass(frozen=True)
class FiguresTable:
    """A table that fits the console: no cell is cut off, no head has more than two lines.

    What is too wide for one table goes on in another below it, under the same names.

    Attributes:
        heads: of the names' column, and of every column of figures.
        rows: names and figures.
        title, caption: above and below.
        bold: names of the rows that stand out.
        section: draw a line above the last row, of totals.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    bold: Collection[str] = ("generated",)
    section: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.heads)
        cells = [max(map(cell_len, column), default=0) for column in columns]
        heads = [_two_lines(head, width) for head, width in zip(self.heads, cells, strict=True)]
        widths = [max(width, *map(cell_len, head.split("\n"))) for head, width in zip(heads, cells, strict=True)]
        first = min(widths[0], max(options.max_width - max(widths[1:], default=0) - 2, 12))
        groups: list[list[int]] = [[]]
        for index in range(1, len(heads)):
            if groups[-1] and first + sum(widths[i] + 2 for i in (*groups[-1], index)) > options.max_width:
                groups.append([])
            groups[-1].append(index)
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            table = Table(
                title=self.title if number == 0 else None, caption=self.caption if last else None, box=box.SIMPLE_HEAD,
                show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left",
            )  # fmt: skip
            table.add_column(heads[0], overflow="fold", max_width=first, vertical="bottom")
            for index in group:
                table.add_column(heads[index], justify="right", overflow="fold", min_width=widths[index])
            for place, row in enumerate(self.rows):
                if self.section and place == len(self.rows) - 1:
                    table.add_section()
                table.add_row(row[0], *(row[index] for index in group), style="bold" if row[0] in self.bold else "")
            yield table


def _two_lines(head: str, width: int) -> str:
    """A head of one line if it is no wider than ``width``, else in the two lines that are narrowest."""
    words = head.split(" ")
    if cell_len(head) <= width or len(words) < 2:
        return head
    lines = [(" ".join(words[:place]), " ".join(words[place:])) for place in range(1, len(words))]
    return "\n".join(min(lines, key=lambda pair: max(map(cell_len, pair))))


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
