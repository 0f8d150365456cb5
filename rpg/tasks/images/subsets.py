"""A family of binary tasks over one labelled image set, all fine-tuned from one shared base network.

T networks or tasks, C classes of the image set, B images.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rpg.devices import single_threaded
from rpg.seeding import derive_seed, make_rng, permutation
from rpg.tasks.class_splits import all_tasks, assign_splits
from rpg.tasks.collecting import BASE, ManyTasks, require_same_task, without_arithmetic
from rpg.tasks.images.networks import predict_images
from rpg.tasks.images.training import binary_start, finetune_many
from rpg.tasks.side_by_side import Stacked, Teacher, join_stacked
from tokenization.errors import InputError
from tokenization.zoo.condition import WITHHELD, ConditionSpec
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo


class SubsetTask(ManyTasks):
    """What is common to the families; a subclass brings images and networks."""

    class_names: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any) -> None:
        self.config = config

    def network(self, num_outputs: int) -> nn.Module:
        """The untrained network with that many logits, drawn from torch's global random state."""
        raise NotImplementedError

    def images(self, split: str = "test") -> Tensor:
        """Standardised images of a split, float32 ``[B, C, S, S]``."""
        raise NotImplementedError

    def batches(self, split: str) -> Iterator[Tensor]:
        """The images of a split in parts that fit into memory."""
        yield self.images(split)

    def classes(self, split: str = "test") -> Tensor:
        """The classes of a split's images, int64 ``[B]``."""
        raise NotImplementedError

    def draw(self, num: int, rng: torch.Generator, *, augmented: bool) -> tuple[Tensor, Tensor]:
        """Draw training images ``[num, …]`` and their classes ``[num]``."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def condition(self) -> ConditionSpec:
        """What the conditions of the zoo's entries mean."""
        return ConditionSpec("binary", self.num_classes, self.class_names)

    def build(self) -> nn.Module:
        """The untrained target network: two logits, negative and positive."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "initialisation"))
            return self.network(2)

    def bits(self) -> Tensor:
        """The tasks of the family in the order of their numbers, ``[T, C]``. Raises InputError if there are too few."""
        bits, wanted = all_tasks(self.num_classes), self.config.tasks
        if wanted is None:
            return bits
        if wanted > len(bits):
            raise InputError(f"task.tasks is {wanted}, but there are at most {len(bits)} tasks; ask for fewer")
        return bits[permutation(len(bits), self.config.seed, "tasks")[:wanted].sort().values]

    def conditions(self) -> Tensor:
        """Those of every copy's networks, ``[T · copies, C]``."""
        return self.bits().repeat(self.config.copies, 1)

    def splits(self) -> list[str]:
        """The split of every task: ``train``, ``validation`` or ``unseen``."""
        return assign_splits(self.bits(), self.config.unseen, self.config.validation, self.config.seed)

    def targets(self, conditions: Tensor, split: str = "test") -> Tensor:
        """Right answers 0 or 1 of each task on a split's images: ``[T, C]`` → int64 ``[T, B]``."""
        return conditions.long()[:, self.classes(split)]

    def predict(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Tensor:
        """Answers 0 or 1 of each network, int64 ``[T, B]``. Raises InputError for state dicts that do not fit."""
        with single_threaded():
            networks = [dict(each) for each in state_dicts]
            return torch.cat([predict_images(self.build(), networks, part.cpu()) for part in self.batches(split)], 1)

    def base_probabilities(self, zoo: Zoo, split: str = "test") -> Tensor:
        """Class probabilities ``[B, C]`` of the shared base network."""
        teacher = self.teacher(zoo)
        with torch.inference_mode():
            return torch.cat([teacher(images).cpu() for images in self.batches(split)])

    def require_data(self) -> None:
        """Raise InputError where the images are missing."""
        self.classes("train")

    def train_part(self, runs: list[int], folder: Path) -> tuple[list[Stacked], dict[str, Tensor]]:
        """Fine-tune the networks of one part from the base in ``folder``."""
        bits, base = self.bits(), load_file(folder / BASE)
        parts = []
        for copy, group in itertools.groupby(runs, lambda run: run // len(bits)):
            parts.append(self._train_copy(copy, bits[[run % len(bits) for run in group]], base))
        checkpoints = [join_stacked(each) for each in zip(*parts, strict=True)]
        tasks = bits[[run % len(bits) for run in runs]]
        accuracies = torch.stack([self.accuracies(each, tasks, "validation") for each in checkpoints])
        return checkpoints, {"validation_accuracy": accuracies}

    def _train_copy(self, copy: int, bits: Tensor, base: Mapping[str, Tensor]) -> list[Stacked]:
        """Fine-tune one network for each of the tasks ``[T, C]`` on that copy's images; on the CPU, by checkpoint."""
        start = {name: value.to(self.device) for name, value in self.starts(base, bits).items()}
        # the same images for every part; each further copy has others
        rng, recipe = make_rng(self.config.seed, "fine-tuning", *([copy] if copy else [])), self.config.finetune
        draw = partial(self.draw, rng=rng, augmented=recipe.augment)
        checkpoints = finetune_many(self.side, start, bits.to(self.device), draw, recipe)
        return [{name: value.cpu() for name, value in each.items()} for each in checkpoints]

    def starts(self, base: Mapping[str, Tensor], bits: Tensor) -> Stacked:
        """The weights from which each task ``[T, C]`` is fine-tuned, made of the shared base network's."""
        return binary_start(base, self.build(), bits, self.config.fresh_head)

    def accuracies(self, weights: Stacked, bits: Tensor, split: str = "test") -> Tensor:
        """Share of right answers of T stacked networks at their tasks ``[T, C]``, float64 ``[T]``."""
        answers = self.probabilities(weights, split).argmax(-1)
        return (answers == self.targets(bits.cpu(), split)).double().mean(1)

    def untrained(self, zoo: Zoo, bits: Tensor) -> dict[str, Stacked]:
        """The weights from which each task ``[T, C]`` of ``zoo`` was fine-tuned."""
        return {"start": self.starts(self.base_network(zoo), bits)}

    def probabilities(self, weights: Stacked, split: str) -> Tensor:
        """Class probabilities ``[T, B, 2]`` of T stacked networks on a split's images."""
        weights = {name: value.to(self.device) for name, value in weights.items()}
        return torch.cat([self.side.predict(weights, images).cpu() for images in self.batches(split)], 1)

    def teacher(self, zoo: Zoo) -> Teacher:
        """The shared base network: images ``[B, …]`` → class probabilities ``[B, C]``. Raises InputError if missing."""
        network = self.network(self.num_classes).eval().requires_grad_(False).to(self.device)
        network.load_state_dict(self.base_network(zoo))
        return lambda images: network(images.to(self.device)).softmax(-1)

    def behaviour_losses(
        self, weights: Stacked, conditions: Tensor, num_images: int, rng: torch.Generator,
        teacher: Teacher | None = None, originals: Stacked | None = None, temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Cross-entropy ``[T]`` of T networks at their tasks ``[T, C]`` on random *training* images.

        The right answers are the images' labels or, with a teacher, its class probabilities summed over either side, or
        those of T other networks, or with both the mean of the two, their log-odds divided by a temperature; classes
        whose bit is withheld count for none.
        Differentiable in ``weights``.
        """
        images, classes = self.draw(num_images, rng, augmented=True)
        images = images.to(conditions.device)
        if teacher is None:
            probabilities = F.one_hot(classes, self.num_classes).to(conditions)  # [B, C]
        else:
            probabilities = teacher(images).to(conditions)  # [B, C]
        told = (conditions != WITHHELD).to(conditions)  # [T, C]
        share = told @ probabilities.T  # [T, B] probability of the classes whose bit is told
        positive = (told * conditions) @ probabilities.T / share.clamp(min=1e-6)  # [T, B]
        score = self._log_odds(weights, images)  # [T, B]
        if originals is not None:
            with torch.no_grad():
                own = self._log_odds(originals, images).sigmoid()
            positive = own if teacher is None else (positive + own) / 2
        if temperature != 1:
            positive = (positive.logit(1e-6) / temperature).sigmoid()
        losses = F.binary_cross_entropy_with_logits(score, positive.to(score.dtype), reduction="none")  # [T, B]
        return (losses * share).sum(1) / share.sum(1).clamp(min=1)

    def _log_odds(self, weights: Stacked, images: Tensor) -> Tensor:
        """Of "positive", by the softmax of the two logits: ``[T, B]``."""
        logits = self.side(weights, images)  # [T, B, 2]
        return logits[..., 1] - logits[..., 0]


@locks(lambda source, path, task: path)
def resplit(source: Path | str, path: Path | str, task: SubsetTask) -> Zoo:
    """Make a zoo of the same networks with other unseen tasks, without training; files are linked, not copied.

    Raises InputError unless ``source`` is a zoo of the same family and recipe, or if there is a zoo already.
    """
    old = Zoo.open(source)
    require_same_task(old, task.config, ("unseen", "validation"), "make it the same, or collect a new zoo")
    new = Zoo.create(path, task=without_arithmetic(task.config.model_dump(mode="json")), condition=task.condition)
    splits = task.splits()
    (new.path / "checkpoints").mkdir(exist_ok=True)
    for name in (BASE, *(entry.file for entry in old.entries)):
        _link(old.path / name, new.path / name)
    new.extend([dataclasses.replace(entry, split=splits[entry.run % len(splits)]) for entry in old.entries])
    return new


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
