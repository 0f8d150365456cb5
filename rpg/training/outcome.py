"""The result of a training run: a generator and what it needs to know of the zoo."""

from __future__ import annotations

from typing import Any

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.models import Network
from rpg.training.data import metric_scale, training_entries
from rpg.training.examples import Descriptions, example_conditions
from tokenization.layouts import Layout
from tokenization.zoo.zoo import Zoo


def trained_generator(config: Config, layout: Layout, network: Network, zoo: Zoo, facts: dict[str, Any]) -> Generator:
    """The generator of trained networks; ``facts`` of the training are for its model card."""
    scale = metric_scale(zoo, training_entries(zoo, config.train.splits), config.model.condition)
    examples = example_conditions(zoo, config.model.condition)
    condition = examples.spec if examples is not None else zoo.condition if scale is None else scale.condition
    texts = examples.table if isinstance(examples, Descriptions) else None
    return Generator(config, layout, network, condition, facts, texts=texts, metric=scale)
