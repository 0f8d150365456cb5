"""What the scripts share: a command line whose mistakes are one line, and figures written as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from rpg.console import run_command
from tokenization.errors import InputError

__all__ = ["Parser", "run_command", "write_figures"]


class Parser(argparse.ArgumentParser):
    """A parser that shows a script's docstring as its help and raises InputError for wrong arguments.

    Args:
        description: the docstring.
        figures: whether the script takes ``--json FILE``, for `write_figures`.
    """

    def __init__(self, description: str | None, *, figures: bool = False) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        if figures:
            self.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")

    def error(self, message: str) -> NoReturn:
        """Raise InputError with what argparse says of the arguments."""
        raise InputError(f"{message}; see `{self.prog} --help`")


def write_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON where a file is named."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
