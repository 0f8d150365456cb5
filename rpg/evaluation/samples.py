"""Figures of a network that draws images: those of `rpg.evaluation.field_measures`, against held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from rpg.evaluation.field_judges import letter_features
from rpg.evaluation.field_measures import measure_samples, shown_by
from rpg.evaluation.field_plots import beside, grid
from rpg.evaluation.two_sample import evenly
from rpg.tasks.base import SampleTask
from tokenization.errors import InputError

ROWS, COLUMNS, GAP, SCALE = 6, 8, 4, 4
"""Of a picture of samples: images of a network, pixels between two networks, and pixels a pixel is enlarged to."""


def sample_figures(task: SampleTask, network: Mapping[str, Tensor], split: str) -> dict[str, float]:
    """Figures by name: ``one_nna`` first, 0.5 where samples cannot be told from as many held-out images.

    Args:
        task: draws, and has the images.
        network: the one that draws.
        split: whose images it is held against; ``train`` is what it learned from.

    Raises:
        InputError: the network does not fit, or the split has fewer images than the task draws.
    """
    drawn, held_out, training = task.samples(network), task.images(split), task.images("train")
    if len(held_out) < len(drawn):
        raise InputError(f"split {split} has {len(held_out)} images, fewer than task.samples {len(drawn)}; lower that")
    features = letter_features(drawn.shape[-1], drawn.shape[1])
    own, others, known = (shown_by(each) for each in (drawn, evenly(held_out, len(drawn)), training))
    return measure_samples([own], others, known, features)


def draw_samples(task: SampleTask, networks: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """What networks draw from the same noise, side by side: ``[C, H, W]``. Raises InputError if one does not fit."""
    return beside([grid(task.samples(each, ROWS * COLUMNS), COLUMNS) for each in networks], GAP)
