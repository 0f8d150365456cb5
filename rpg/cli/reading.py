"""What several commands do first: read a configuration, and see whether there is room."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rpg.cli.parameters import default_config
from rpg.console import console, progress_bar
from tokenization.errors import InputError

NUM_WATCHED = 4
"""Networks that are scored now and then while a generator is trained."""


def load(path: Path, overrides: list[str] | None) -> Any:
    """Read a configuration file with its overrides; where there is no such file, ``configs/…`` is the package's own."""
    from rpg.config import Config
    from rpg.section import exists

    if path.parts[:1] == ("configs",) and not exists(path):
        own = default_config(str(Path(*path.parts[1:])))
        path = own if exists(own) else path
    return Config.load(path, overrides)


@contextlib.contextmanager
def training_bar(title: str) -> Iterator[dict[str, Callable[..., None]]]:
    """A progress bar of training with the accuracy on validation data now and then: ``train`` and ``watch``."""
    validation: Any = None
    told = ""
    with progress_bar(title) as bar:

        def watch(generator: Any) -> None:
            nonlocal validation, told
            if validation is None:
                from rpg.experiments.validation import Validation
                from tokenization.zoo.zoo import Zoo

                validation = Validation(generator.config, Zoo.open(generator.config.zoo), NUM_WATCHED)
            told = validation.told(generator)

        def advance(done: int, total: int, loss: float) -> None:
            bar(done, total, loss, told)

        yield {"train": advance, "watch": watch}


def guard(find: Callable[[], Any], ignore: bool) -> None:
    """Stop, before anything begins, where more memory is needed than is free.

    Args:
        find: what is needed, as `rpg.planning.plan` finds it.
        ignore: whether the user said to begin all the same; then nothing is found out.
    """
    if ignore:
        return
    from rpg.planning.plan import require_memory

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever is to be warned of, the command warns of
            need = find()
    except InputError:  # the command itself says it, or does without what is missing
        return
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        console.print(f"the memory needed could not be estimated ({reason}); starting without the check", markup=False)
        return
    if need is not None:
        require_memory(need)
