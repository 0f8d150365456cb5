"""Weights to tokens and back.

A `Checkpoint` is one trained network on disk, a `Zoo` a folder of them, alike in structure. `TokenLayout.fit` decides
how a zoo's checkpoints are cut: ``layout/placement.py`` says where each value goes, ``layout/normalization.py`` what
becomes of it. A token is

- cut: ``TokenLayout.encode`` makes tokens ``[L, D]`` of a checkpoint, ``decode`` a state dict of tokens;
- read: `TokenReader` gives a training loop the rows ``[B, N, D]`` that it asks for, without reading the rest;
- written: `CheckpointWriter` streams generated rows into a safetensors file that any loader takes.

Whatever is wrong with what a user gives raises `InputError`, one sentence that says what, where and the cure.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tokenization.errors import InputError

if TYPE_CHECKING:
    from tokenization.checkpoint.checkpoint import Checkpoint
    from tokenization.layout.layout import TokenLayout
    from tokenization.layout.rows import CheckpointWriter, TokenReader
    from tokenization.zoo.zoo import Zoo

__all__ = ["Checkpoint", "CheckpointWriter", "InputError", "TokenLayout", "TokenReader", "Zoo"]

_MODULES = {
    "Checkpoint": "tokenization.checkpoint.checkpoint",
    "CheckpointWriter": "tokenization.layout.rows",
    "TokenLayout": "tokenization.layout.layout",
    "TokenReader": "tokenization.layout.rows",
    "Zoo": "tokenization.zoo.zoo",
}


def __getattr__(name: str) -> object:
    """Import what needs torch when it is first asked for, so that ``rpg --help`` is quick."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'tokenization' has no attribute {name!r}")
