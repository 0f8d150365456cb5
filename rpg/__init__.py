"""Generate neural-network weights: learn from a zoo of trained checkpoints, write new ones that work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenization.errors import InputError

if TYPE_CHECKING:
    from rpg.config import Config
    from rpg.generation.generator import Generator

__all__ = ["Config", "Generator", "InputError"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the heavy parts when they are first asked for, so that ``rpg --help`` is quick."""
    if name == "Generator":
        from rpg.generation.generator import Generator

        return Generator
    if name == "Config":
        from rpg.config import Config

        return Config
    raise AttributeError(f"module 'rpg' has no attribute {name!r}")
