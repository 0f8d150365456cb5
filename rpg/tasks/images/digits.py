"""The task ``digits``: scikit-learn's 1,797 handwritten digits of 8×8 pixels, which need no download."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg.devices import in_bf16, use_threads
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.collecting import DTYPES, convert_floats, one_cycle
from rpg.tasks.images.config import DIGITS_SIZE, DigitsConfig, DigitsSubsetsConfig
from rpg.tasks.images.networks import ImageSplits, augment, build_network, logits_of, predict_images
from rpg.tasks.images.subsets import SubsetTask
from rpg.tasks.images.training import Compression, train_run
from rpg.tasks.stepwise import Kept, StepwiseTask, Tick
from tokenization.checkpoint.checkpoint import StateDict
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

MOST = 16
"""The brightest pixel of scikit-learn's digits."""
NUM_VALIDATION = 250
NUM_TEST = 500
SPLIT_SEED = 0  # part of the task's definition: metrics of different zoos are comparable


@cache
def load_splits(image_size: int = DIGITS_SIZE, num_validation: int = NUM_VALIDATION) -> ImageSplits:
    """The digits in a fixed stratified split of 1,047 training, 250 validation and 500 test images.

    Args:
        image_size: height and width to which they are enlarged by bicubic interpolation.
        num_validation: images to make choices by, if not 250; the test images are always the same.
    """
    from sklearn.datasets import load_digits  # imported here: slow, and only needed with the data
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = _enlarged(torch.from_numpy(digits.images).float().unsqueeze(1), image_size)
    labels = torch.from_numpy(digits.target).long()

    def cut(rows: Tensor, num: int) -> list[Tensor]:
        parts = train_test_split(rows.numpy(), test_size=num, stratify=labels[rows].numpy(), random_state=SPLIT_SEED)
        return [torch.from_numpy(part) for part in parts]

    rest, test = cut(torch.arange(len(labels)), NUM_TEST)
    train, validation = cut(rest, num_validation)
    mean, std = images[train].mean(), images[train].std()
    standardised = (images - mean) / std
    rows = {"train": train, "validation": validation, "test": test}
    return ImageSplits(
        images={split: standardised[index] for split, index in rows.items()},
        labels={split: labels[index] for split, index in rows.items()},
        num_classes=10,
        mean=mean.item(),
        std=std.item(),
    )


def _enlarged(images: Tensor, image_size: int) -> Tensor:
    if image_size == DIGITS_SIZE:
        return images
    return F.interpolate(images, size=image_size, mode="bicubic", align_corners=False)


def standardise(images: Tensor, image_size: int = DIGITS_SIZE) -> Tensor:
    """Further digits ``[B, 1, 8, 8]`` in 0 … 16 as networks take them, ``[B, 1, S, S]``."""
    splits = load_splits(image_size)
    return (_enlarged(images, image_size) - splits.mean) / splits.std


