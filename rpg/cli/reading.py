"""What several commands read."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(path: Path, overrides: list[str] | None) -> Any:
    """Read a configuration file with its overrides."""
    from rpg.config import Config

    return Config.load(path, overrides)
