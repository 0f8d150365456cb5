"""The code blocks of the documentation, and a folder in which they run with configurations of a second."""

from __future__ import annotations

import glob
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rpg.console import run_command
from rpg.section import exists, read_mapping

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
SAVED = re.compile(r"# saved as (\S+)\n")
LAUNCHERS = ("accelerate", "torchrun", "srun")


@dataclass(frozen=True)
class Block:
    """A code block of a page: its language, its text, where it begins, and why the test does not run it."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    def commands(self) -> list[str]:
        """The command lines of a shell block, continued lines joined and chains taken apart."""
        joined = self.text.replace("\\\n", " ")
        lines = (re.sub(r"\s+#.*$", "", line).strip() for line in joined.splitlines())
        return [each.strip() for line in lines if line and not line.startswith("#") for each in line.split("&&")]


def blocks_of(page: Path) -> list[Block]:
    """All code blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(page.name, text.count("\n", 0, each.start()) + 1, each["language"], each["text"], each["why"])
        for each in BLOCK.finditer(text)
    ]


def make_lines(command: str) -> Iterator[str]:
    """The `rpg` commands that ``make TARGET NAME="value"`` stands for. Raises KeyError where there is none."""
    words = shlex.split(command)[1:]
    values = dict(word.split("=", 1) for word in words if "=" in word)
    makefile = (ROOT / "Makefile").read_text()
    recipes = dict(re.findall(r"^(\w+):[^\n]*\n((?:\t[^\n]*\n)*)", makefile, re.M))
    for target in (word for word in words if "=" not in word):
        for line in re.findall(r"\$\(BIN\)/(rpg [^\n]*)", recipes[target]):
            yield re.sub(r"\$\((\w+)\)", lambda name: values.get(name[1], ""), line).strip()


class Sandbox:
    """A folder in which blocks run: the repository's configurations, some of them made small.

    Args:
        folder: an empty folder; it is the working directory while blocks run.
        small: changes by configuration, as in the file that they change.
    """

    def __init__(self, folder: Path, small: Mapping[str, dict[str, Any]]) -> None:
        self.folder, self.names = folder, {"__name__": "__docs__"}
        for source in (ROOT / "configs").rglob("*"):
            name = source.relative_to(ROOT / "configs").as_posix()
            target = folder / "configs" / name
            if source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if name not in small:
                target.symlink_to(source)
        for name, changes in small.items():
            source = ROOT / "configs" / name
            whole = read_mapping(source, "a sweep") if name.startswith("sweeps/") else {"extends": str(source)}
            (folder / "configs" / name).write_text(yaml.safe_dump({**whole, **changes}))
        (folder / "scripts").symlink_to(ROOT / "scripts")

    def run(self, block: Block) -> None:
        """Run a block. Raises AssertionError for a command that fails, and whatever a Python block raises."""
        if saved := SAVED.match(block.text):
            (self.folder / saved[1]).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), self.names)
        elif block.language == "sh":
            for command in block.commands():
                self.command(command)
        elif block.language == "yaml":
            from rpg.config import Config

            Config.parse(yaml.safe_load(block.text), block.page)
        else:
            raise AssertionError(f"{block.page}:{block.line}: nothing runs blocks in {block.language or 'no language'}")

    def command(self, command: str) -> None:
        """Run one command line. Raises AssertionError if it fails."""
        program, *words = shlex.split(command)
        if program == "make":
            for line in make_lines(command):
                self.command(line)
        elif program == "rpg":
            code = call(self._globbed(words))
            assert code == 0, f"{command}: exit code {code}"
            if "--write-config" in words:  # small, as those of the repository are
                path = Path(words[words.index("--write-config") + 1])
                tree = yaml.safe_load(path.read_text())
                tree["train"] = {**tree["train"], "steps": 8, "warmup_steps": 0}
                path.write_text(yaml.safe_dump(tree))
        elif program == "python" and words[0].endswith(".py"):
            with argv([words[0], *self._globbed(words[1:])]):
                try:
                    runpy.run_path(words[0], run_name="__main__")
                except SystemExit as exit_:
                    assert not exit_.code, f"{command}: exit code {exit_.code}"
        else:
            raise AssertionError(
                f"{command}: nothing runs {program}; say why with <!-- not run: … --> before the block"
            )

    def _globbed(self, words: list[str]) -> list[str]:
        """Words with globs expanded as a shell does, but for the one behind ``--from``, which pages put in quotes."""
        expanded: list[str] = []
        for place, word in enumerate(words):
            found = sorted(glob.glob(word)) if "*" in word and words[place - 1] != "--from" else []
            expanded += found or [word]
        return expanded


class argv:
    """``sys.argv`` for as long as it is entered."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.before = words, sys.argv

    def __enter__(self) -> None:
        sys.argv = self.words

    def __exit__(self, *_: object) -> None:
        sys.argv = self.before


def call(words: list[str]) -> int:
    """The command line in this process: its exit code."""
    from rpg.cli import app

    with argv(["rpg", *words]):
        try:
            run_command(lambda: app(words, prog_name="rpg", standalone_mode=False))
        except SystemExit as exit_:
            return int(exit_.code or 0)
    return 0


def parse(command: str) -> None:
    """Check a command that is not run: command and options are there, and so are scripts and configurations.

    Raises AssertionError, or the command line's own error.
    """
    import typer

    from rpg.cli import app

    words = shlex.split(command)
    while "=" in words[0]:  # NAME=value before the command
        words = words[1:]
    if words[0] in LAUNCHERS:
        words = ["rpg", *words[words.index("rpg") + 1 :]]
    if words[0] == "rpg":
        group: Any = typer.main.get_command(app)
        assert words[1] in group.commands, command
        group.commands[words[1]].make_context(words[1], list(words[2:]))
    for word in words:
        if re.match(r"(configs|scripts)/.*\.\w+$", word):
            assert exists(ROOT / word), f"{command}: there is no {word}"
