"""The task ``tickets``: masks over one network's initial weights, one for every two-way grouping of the digits.

A *ticket* (arXiv 1803.03635) is a mask under which the start is trained as well as the whole network would be. It is
found by training and pruning in turns, each time from the start again, which is rewound to what a few common steps made
of the first weights (arXiv 1912.05671). A checkpoint is not a network: it holds the order in which weights were pruned,
so that it is cut at any share of zeros. T tasks, C classes, B images, P weights that may be pruned.
"""

from __future__ import annotations

import functools
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rpg.devices import single_threaded
from rpg.evaluation.span import FlatSpace
from rpg.labs.tickets.config import TicketsConfig
from rpg.seeding import make_rng
from rpg.tasks.collecting import BASE, ManyTasks
from rpg.tasks.images.digits import DigitsSubsetsTask
from rpg.tasks.images.training import finetune_many
from rpg.tasks.side_by_side import SideBySide, Stacked, join_stacked, repeat, stack
from tokenization.compressed.parts import cut_mask
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.zoo import Zoo


class Masked(SideBySide):
    """Networks with weights that are held at zero, also in training.

    Args:
        masks: 0 or 1, ``[T, *shape]``, of the tensors that are pruned.
    """

    def __init__(self, network: nn.Module, masks: Stacked) -> None:
        super().__init__(network)
        self.masks = masks

    def apply(self, weights: Stacked) -> Stacked:
        """The weights with their zeros."""
        return {name: value * self.masks[name] if name in self.masks else value for name, value in weights.items()}

    def __call__(self, weights: Stacked, images: Tensor) -> Tensor:
        """Logits ``[T, B, classes]``."""
        return super().__call__(self.apply(weights), images)


def cut_globally(scores: Tensor, sparsity: float) -> Tensor:
    """The highest of each network's scores, whatever their layer: 0 or 1, ``[T, P]``; InputError for no share."""
    return torch.stack([cut_mask(row, sparsity) for row in scores]).float()


