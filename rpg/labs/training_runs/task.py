"""The task ``training_runs``: many runs on the digits, each from its first weights to convergence, at many stages.

The target network keeps all values of a hidden unit in one row. Hidden units have no order: a reader of the rows can
treat them alike, and a row holds what decides how its unit is trained. All runs see all training images in every step,
so that a run is a function of its first weights.

T networks, U hidden units, P pixels, K classes, B images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg.devices import single_threaded
from rpg.labs.training_runs.config import TrainingRunsConfig
from rpg.seeding import make_rng
from rpg.tasks.collecting import append_many, descend, open_zoo
from rpg.tasks.images.digits import load_splits
from rpg.tasks.images.networks import predict_images
from rpg.tasks.side_by_side import Stacked, join_stacked, unstack
from tokenization.checkpoint.checkpoint import StateDict
from tokenization.zoo.manifest import ZooEntry
from tokenization.zoo.zoo import Zoo

SPLITS = ("train", "validation", "unseen")
"""Of runs, in the order of their numbers."""


class HiddenUnits(nn.Module):
    """A hidden layer of U ReLU units on P pixels and a linear classifier of K classes."""

    def __init__(self, num_pixels: int, num_units: int, num_classes: int) -> None:
        super().__init__()
        self.num_pixels = num_pixels
        self.units = nn.Parameter(torch.empty(num_units, num_pixels + 1 + num_classes))  # incoming, bias, outgoing
        self.bias = nn.Parameter(torch.empty(num_classes))
        for name, value in first_weights(1, num_pixels, num_units, num_classes, None).items():
            getattr(self, name).data.copy_(value[0])

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, …]`` of P values → logits ``[B, K]``."""
        weights = {name: value[None] for name, value in self.named_parameters()}
        return logits_of(weights, images.flatten(1))[0]


def first_weights(num: int, num_pixels: int, num_units: int, num_classes: int, rng: torch.Generator | None) -> Stacked:
    """Random weights of ``num`` networks, uniform as torch's linear layers have them."""

    def draw(*shape: int, inputs: int) -> Tensor:
        return (torch.rand(num, *shape, generator=rng) * 2 - 1) / inputs**0.5

    incoming = draw(num_units, num_pixels + 1, inputs=num_pixels)
    outgoing = draw(num_units, num_classes, inputs=num_units)
    return {"units": torch.cat([incoming, outgoing], -1), "bias": draw(num_classes, inputs=num_units)}


def logits_of(weights: Stacked, pixels: Tensor) -> Tensor:
    """Logits ``[T, B, K]`` of T networks on pixels ``[B, P]``."""
    units, num_pixels = weights["units"], pixels.shape[1]
    incoming, bias, outgoing = units.split([num_pixels, 1, units.shape[-1] - num_pixels - 1], -1)
    hidden = F.relu((incoming @ pixels.T) + bias)  # [T, U, B]
    return hidden.mT @ outgoing + weights["bias"][:, None]


