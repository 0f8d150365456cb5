"""Write the README's table of files from the first line of each file; `--check` compares only."""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "| file | what it holds |\n| --- | --- |\n", "\n<!-- end of files -->"


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, or of the comment that begins a configuration."""
    if path.suffix == ".py":
        text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    else:
        lines = path.read_text().splitlines()
        first = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        text = " ".join(line.removeprefix("#").strip() for line in lines[:first])
    text = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return text.split(". ")[0].rstrip(".")


def table() -> str:
    """One line a file, in the order of the tree; files of one series, `NAME_VARIANT` all, share a line."""
    files = [
        path
        for folder, pattern in (("tokenization", "*.py"), ("rpg", "*.py"), ("scripts", "*.*"), ("configs", "*.yaml"))
        for path in sorted((ROOT / folder).rglob(pattern))
        if "__pycache__" not in path.parts and (path.suffix != ".py" or path.read_text().strip())
    ]
    rows = []
    for key, group in itertools.groupby(files, key=series):
        paths = list(group)
        name = paths[0].relative_to(ROOT).as_posix()
        text = summary(paths[0])
        if len(paths) > 1:
            variants = ",".join(path.stem.rpartition("_")[2] for path in paths)
            name, text = f"{key[0]}_{{{variants}}}.yaml", key[1]
        rows.append(f"| `{name}` | {text} |")
    return "\n".join(rows)


def series(path: Path) -> tuple[str, str]:
    """Configurations `NAME_VARIANT.yaml` that say the same up to the last comma are one series."""
    name, text = path.relative_to(ROOT).as_posix(), summary(path)
    stem, common = path.stem.rpartition("_")[0], text.rpartition(", ")[0]
    if path.suffix != ".yaml" or not stem or not common:
        return name, text
    return f"{path.parent.relative_to(ROOT).as_posix()}/{stem}", common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the table is out of date")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    after = rest[rest.index(END) :]
    wanted = before + START + table() + "\n" + after
    if options.check:
        sys.exit(0 if wanted == text else "README.md: the table of files is out of date; run scripts/list_files.py")
    readme.write_text(wanted)


if __name__ == "__main__":
    main()
