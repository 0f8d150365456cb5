"""What is imported is declared in pyproject.toml, and what is declared there is imported."""

from __future__ import annotations

import ast
import functools
import pydoc
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions, version
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


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imported_modules(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require_package":
            yield ast.literal_eval(node.args[0])


_installed = functools.cache(packages_distributions)


@functools.cache
def imported(*folders: str) -> set[str]:
    """The third-party distributions that the Python files of folders import."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    own = {"rpg", "tokenization", "tests", "scripts", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    modules = {module for path in files for module in imported_modules(path)} - own - set(sys.stdlib_module_names)
    installed = _installed()  # of what is not installed, distribution and module have one name here
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


PRIVATE = {
    "accelerate": ("accelerate.state.PartialState._shared_state", "accelerate.state.AcceleratorState._reset_state"),
    "torch": (
        "torch._subclasses.fake_tensor.FakeTensorMode", "torch.utils._python_dispatch.TorchDispatchMode",
        "torch.utils._pytree.tree_leaves", "torch.nn.modules.batchnorm._BatchNorm",
        "torch.nn.modules.dropout._DropoutNd", "torch._utils._rebuild_tensor_v2",
    ),
    "deepspeed": (
        "deepspeed.ops.__compatible_ops__", "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer."
        "_lazy_init_hp_params_optimizer_state",
    ),
}  # fmt: skip
"""What is used although its library keeps it to itself, as nothing public does the same."""

SET = {"_hp_optimizer_states_linked": "deepspeed"}
"""Private attributes of others that are set; a test of training in several processes notices if they are gone."""


def private_names(path: Path, own: set[str]) -> Iterator[str]:
    """Names beginning with one underscore that a file takes from other libraries."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] not in own:
            yield from (each for each in (*node.module.split("."), *(a.name for a in node.names)) if each[0] == "_")
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            yield node.attr


def test_private_parts_of_libraries_are_listed_and_there():
    files = [path for folder in ("rpg", "tokenization") for path in (ROOT / folder).rglob("*.py")]
    text = "\n".join(path.read_text() for path in files)
    made = set(
        re.findall(
            r"(?:def|class) (_\w+)|^ *(?:self|cls|\w+)\.(_\w+)(?:: [^=\n]+)? = |[, ]self\.(_\w+)[, ]|^ +(_\w+)[:,]",
            text,
            re.M,
        )
    )
    own = {name for each in made for name in each} - SET.keys()
    taken = {name for path in files for name in private_names(path, {"rpg", "tokenization", "__future__"})} - own
    listed = {part for names in PRIVATE.values() for name in names for part in name.split(".") if part[0] == "_"}
    assert taken - listed - SET.keys() == set()
    for library, names_of in PRIVATE.items():
        if library == "deepspeed":
            pytest.importorskip("deepspeed.ops")
        for name in names_of:
            missing = f"{library} {version(library)} has no {name}, which its private parts had; find another way"
            assert pydoc.locate(name) is not None, missing
