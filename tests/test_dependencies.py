"""What is imported is declared in pyproject.toml, and what is declared there is imported."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # new in Python 3.11

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BY_NAME = {"tensorboard"}  # accelerate imports it where a run logs
TOOLS = {"test", "docs"}  # extras that the package itself does not import
EXTRAS = {name: extra for name, extra in PROJECT["optional-dependencies"].items() if name not in TOOLS}


def names(requirements: Iterable[str]) -> set[str]:
    """The distributions that requirements or pins name, spelt as package indexes compare them."""
    found = (re.match(r"[\w.-]+", line) for line in requirements)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def imported(*folders: str) -> set[str]:
    """The third-party distributions that the Python files of folders import."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = {"rpg", "tokenization", "tests", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    modules = {module for path in files for module in imported_modules(path)} - own - set(sys.stdlib_module_names)
    installed = packages_distributions()  # of what is not installed, distribution and module have one name here
    return names(installed.get(module, [module])[0] for module in modules)


def test_every_import_is_declared():
    usable = names(PROJECT["dependencies"]).union(*map(names, EXTRAS.values()))
    assert imported("rpg", "tokenization", "scripts") - usable == set()
    assert imported("tests") - usable - names(PROJECT["optional-dependencies"]["test"]) == set()


def test_every_dependency_is_imported():
    assert names(PROJECT["dependencies"]) - BY_NAME - imported("rpg", "tokenization") == set()
    for extra in EXTRAS.values():
        assert names(extra) - imported("rpg") == set()


def test_every_dependency_is_pinned():
    pins = names((ROOT / "constraints.txt").read_text().splitlines())
    assert names(PROJECT["dependencies"]) - pins == set()
    assert names(PROJECT["optional-dependencies"]["test"]) - pins == set()


def test_the_kernels_of_mamba_come_with_the_convolution_they_need():
    assert names(EXTRAS["mamba"]) == {"mamba-ssm", "causal-conv1d"}
