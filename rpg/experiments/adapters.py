"""Adapters of any conditions: which comparison suits them, and what comes before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rpg.config import Config
from rpg.experiments.single import collect
from rpg.tasks.language.config import LanguageConfig
from rpg.training.loop import train_to_the_end
from tokenization.errors import InputError
from tokenization.lora.adapter import CONFIG_NAME


def is_comparison_of_tasks(config: Config) -> bool:
    """Whether there are unseen tasks of binary conditions, which `rpg.experiments.held_out_tasks` compares on.

    Raises:
        InputError: there are neither adapters nor a task that trains any, or its files are not right.
    """
    if config.task is None:
        if not (Path(config.zoo) / CONFIG_NAME).is_file():
            raise InputError(
                f"{config.zoo} holds no adapters, and the configuration has no task that trains any; adopt yours with "
                "`rpg collect --from FOLDER --zoo ZOO`, or name a task"
            )
        return False
    if not isinstance(config.task, LanguageConfig):
        raise InputError(f"task.name is {config.task.name}, which trains no adapters; see configs/lora/tiny.yaml")
    all_seen = config.task.unseen == 0 and config.task.conditions is None
    return config.model.condition.kind == "binary" and not all_seen


def prepare_adapters(config: Config, progress: Mapping[str, Callable[..., None]]) -> None:
    """Train the adapters that the task lacks, if there is a task; then the generator, in place of one that is there.

    Args:
        config: the experiment; without a task its zoo is one that `rpg collect --from` made.
        progress: callbacks named ``collect`` (done, total) and ``train`` (done, total, loss); ``watch``, as
            `rpg.training.loop.train` takes it.

    Raises:
        InputError: there is neither a task nor a zoo, or one of them does not fit.
    """
    if config.task is not None:
        collect(config, progress=progress.get("collect"))
    train_to_the_end(config, overwrite=True, progress=progress.get("train"), watch=progress.get("watch"))
