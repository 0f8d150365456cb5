"""Which checkpoint is whose start: one of the same run, no later (G.pt, arXiv 2209.12892, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rpg.models.conditioning import InitialConfig
from rpg.seeding import make_rng
from tokenization.errors import InputError
from tokenization.layouts import Layout, token_reader
from tokenization.zoo.zoo import Zoo

MOST_PAIRS = 2048
"""Pairs by which the size of differences is measured."""


class InitialPairs:
    """Draws a start for a training checkpoint.

    Args:
        zoo: the checkpoints; their ``run`` and ``step`` say what is earlier.
        indices: those that are trained on.
        config: how initial weights are drawn.
        seed: decides every draw.

    Raises:
        InputError: no run has two checkpoints.
    """

    def __init__(self, zoo: Zoo, indices: Sequence[int], config: InitialConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        runs: dict[int, list[int]] = {}
        for place in sorted(range(len(indices)), key=lambda each: zoo.entries[indices[each]].step):
            runs.setdefault(zoo.entries[indices[place]].run, []).append(place)
        if all(len(places) == 1 for places in runs.values()):
            raise InputError(
                f"{zoo.path} has one checkpoint of every run, but model.initial needs an earlier and a later one of a "
                "run; collect whole training runs"
            )
        self.earlier = {place: run[: number + 1] for run in runs.values() for number, place in enumerate(run)}

    def draw(self, place: int, *address: int) -> int:
        """The place of a start for the checkpoint at ``place``: its run's first, an earlier one, or itself."""
        earlier, rng = self.earlier[place], make_rng(self.seed, "start", *address)
        first, which = torch.rand(2, generator=rng).tolist()
        return earlier[0] if first < self.config.first else earlier[int(which * len(earlier))]


def sample_differences(
    zoo: Zoo, layout: Layout, indices: Sequence[int], config: InitialConfig, seed: int
) -> torch.Tensor:
    """Differences ``[n, L, D]`` of the tokens of some training checkpoints from their starts."""
    pairs, reader = InitialPairs(zoo, indices, config, seed), token_reader(zoo, layout)
    stride = max(1, len(indices) // MOST_PAIRS)
    places = range(0, len(indices), stride)
    starts = [pairs.draw(place, -1, place) for place in places]
    tokens = range(layout.num_tokens)
    later = reader.read([indices[place] for place in places], tokens)
    return later - reader.read([indices[place] for place in starts], tokens)