class TicketsTask(ManyTasks):
    """Collects tickets and scores masks by the accuracy after training under them.

    Scores of weights, and so checkpoints, are in -1 … 1: the later a weight was pruned, the higher.
    """

    def __init__(self, config: TicketsConfig) -> None:
        self.config = config
        self.family = DigitsSubsetsTask(config.family)

    @property
    def condition(self) -> ConditionSpec:
        """The groupings."""
        return self.family.condition

    def conditions(self) -> Tensor:
        """Every grouping, ``[T, C]``."""
        return self.family.bits()

    def splits(self) -> list[str]:
        """The split of every grouping."""
        return self.family.splits()

    @property
    def group(self) -> int:
        """Groupings of a part."""
        return self.config.family.group

    def build(self) -> nn.Module:
        """The target network without what is never pruned: its biases and scales."""
        network = self.family.build()
        for module in network.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                if value.dim() < 2:
                    module.register_parameter(name, None)
        return network

    @cached_property
    def space(self) -> FlatSpace:
        """Scores and masks as vectors ``[T, P]`` and back."""
        return FlatSpace({name: value[None] for name, value in self.build().named_parameters()})

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The rewound start of all tasks: what the common steps make of the network, with a new head of two logits."""
        with single_threaded():
            base, network = self.family.train_base(), self.family.build()
        return {
            name: base[name] if base[name].shape == like.shape else like for name, like in network.state_dict().items()
        }

    def train_base(self) -> dict[str, Tensor]:
        """The rewound start."""
        return self.start

    def train_part(self, runs: list[int], folder: Path) -> tuple[list[Stacked], dict[str, Tensor]]:
        """Find the tickets of one part from the start in ``folder``."""
        self.start = load_file(folder / BASE)
        bits = self.family.bits()[runs]
        tickets = self.find(bits)
        return [tickets], {"validation_accuracy": self.accuracies(tickets, bits, "validation")[None]}

    def find(self, bits: Tensor) -> Stacked:
        """The tickets of tasks ``[T, C]`` by training and pruning in turns.

        Who lives in round r of R (from 0) scores between r and r + 1, by the rank of its size after training. Scores
        are then stretched from 0 … R to -1 … 1.
        """
        scores = torch.zeros(len(bits), self.space.size)
        alive = torch.ones_like(scores)
        for number in range(self.config.rounds):
            sizes = self.sizes(alive, bits)
            places = sizes.where(alive > 0, -1.0).argsort(1).argsort(1) - (alive == 0).sum(1, keepdim=True)
            ranks = (places + 0.5) / alive.sum(1, keepdim=True)
            scores = (number + ranks).where(alive > 0, scores)
            alive = cut_globally(scores, 1 - self.config.kept ** (number + 1))
        return self.space.unflatten(scores * 2 / self.config.rounds - 1)

    def sizes(self, masks: Tensor, bits: Tensor) -> Tensor:
        """How large weights are after the training under ``masks`` that tickets are searched by, ``[T, P]`` both."""
        return self.space.flatten(self.train(self.space.unflatten(masks), bits, "search")).abs()

    def train(self, masks: Stacked, bits: Tensor, images: str = "judged") -> Stacked:
        """Train the rewound start under masks for the tasks ``[T, C]``; ``images`` names the draw of images."""
        rows = torch.arange(len(bits)).split(self.group)
        parts = [{name: value[some] for name, value in masks.items()} for some in rows]
        return join_stacked([self._train(part, bits[some], images) for part, some in zip(parts, rows, strict=True)])

    def _train(self, masks: Stacked, bits: Tensor, images: str) -> Stacked:
        recipe, rng = self.config.family.finetune, make_rng(self.config.family.seed, "tickets", images)
        side, starts = Masked(self.family.build(), masks), repeat(self.start, len(bits))
        draw = functools.partial(self.family.draw, rng=rng, augmented=recipe.augment)
        return side.apply(finetune_many(side, starts, bits, draw, recipe)[-1])

    @single_threaded()
    def accuracies(self, weights: Stacked, bits: Tensor, split: str = "test", sparsity: float | None = None) -> Tensor:
        """Share of right answers ``[T]`` of the start trained under the masks that scores are cut to.

        Training takes the training images whatever the ``split``; the share of zeros is the configuration's when None.
        """
        share = self.config.sparsity if sparsity is None else sparsity
        masks = self.space.unflatten(cut_globally(self.space.flatten(weights), share))
        return self.family.accuracies(self.train(masks, bits), bits, split)

    @single_threaded()
    def untrained(self, zoo: Zoo, bits: Tensor) -> dict[str, Stacked]:
        """Masks of the tasks ``[T, C]`` that are not tickets, as scores.

        ``random``; ``shuffled``: the task's own ticket, shuffled within every layer; ``start_magnitude``: the size of
        the rewound weights; ``one_shot``: their size after training the whole network, which is pruned once.
        """
        own, seed = {entry.condition: index for index, entry in enumerate(zoo.entries)}, self.config.family.seed
        random, shuffled = [], []
        for task in bits.tolist():
            ticket, rng = zoo.state_dict(own[tuple(map(float, task))]), make_rng(seed, "random mask", *task)
            random.append({name: torch.rand(value.shape, generator=rng) for name, value in ticket.items()})
            orders = {name: torch.randperm(value.numel(), generator=rng) for name, value in ticket.items()}
            shuffled.append({name: value.flatten()[orders[name]].view_as(value) for name, value in ticket.items()})
        sizes = {name: self.start[name].abs() for name in self.space.shapes}
        return {
            "random": stack(random),
            "shuffled": stack(shuffled),
            "start_magnitude": repeat(sizes, len(bits)),
            "one_shot": self.space.unflatten(self.sizes(torch.ones(len(bits), self.space.size), bits)),
        }
