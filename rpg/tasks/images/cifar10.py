"""The tasks ``cifar10_subsets``: every two-way grouping of the ten CIFAR-10 classes, by fine-tuning timm's ViT-Tiny.

The recipe is that of arXiv 2501.11587 (section 5): from ImageNet weights, the head first and then everything, focal
loss, five checkpoints a task.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg.devices import task_device
from rpg.seeding import derive_seed, make_rng, permutation
from rpg.tasks.collecting import descend
from rpg.tasks.images.config import Cifar10SubsetsConfig
from rpg.tasks.images.networks import ImageSplits, timm_network
from rpg.tasks.images.subsets import SubsetTask
from tokenization.errors import InputError

MEAN, STD = 0.5, 0.5
"""What timm's ViT-Tiny was trained with."""

CROP_PADDING = 4


class Cifar10SubsetsTask(SubsetTask):
    """Collects and scores ViTs for groups of CIFAR-10 classes; on a GPU if there is one."""

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    config: Cifar10SubsetsConfig

    def __init__(self, config: Cifar10SubsetsConfig) -> None:
        super().__init__(config)
        self.device = task_device()

    @cached_property
    def data(self) -> ImageSplits:
        """The raw images, uint8 ``[B, 3, 32, 32]``, by split. Raises InputError where ``config.root`` lacks them."""
        train, test = self._load(True), self._load(False)
        if not len(train[1]) > self.config.num_validation:
            raise InputError(
                f"task.num_validation is {self.config.num_validation}, but there are {len(train[1])} images; take fewer"
            )
        order = permutation(len(train[1]), self.config.seed, "validation images")
        validation, rest = order[: self.config.num_validation], order[self.config.num_validation :]
        images, labels = (
            {"validation": each[validation], "train": each[rest], "test": last}
            for each, last in zip(train, test, strict=True)
        )
        return ImageSplits(images, labels, 10)

    def _load(self, train: bool) -> tuple[Tensor, Tensor]:
        from torchvision.datasets import CIFAR10  # imported here: slow, and only needed with the data

        root = self.config.root
        try:
            found = CIFAR10(root, train=train, download=self.config.download)
        except (RuntimeError, OSError) as error:
            raise InputError(
                f"task.root {root} holds no CIFAR-10 ({str(error).splitlines()[0]}); "
                "name the folder with cifar-10-batches-py, or set task.download=true to fetch it"
            ) from None
        return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)

    def network(self, num_outputs: int) -> nn.Module:
        """timm's network with that many logits; ImageNet weights come with :meth:`train_base` only."""
        return self._timm(num_outputs, pretrained=False)

    def _timm(self, num_outputs: int, *, pretrained: bool) -> nn.Module:
        size = {"img_size": self.config.image_size} if "vit" in self.config.network else {}
        cure = "name a network of timm, or set task.pretrained=false, which needs no weights"
        return timm_network(self.config.network, cure, pretrained=pretrained, num_classes=num_outputs, **size)

    def enlarge(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, 32, 32]`` → standardised float32 ``[B, 3, image_size, image_size]`` on the device."""
        values = (images.to(self.device).float() / 255 - MEAN) / STD
        size = self.config.image_size
        return F.interpolate(values, size=(size, size), mode="bicubic", align_corners=False)

    def images(self, split: str = "test") -> Tensor:
        """All images of a split, enlarged; use :meth:`batches` where memory matters."""
        return self.enlarge(self.data.images[self.data.check(split)])

    def batches(self, split: str) -> Iterator[Tensor]:
        """The images of a split, enlarged some at a time."""
        for part in self.data.images[self.data.check(split)].split(self.config.eval_batch):
            yield self.enlarge(part)

    def classes(self, split: str = "test") -> Tensor:
        """Classes of a split's images, int64 ``[B]``."""
        return self.data.labels[self.data.check(split)]

    def draw(self, num: int, rng: torch.Generator, *, augmented: bool) -> tuple[Tensor, Tensor]:
        """Draw training images, enlarged, and their classes; altered ones are flipped and cropped at random."""
        images, classes = self.data.images["train"], self.data.labels["train"]
        rows = torch.randint(len(images), (num,), generator=rng)
        chosen = images[rows]
        if augmented:
            chosen = _flip_and_crop(chosen, rng)
        return self.enlarge(chosen), classes[rows].to(self.device)

    def train_base(self) -> dict[str, Tensor]:
        """ImageNet weights with a ten-way head trained on them (the base of ``base_summed``)."""
        config = self.config.probe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "base"))
            network = self._timm(self.num_classes, pretrained=self.config.pretrained).to(self.device).eval()
        rng = make_rng(self.config.seed, "base images")
        head = network.requires_grad_(False).get_classifier().requires_grad_(True)  # type: ignore[operator]
        optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate)
        for _ in range(config.steps):
            images, classes = self.draw(config.batch_size, rng, augmented=True)
            descend(optimizer, F.cross_entropy(network(images), classes))
        return {name: value.detach().cpu() for name, value in network.state_dict().items()}


def _flip_and_crop(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image mirrored by chance and cut out of itself with a border of ``CROP_PADDING`` pixels."""
    num, _, height, width = images.shape
    flip = torch.rand(num, generator=rng) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (CROP_PADDING,) * 4)
    top, left = torch.randint(2 * CROP_PADDING + 1, (2, num), generator=rng)
    rows = top[:, None] + torch.arange(height)  # [B, H]
    columns = left[:, None] + torch.arange(width)  # [B, W]
    return padded[torch.arange(num)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
