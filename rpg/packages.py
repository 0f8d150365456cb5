"""Which versions of what are installed, and the commands that install what is missing; loads none of it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tokenization.errors import InputError

DISTRIBUTION = "rpg-weights"
"""What package indexes call this program."""

FOREIGN = ("rpg", "tokenization")
"""Projects of other people that install modules of the same names as ours."""

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


def install_command(*names: str) -> str:
    """The command that installs packages in the versions that this program asks for: ``pip install 'gradio>=6'``.

    It names them and not an extra of this program, so that it is right however this program was installed.
    """
    known = {canonicalize_name(each.name): each for each in requirements(extras=True)}
    wanted = (known.get(canonicalize_name(name)) for name in names)
    specs = (f"{found.name}{found.specifier}" if found else name for name, found in zip(names, wanted, strict=True))
    return "pip install " + " ".join(shlex.quote(spec) for spec in specs)


def require_package(name: str, what: str, otherwise: str = "") -> None:
    """Raise InputError where a package, which ``what`` needs, is missing; ``otherwise`` is another cure."""
    if importlib.util.find_spec(name) is None:
        raise InputError(f"{what}, which is not installed; run {install_command(name)}{otherwise}")


def unmet() -> list[str]:
    """What is missing, too old or another project's, and by what command it is put right."""
    found = []
    for requirement in requirements():
        there = installed(requirement.name)
        if there is None or not requirement.specifier.contains(there, prereleases=True):
            what = "missing" if there is None else f"{there}, which is too old"
            found.append(f"{requirement.name} is {what}; run {install_command(requirement.name)}")
    for name in FOREIGN:
        if (there := installed(name)) is not None:
            what = f"the package {name} {there} is installed, and its modules overwrite or hide those of {DISTRIBUTION}"
            found.append(f"{what}; run pip uninstall -y {name}{_reinstall_command()}")
    return found


def requirements(extras: bool = False) -> list[Requirement]:
    """What the package needs, with or without its extras; empty where it runs without being installed."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []
    return [Requirement(line) for line in lines if extras or not re.search(r";.*\bextra\b", line)]


def _reinstall_command() -> str:
    """How this program is put back where it came from: a checkout, a wheel or an index; nothing if never installed."""
    try:
        own = distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return ""
    origin = json.loads(own.read_text("direct_url.json") or "{}")
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    place = str(origin.get("url", f"{DISTRIBUTION}=={own.version}")).removeprefix("file://")
    return f" && pip install --force-reinstall --no-deps {editable}{shlex.quote(place)}"


@contextlib.contextmanager
def without_bars(*, warnings: bool = True) -> Iterator[None]:
    """transformers shows no progress bars of its own, and no warnings either where networks are only looked at."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not warnings:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
