"""Users' functions and classes, loaded by module or file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenization.errors import InputError


def load_callable(reference: str, option: str) -> Callable[..., Any]:
    """A function or class by its place: ``package.module:name`` or ``folder/file.py:name``.

    Modules are looked for in the working directory first.

    Raises:
        InputError: there is no such module or function, or importing it failed.
    """
    module_name, separator, name = reference.rpartition(":")
    if not separator or not module_name or not name:
        raise InputError(f"{option} {reference!r} names no function; write package.module:function or file.py:function")
    of_file = module_name.endswith(".py")
    module = _import_file(Path(module_name), option) if of_file else _import_module(module_name, option)
    function: Any = module
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise InputError(f"{option} {reference}: {module_name} has no function {name!r}")
    return function


def _import_module(name: str, option: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise InputError(f"{option}: {name} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(os.getcwd())


def _import_file(path: Path, option: str) -> Any:
    specification = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if specification is None or specification.loader is None:
        raise InputError(f"{option}: there is no file {path}")
    module = importlib.util.module_from_spec(specification)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{option}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module