class DigitsTask(StepwiseTask):
    """Collects zoos of digit classifiers and scores state dicts on the digits."""

    config: DigitsConfig
    unrecorded = ()

    def __init__(self, config: DigitsConfig) -> None:
        self.config, self.runs, self.threads = config, config.runs, config.threads
        self.splits = load_splits(config.image_size)
        self.compression = Compression(config.compress) if config.compress is not None else None

    def build(self) -> nn.Module:
        """The untrained target network: images [B, 1, S, S] → logits [B, 10].

        Its weights are drawn from torch's global random state.
        """
        size = self.config.image_size
        return build_network(self.config.network, in_channels=1, image_size=size, num_classes=10)

    @property
    def first_steps(self) -> int:
        """Steps to convergence, and of compression."""
        return self.config.train_steps + (self.config.compress.steps if self.config.compress is not None else 0)

    def train_run(self, zoo: Zoo, run: int, tick: Tick) -> Iterator[Kept]:
        """See `rpg.tasks.images.training.train_run`."""
        for step, network in train_run(self.build, self.splits, self.config, run, tick, self.compression):
            yield step, network.state_dict(), None

    def stored(self, tensors: Mapping[str, Tensor]) -> StateDict:
        """The checkpoint that is written: in its dtype, and compressed."""
        stored = convert_floats(tensors, DTYPES[self.config.dtype])
        return self.compression.store(stored) if self.compression is not None else stored

    def metrics(self, stored: StateDict, loss: Tensor | None) -> dict[str, float]:
        """The accuracy on validation images."""
        right = self.predict([stored], "validation")[0] == self.labels("validation")
        return {"validation_accuracy": right.double().mean().item()}

    def predict(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Tensor:
        """Predicted classes, int64 [num, images]. Raises InputError for misfits and unknown splits."""
        with torch.random.fork_rng(devices=[]):  # scoring must not advance the caller's random state
            network = self.build()
        with use_threads(self.config.threads):
            return predict_images(network, state_dicts, self.images(split))

    def logits(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Iterator[Tensor]:
        """The logits ``[images, 10]`` of one network after another; none is kept. Errors as of `predict`."""
        with torch.random.fork_rng(devices=[]):
            network = self.build()
        images = self.images(split)

        def score(state_dict: Mapping[str, Tensor]) -> Tensor:
            with use_threads(self.config.threads):
                return logits_of(network, state_dict, images, "a network")

        return map(score, state_dicts)

    def images(self, split: str = "test") -> Tensor:
        """Standardised images of a split, float32 [images, 1, S, S]. Raises InputError for an unknown split."""
        return self.splits.images[self.splits.check(split)]

    def labels(self, split: str = "test") -> Tensor:
        """Labels of a split, int64 [images]. Raises InputError for an unknown split."""
        return self.splits.labels[self.splits.check(split)]


POOL_COPIES = 40
"""Altered copies of every training image, made once: drawing from them is cheaper than altering each batch."""


class DigitsSubsetsTask(SubsetTask):
    """Collects and scores networks for groups of digits."""

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

    @property
    def example_classes(self) -> tuple[str, ...]:
        """The two sides of a grouping."""
        return ("negative", "positive")

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Of an image, ``(1, S, S)``."""
        return tuple(self.images("train").shape[1:])

    def examples(self, conditions: Tensor, classes: Tensor, rng: torch.Generator, split: str = "train") -> Tensor:
        """Random images of a split on the sides ``[T, n]`` of the groupings ``[T, C]``, in 0 … 1: ``[T, n, S·S]``."""
        sides = self.targets(conditions, split)  # [T, B]
        order, positive = sides.argsort(dim=1, stable=True), sides.sum(1, keepdim=True)  # the negative side comes first
        negative = sides.shape[1] - positive
        counts, first = torch.where(classes > 0, positive, negative), torch.where(classes > 0, negative, 0)
        if not bool(counts.all()):
            raise InputError(f"a side of a grouping has no {split} image to show; take another split")
        place = first + (torch.rand(classes.shape, generator=rng) * counts).long()
        splits = load_splits(self.config.image_size)
        images = splits.images[split].flatten(1)[order.gather(1, place)]  # [T, n, S·S]
        return ((images * splits.std + splits.mean) / MOST).clamp(0, 1)

    def inputs(self, examples: Tensor) -> Tensor:
        """Examples ``[…, S·S]`` in 0 … 1, standardised as networks take them: ``[…, 1, S, S]``."""
        splits = load_splits(self.config.image_size)
        return ((MOST * examples - splits.mean) / splits.std).unflatten(-1, self.example_shape)

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

        def loss() -> Tensor:
            images, classes = self.draw(config.batch_size, rng, augmented=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16(config.precision, torch.device("cpu"))):
                return F.cross_entropy(network(images), classes)

        one_cycle(optimizer, loss, config.learning_rate, config.steps)
        return network.state_dict()
