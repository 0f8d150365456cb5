"""What a generator learns from, as far as its size depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from rpg.config import Config
from rpg.models import PDiffConfig
from rpg.training.data import condition_size, state_ids
from tokenization.layouts import Layout, plan_layout
from tokenization.zoo.zoo import Zoo


@dataclass(frozen=True)
class Subject:
    """What a generator learns from, as far as its size depends on it.

    Attributes:
        layout: how the checkpoints are cut into tokens.
        num_checkpoints: how many there are, of all splits.
        num_states: permutation states.
        condition_size: values of a condition, or classes; 0 without one.
    """

    layout: Layout
    num_checkpoints: int = 1
    num_states: int = 1
    condition_size: int = 0

    @classmethod
    def of(cls, zoo: Zoo, config: Config) -> Subject:
        """The zoo as ``config`` cuts it; no values are read. Raises InputError as `plan_layout` does."""
        layout = plan_layout(zoo.checkpoint(0), config.tokens, len(zoo))
        states = state_ids(zoo, config)
        num_states = int(states.max()) + 1 if len(states) else 1
        return cls(layout, len(zoo), num_states, condition_size(zoo, config))


def rows_per_step(config: Config, subject: Subject) -> int:
    """Token rows in one training step, over all processes: B times N. p-diff sees whole checkpoints."""
    num_tokens = subject.layout.num_tokens
    if isinstance(config.model, PDiffConfig):
        return config.model.autoencoder.batch_size * num_tokens
    return config.train.batch_size * min(config.train.tokens or num_tokens, num_tokens)