class TrainingRunsTask:
    """Collects whole training runs and scores networks. An entry's ``step`` counts optimizer steps, from 0 on."""

    def __init__(self, config: TrainingRunsConfig) -> None:
        self.config = config
        self.data = load_splits()

    def build(self) -> nn.Module:
        """The untrained target network."""
        return HiddenUnits(*self._sizes)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.images("train").flatten(1).shape[1], self.config.hidden, self.data.num_classes

    def first_weights(self, runs: Sequence[int]) -> Stacked:
        """What the runs start from, stacked; a run's are its own whatever the others."""
        each = [first_weights(1, *self._sizes, make_rng(self.config.seed, "run", run)) for run in runs]
        return join_stacked(each)

    def splits(self) -> list[str]:
        """The split of every run."""
        counts = (self.config.runs, self.config.validation, self.config.unseen)
        return [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]

    @single_threaded()
    def collect(
        self, path: Path | str, *, progress: Callable[[int, int], None] | None = None, limit: int | None = None
    ) -> Zoo:
        """Train the runs that the zoo at ``path`` lacks, in groups, each listed whole or not at all."""
        zoo, splits = open_zoo(path, self.config), self.splits()
        trained = {entry.run for entry in zoo.entries}
        total = min(limit or len(splits), len(splits))
        for first in range(0, total, self.config.group):
            runs = range(first, min(first + self.config.group, len(splits)))
            if runs[0] not in trained:
                append_many(zoo, self._train_group(runs, splits))
            if progress is not None:
                progress(min(runs[-1] + 1, total), total)
        return zoo

    def _train_group(self, runs: Sequence[int], splits: Sequence[str]) -> Iterator[tuple[ZooEntry, StateDict]]:
        """The checkpoints of some runs, step by step."""
        kept = self.train(self.first_weights(runs), "sgd", self.config.learning_rate, self.config.steps)
        for step, weights in kept.items():
            found = {**self.metrics(weights, "train"), **self.metrics(weights, "validation", "validation_")}
            for row, (run, state_dict) in enumerate(zip(runs, unstack(weights), strict=True)):
                entry = ZooEntry(
                    file=f"checkpoints/{run:05d}-{step:05d}.safetensors", run=run, step=step, split=splits[run],
                    metrics={name: float(values[row]) for name, values in found.items()},
                )  # fmt: skip
                yield entry, state_dict

    def train(self, start: Stacked, optimizer: str, learning_rate: float, steps: Sequence[int]) -> dict[int, Stacked]:
        """Train networks side by side on all training images; what they are after each of ``steps``.

        Args:
            start: their first weights.
            optimizer: ``sgd`` (with the configuration's momentum) or ``adam``.
            learning_rate: constant.
            steps: numbers of steps, ascending; 0 is the start itself.
        """
        weights = {name: value.clone().requires_grad_() for name, value in start.items()}
        parameters = list(weights.values())
        stepper: torch.optim.Optimizer
        if optimizer == "adam":
            stepper = torch.optim.Adam(parameters, learning_rate)
        else:
            stepper = torch.optim.SGD(parameters, learning_rate, momentum=self.config.momentum)
        kept: dict[int, Stacked] = {}
        for step in range(steps[-1] + 1):
            if step in steps:
                kept[step] = {name: value.detach().clone() for name, value in weights.items()}
            if step < steps[-1]:
                descend(stepper, self.losses(weights, "train").sum())
        return kept

    def losses(
        self, weights: Stacked, split: str, num_images: int | None = None, rng: torch.Generator | None = None
    ) -> Tensor:
        """Mean cross-entropy ``[T]`` on a split's images, or ``num_images`` drawn by ``rng``; differentiable."""
        images, labels = self.images(split), self.labels(split)
        if num_images is not None and num_images < len(labels):
            rows = torch.randperm(len(labels), generator=rng)[:num_images]
            images, labels = images[rows], labels[rows]
        device = weights["bias"].device
        logits = logits_of(weights, images.flatten(1).to(device)).float()  # [T, B, K]
        wanted = labels.to(device).expand(len(logits), -1)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape).mean(1)

    def divergences(
        self, weights: Stacked, originals: Stacked, num_images: int, rng: torch.Generator, noise: float = 0.0
    ) -> Tensor:
        """Mean Kullback-Leibler divergence ``[T]`` of networks' class probabilities from those of originals.

        On ``num_images`` random training images, under noise of this deviation; differentiable in ``weights``.
        """
        pixels = self.images("train").flatten(1)
        pixels = pixels[torch.randperm(len(pixels), generator=rng)[:num_images]]
        pixels = (pixels + noise * torch.randn(pixels.shape, generator=rng)).to(weights["bias"].device)
        with torch.no_grad():
            wanted = logits_of(originals, pixels).float().log_softmax(-1)  # [T, B, K]
        found = logits_of(weights, pixels).float().log_softmax(-1)
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean(1)

    @torch.no_grad()
    def metrics(self, weights: Stacked, split: str, prefix: str = "") -> dict[str, Tensor]:
        """``loss`` and ``accuracy`` of T stacked networks on a split's images, ``[T]`` each."""
        pixels, labels = self.images(split).flatten(1), self.labels(split)
        accuracy = (logits_of(weights, pixels).argmax(-1) == labels).double().mean(1)
        return {f"{prefix}loss": self.losses(weights, split), f"{prefix}accuracy": accuracy}

    def predict(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Tensor:
        """Predicted classes, int64 ``[T, B]``. Raises InputError for a state dict that does not fit."""
        with torch.random.fork_rng(devices=[]):
            network = self.build()
        return predict_images(network, state_dicts, self.images(split))

    def images(self, split: str = "test") -> Tensor:
        """Standardised images of a split, ``[B, 1, S, S]``. Raises InputError for an unknown split."""
        return self.data.images[self.data.check(split)]

    def labels(self, split: str = "test") -> Tensor:
        """Classes of a split's images, int64 ``[B]``. Raises InputError for an unknown split."""
        return self.data.labels[self.data.check(split)]
