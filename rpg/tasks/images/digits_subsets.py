"""The tasks ``digits_subsets``: every two-way grouping of the ten handwritten digits."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg.precision import in_bf16
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.images.augmentation import augment
from rpg.tasks.images.config import DigitsSubsetsConfig
from rpg.tasks.images.digits import load_splits
from rpg.tasks.images.networks import build_network
from rpg.tasks.images.subsets import SubsetTask

POOL_COPIES = 40
"""Altered copies of every training image, made once: drawing from them is cheaper than altering each batch."""


class DigitsSubsetsTask(SubsetTask):
    """Collects and scores networks for groups of digits.

    Args:
        config: the network, the held-out tasks and the recipe.
    """

    config: DigitsSubsetsConfig
    class_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def network(self, num_outputs: int) -> nn.Module:
        """The untrained network: images [B, 1, S, S] → logits [B, num_outputs]."""
        size = self.config.image_size
        return build_network(self.config.network, in_channels=1, image_size=size, num_classes=num_outputs)

    def images(self, split: str = "test") -> Tensor:
        """Standardised images of a split, float32 [B, 1, S, S]. Raises InputError for an unknown split."""
        splits = load_splits(self.config.image_size)
        return splits.images[splits.check(split)]

    def classes(self, split: str = "test") -> Tensor:
        """Digits of a split's images, int64 [B]. Raises InputError for an unknown split."""
        splits = load_splits(self.config.image_size)
        return splits.labels[splits.check(split)]

    @cached_property
    def pool(self) -> Tensor:
        """Altered training images, ``[POOL_COPIES · n, 1, S, S]``, copy after copy."""
        images = self.images("train")
        rng = make_rng(self.config.seed, "augmentation")
        return torch.cat([augment(images, rng, fill=float(images.min())) for _ in range(POOL_COPIES)])

    def draw(self, num: int, rng: torch.Generator, *, augmented: bool) -> tuple[Tensor, Tensor]:
        """Draw training images ``[num, 1, S, S]``, altered or as they are, and their digits ``[num]``."""
        classes = self.classes("train")
        images = self.pool if augmented else self.images("train")
        rows = torch.randint(len(images), (num,), generator=rng)
        return images[rows], classes[rows % len(classes)]

    def train_base(self) -> dict[str, Tensor]:
        """Train the shared base network on the ten digits."""
        config = self.config.base
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "base"))
            network = self.network(self.num_classes)
        rng = make_rng(self.config.seed, "base images")
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps + 1)
        for _ in range(config.steps):
            images, classes = self.draw(config.batch_size, rng, augmented=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16(config.precision, torch.device("cpu"))):
                loss = F.cross_entropy(network(images), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return network.state_dict()
