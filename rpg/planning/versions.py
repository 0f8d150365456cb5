"""Which versions of what are installed; loads none of it."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

EXTRAS = ("deepspeed", "bitsandbytes", "mamba-ssm", "causal-conv1d", "triton", "trimesh", "scikit-image")
"""What is used where it is there."""


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions by name of Python and all that the package needs or can use; None of what is missing."""
    needed = [requirement.name for requirement in requirements()]
    found = {name: installed(name) for name in [*needed, *EXTRAS]}
    return {"python": platform.python_version(), **found}


def unmet() -> list[str]:
    """What is missing, or older than this program asks for, and by what command it is put right."""
    found = []
    for requirement in requirements():
        there = installed(requirement.name)
        if there is None or not requirement.specifier.contains(there, prereleases=True):
            what = "missing" if there is None else f"{there}, which is too old"
            found.append(f"{requirement.name} is {what}; run pip install '{requirement}'")
    return found


def requirements() -> list[Requirement]:
    """What the package needs, extras not counted; empty where it runs without being installed."""
    try:
        lines = requires("rpg") or []
    except PackageNotFoundError:
        return []
    return [Requirement(line) for line in lines if not re.search(r";.*\bextra\b", line)]
