"""The limits of the house: no import cycle, short files and functions, few files at the top, imports at the top."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("rpg", "tokenization", "scripts") for path in (ROOT / folder).rglob("*.py"))
STILL_INSIDE = {f"rpg/training/{name}.py": {"torch"} for name in ("distributed", "optim")}
STILL_INSIDE["rpg/planning/measuring.py"] = {"torch"}  # its counter of FLOPs loads triton
"""torch.distributed.fsdp and torch.distributed.tensor load sympy and more, which a single process need not wait for."""

OPTIONAL = {
    "pandas",
    "bitsandbytes",
    "causal_conv1d",
    "deepspeed",
    "mamba_ssm",
    "pycocotools",
    "skimage",
    "torchmetrics",
    "wordllama",
}
OPTIONAL |= {"IPython", "trimesh", "wandb"}
SLOW = {
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "scipy",
    "sklearn",
    "timm",
    "tokenizers",
    "torchvision",
}
SLOW |= {"transformers"}
LAZY = {
    "rpg/__init__.py",
    *(f"rpg/cli/{name}.py" for name in ("__init__", "experiments", "making", "sharing")),
}
"""These load everything of our own when it is first asked for, so that ``rpg --help`` is quick."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_by(function: ast.AST) -> Iterator[str]:
    """The libraries that a function imports."""
    for node in ast.walk(function):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_no_module_imports_itself_by_way_of_others() -> None:
    """File by file, and with the imports under TYPE_CHECKING."""
    graph = grimp.build_graph("rpg", "tokenization", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # a CycleError names the cycle


@pytest.mark.parametrize(("folder", "most"), [("rpg", 10), ("tokenization", 4)])
def test_few_files_lie_flat(folder: str, most: int) -> None:
    flat = sorted(path.name for path in (ROOT / folder).glob("*.py"))
    assert len(flat) <= most, flat


def test_no_file_is_longer_than_400_lines() -> None:
    long = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long = {
        f"{name_of(path)}: {function.name}": lines
        for path in FILES
        for function in functions(parsed(path))
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > 60
    }
    assert long == {}


def test_imports_inside_functions_are_of_optional_or_slow_libraries() -> None:
    found: dict[str, set[str]] = {}
    for path in FILES:
        if name_of(path) in LAZY or name_of(path).startswith("scripts/"):
            continue
        for function in functions(parsed(path)):
            found.setdefault(name_of(path), set()).update(imported_by(function))
    unexpected = {name: names - OPTIONAL - SLOW - STILL_INSIDE.get(name, set()) for name, names in found.items()}
    assert {name: names for name, names in unexpected.items() if names} == {}
