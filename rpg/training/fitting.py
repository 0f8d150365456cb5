"""What of a generator is measured on the training checkpoints before its first step."""

from __future__ import annotations

from rpg.config import Config
from rpg.models.centre import TaskTable
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.training.data import all_tokens, task_numbers, training_conditions, training_entries
from rpg.training.starts import sample_differences
from tokenization.layouts import Layout
from tokenization.zoo.zoo import Zoo


def fit_closed_form(network: RecurrentDiffusion, config: Config, layout: Layout, zoo: Zoo) -> None:
    """Measure, on the training checkpoints, what of tokens is known without training, if the model has such a part."""
    indices = training_entries(zoo, config.train.splits)
    if isinstance(network.state, TaskTable):
        network.state.measure(task_numbers(zoo, indices, network.state.embedding_dim))
    if config.model.start is not None:
        network.fit_start(sample_differences(zoo, layout, indices, config.model.start, config.seed))
    elif network.centre is not None:
        conditions = training_conditions(zoo, indices, config.model.condition)
        network.fit_centre(all_tokens(zoo, layout, indices), conditions, layout.token_weight)
