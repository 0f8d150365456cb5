"""Generate neural-network weights: learn from a zoo of trained checkpoints, write new ones that work."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

try:
    from tokenization.errors import InputError
except ModuleNotFoundError as error:
    import tokenization

    place = f"{tokenization.__file__} is another package's tokenization and hides ours"
    raise ImportError(f"{place}; run pip uninstall tokenization, or remove it from the path, and reinstall") from error

if TYPE_CHECKING:
    from rpg.config import Config
    from rpg.experiments.driver import evaluate
    from rpg.experiments.single import collect
    from rpg.generation.classifier import GeneratedClassifier
    from rpg.generation.generator import Generator
    from rpg.planning.inspect import inspect
    from rpg.planning.proposal import propose
    from rpg.tasks import build_task
    from rpg.training.loop import train
    from tokenization.zoo.importing import collect_from
    from tokenization.zoo.zoo import Zoo

__all__ = [
    "Config", "GeneratedClassifier", "Generator", "InputError", "Zoo", "build_task", "collect", "collect_from",
    "evaluate", "inspect", "propose", "train",
]  # fmt: skip
__version__ = "0.1.0"

_HOMES = {
    "Config": ("rpg.config", "Config"),
    "GeneratedClassifier": ("rpg.generation.classifier", "GeneratedClassifier"),
    "Generator": ("rpg.generation.generator", "Generator"),
    "Zoo": ("tokenization.zoo.zoo", "Zoo"),
    "build_task": ("rpg.tasks", "build_task"),
    "collect": ("rpg.experiments.single", "collect"),
    "collect_from": ("tokenization.zoo.importing", "collect_from"),
    "inspect": ("rpg.planning.inspect", "inspect"),
    "propose": ("rpg.planning.proposal", "propose"),
    "evaluate": ("rpg.experiments.driver", "evaluate"),
    "train": ("rpg.training.loop", "train"),
}


def __getattr__(name: str) -> object:
    """Import the heavy parts when they are first asked for, so that ``rpg --help`` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rpg' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """What completion offers."""
    return sorted({*globals(), *__all__})
