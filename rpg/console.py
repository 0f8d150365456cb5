"""What the command line shows: one console, progress bars, and every mistake as one line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from tokenization.errors import InputError

_IS_FIRST = os.environ.get("RANK", "0") == "0"

console = Console(quiet=not _IS_FIRST)
"""Where the command line speaks; of several launched processes the first one does."""


def say(*lines: object) -> None:
    """Print lines as they are: brackets in a path are no markup, and nothing is coloured or wrapped."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, of a notebook without widgets

INTERRUPTED = 130
"""The exit code of a command that was stopped, as shells have it."""


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


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.2g}/s" if speed < 100 else f"{speed:,.0f}/s", no_wrap=True)


class _NotebookBar:
    """A `Progress` in a notebook: one output that is replaced, twice a second at most. rich's own needs widgets."""

    def __init__(self) -> None:
        self.title, self.shown = "", 0.0
        self.output: Any = None

    def start(self) -> None:
        """It appears with its first report."""

    def add_task(self, title: str, **_: Any) -> int:
        """There is one."""
        self.title = title
        return 0

    def update(self, _: int, completed: float, total: float, note: str) -> None:
        """Show how far it is."""
        now = time.monotonic()
        if self.output is not None and completed < total and now - self.shown < 0.5:
            return
        from IPython.display import display

        words = f"{self.title} {completed:,g}/{total:,g} {note}".rstrip()
        bar = f'<progress value="{completed}" max="{total}"></progress> {escape(words)}'
        page = {"text/plain": words, "text/html": bar}
        self.shown = now
        if self.output is None:
            self.output = display(page, raw=True, display_id=True)
        else:
            self.output.update(page, raw=True)

    def stop(self) -> None:
        """It stays as it is."""

    def remove_task(self, _: int) -> None:
        """There is one, and it is replaced."""


_live = False
"""Whether a bar is on the screen: of two the second keeps silent."""


@contextlib.contextmanager
def progress_bar(title: str, after: float = 0.0) -> Iterator[Any]:
    """A progress bar that appears with its first report; yields its callback (done, total, loss=None, note="").

    A report after the last one begins a line of its own: several runs, one after the other. What takes less than
    ``after`` seconds shows no bar.
    """
    global _live
    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    note_column = TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True))
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), _Rate(), left, note_column)
    bar: Any = _NotebookBar() if console.is_jupyter else Progress(*columns, console=console, redirect_stdout=False)
    tasks: list[Any] = []
    began, finished = time.monotonic(), False

    def advance(done: int, total: int, loss: float | None = None, note: str = "") -> None:
        global _live
        nonlocal finished
        late = time.monotonic() - began >= after
        if not tasks and (not late or _live or (finished and done >= total)):
            return
        if not tasks:
            bar.start()
            _live = True
            tasks.append(bar.add_task(title, total=total, note=""))
        told = ", ".join(filter(None, ("" if loss is None else f"loss {loss:.3g}", note)))
        bar.update(tasks[0], completed=done, total=total, note=told)
        finished = done >= total
        if finished:
            stop()

    def stop() -> None:
        global _live
        bar.stop()
        _live = False
        bar.remove_task(tasks.pop())

    try:
        yield advance
    finally:
        if tasks:  # one that never began would still print an empty line
            stop()


@contextlib.contextmanager
def bar_in_notebook(title: str, progress: Any) -> Iterator[Any]:
    """The callback that was given, or that of a bar in a notebook; else None."""
    if progress is not None or "ipykernel" not in sys.modules:
        yield progress
        return
    with progress_bar(title) as bar:
        yield bar


@dataclass(frozen=True)
class Voice:
    """How a command speaks.

    Attributes:
        quiet: say nothing but what went wrong.
        as_json: one object on standard output, and nothing else.
    """

    quiet: bool = False
    as_json: bool = False


def voice_of(words: Sequence[str]) -> tuple[list[str], Voice]:
    """The command line without ``--quiet`` and ``--json``, which every command takes anywhere, and what they say."""
    own = list(words[: words.index("--")]) if "--" in words else list(words)
    rest = [word for word in own if word not in ("--quiet", "--json")] + list(words[len(own) :])
    return rest, Voice("--quiet" in own, "--json" in own) if "--help" not in own else Voice()


def run_command(command: Callable[[], object], voice: Voice | None = None, interrupted: str = "") -> None:
    """Run a command and leave with its exit code.

    0 where all went well; 2 where the user or the disk got something wrong, which is one line on standard error (an
    object with ``error`` and ``exit_code`` under ``--json``); 130 where it was interrupted. A fault of the program
    itself keeps its traceback and leaves with 1.

    Args:
        command: returns its exit code, or what it tells a machine, where ``exit_code`` may be among it.
        interrupted: what is left of the work, where an interruption ends it.
    """
    facts: object = None
    voice = voice or Voice()
    try:
        with _speaking(voice) as said:
            facts = command()
        if facts == INTERRUPTED:  # as newer versions of typer say it
            raise KeyboardInterrupt
        code = facts if isinstance(facts, int) else facts.pop("exit_code", 0) if isinstance(facts, dict) else 0
    except InputError as error:
        code = _refuse(str(error), voice)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        code = _refuse(f"{error.filename}: {reason}" if error.filename else reason, voice)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":  # as older ones do
            code = _refuse(f"interrupted; {interrupted}".rstrip("; "), voice, INTERRUPTED)
        elif hasattr(error, "format_message"):  # typer's own errors
            code = _refuse(_usage(error), voice)
        else:
            raise
    else:
        if voice.as_json and _IS_FIRST:
            told = facts if isinstance(facts, dict) else {"text": said.get()}
            print(json.dumps(told, indent=1, default=str))
    sys.exit(code)


@contextlib.contextmanager
def _speaking(voice: Voice) -> Iterator[Any]:
    """What the console said, where a machine listens; no library and no child reaches standard output then."""
    if not voice.as_json and not voice.quiet:
        yield None
        return
    before, console.quiet = console.quiet, console.quiet or voice.quiet
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        with console.capture() as said, open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
            yield said
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
        console.quiet = before


def _refuse(text: str, voice: Voice, code: int = 2) -> int:
    text = " ".join(text.split())
    print(json.dumps({"error": text, "exit_code": code}) if voice.as_json else f"error: {text}", file=sys.stderr)
    return code


def _usage(error: Any) -> str:
    """What is wrong with the words of a command line, and where its help is."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "rpg"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"
