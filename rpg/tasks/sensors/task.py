"""The task ``sensors``: one small network for each sensor, none of which is mounted like another.

All specialists are trained side by side from one generalist and see the same images, each through its own sensor. The
other way to serve all sensors is one network that takes the settings as further inputs.
T sensors, B images, C settings, K classes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rpg.seeding import derive_seed, make_rng
from rpg.tasks.collecting import BASE, ManyTasks, one_cycle
from rpg.tasks.images.networks import timm_network
from rpg.tasks.sensors.config import SensorsConfig
from rpg.tasks.sensors.simulator import declared_settings, draw_settings, load_images, seen_by
from rpg.tasks.sensors.words import describe
from rpg.tasks.side_by_side import Stacked, Teacher, repeat
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.zoo import Zoo


class TinyMLP(nn.Sequential):
    """One hidden layer on the flattened image, with relu."""

    def __init__(self, num_pixels: int, hidden: int, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(num_pixels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    @staticmethod
    def side_by_side(weights: Stacked, images: Tensor) -> Tensor:
        """Logits ``[T, B, K]`` of T networks on images ``[T, B, …]`` of their own: half of the time of `SideBySide`."""
        hidden = torch.baddbmm(weights["1.bias"][:, None], images.flatten(2), weights["1.weight"].mT).relu()
        return torch.baddbmm(weights["3.bias"][:, None], hidden, weights["3.weight"].mT)


class SensorsTask(ManyTasks):
    """Trains and scores networks for sensors. Raises InputError for no images, or sensors that are all the same."""

    def __init__(self, config: SensorsConfig) -> None:
        self.config = config
        self.settings = declared_settings(config)
        if not self.settings:
            raise InputError("task leaves no setting that varies; give angle, scale or shift a range")

    def __reduce__(self) -> tuple:  # to other processes, without what is computed
        return type(self), (self.config,)

    @property
    def condition(self) -> ConditionSpec:
        """The sensors' settings."""
        return ConditionSpec.of_settings(self.settings)

    @cached_property
    def _data(self) -> tuple:
        return load_images(self.config)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called."""
        return self._data[1]

    def build(self) -> nn.Module:
        """The untrained target network. Raises InputError if timm cannot make it."""
        config, splits = self.config, self._data[0]
        channels, size, _ = splits.image_shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "initialisation"))
            if config.network == "mlp":
                return TinyMLP(channels * size**2, config.hidden, splits.num_classes)
            cure = "name mlp, or a network of timm and its task.network_arguments"
            return timm_network(
                config.network, cure, in_chans=channels, num_classes=splits.num_classes, **config.network_arguments
            )

    def draw_tasks(self, num: int, rng: torch.Generator) -> Tensor:
        """New sensors from the family, ``[num, C]``."""
        return draw_settings(self.settings, num, rng)

    def sensors(self) -> tuple[Tensor, list[str]]:
        """The settings ``[T, C]`` of the zoo's sensors and their splits."""
        counts = {"train": self.config.seen, "validation": self.config.validation, "unseen": self.config.unseen}
        parts = [self.draw_tasks(num, make_rng(self.config.seed, "sensors", name)) for name, num in counts.items()]
        return torch.cat(parts), [name for name, num in counts.items() for _ in range(num)]

    def conditions(self) -> Tensor:
        """The settings of the zoo's sensors, ``[T, C]``."""
        return self.sensors()[0]

    def splits(self) -> list[str]:
        """The split of every sensor: ``train``, ``validation`` or ``unseen``."""
        return self.sensors()[1]

    def see(self, images: Tensor, settings: Tensor) -> Tensor:
        """Images in 0 … 1, ``[B, C, S, S]`` or each sensor's own ``[T, B, C, S, S]``, as networks take what sensors
        with the settings ``[T, C]`` show: ``[T, B, C, S, S]``."""
        return seen_by(images, self.settings, settings) - self._data[0].mean

    def images(self, split: str = "test") -> Tensor:
        """The images of a split in 0 … 1 before any sensor, ``[B, C, S, S]``. Raises InputError for no such split."""
        return self._data[0].images[self._data[0].check(split)]

    def classes(self, split: str = "test") -> Tensor:
        """Classes of a split's images, int64 ``[B]``."""
        return self._data[0].labels[self._data[0].check(split)]

    def draw(self, num: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training images ``[num, C, S, S]`` and their classes ``[num]``."""
        rows = torch.randint(len(self.classes("train")), (num,), generator=rng)
        return self.images("train")[rows], self.classes("train")[rows]

    def draw_for_each(self, sensors: int, num: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training images of its own for each sensor, ``[sensors, num, C, S, S]``, and their classes."""
        images, classes = self.draw(sensors * num, rng)
        return images.unflatten(0, (sensors, num)), classes.view(sensors, num)

    @property
    def example_classes(self) -> tuple[str, ...]:
        """Those of the images."""
        return self.class_names

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Of an image, ``(C, S, S)``."""
        return self._data[0].image_shape

    def examples(self, conditions: Tensor, classes: Tensor, rng: torch.Generator, split: str = "train") -> Tensor:
        """Random images of the classes ``[T, n]`` as sensors ``[T, C]`` see them, in 0 … 1: ``[T, n, C·S·S]``."""
        known = self.classes(split)
        order, counts = known.argsort(stable=True), known.bincount(minlength=len(self.class_names))
        if not bool(counts[classes].all()):
            raise InputError(f"a class of the {split} images has none to show; add some, or take classes away")
        first = counts.cumsum(0) - counts
        place = (torch.rand(classes.shape, generator=rng) * counts[classes]).long()
        images = self.images(split)[order[first[classes] + place]]  # [T, n, C, S, S]
        return seen_by(images, self.settings, conditions).flatten(2)

    def inputs(self, examples: Tensor) -> Tensor:
        """Examples ``[…, C·S·S]`` as networks take them, ``[…, C, S, S]``."""
        return examples.unflatten(-1, self.example_shape) - self._data[0].mean

    def describe(self, conditions: Tensor, rng: torch.Generator, split: str = "train") -> list[str]:
        """Sensors ``[T, C]`` in words; only wordings of the split ``train`` are taught."""
        return describe(self.settings, conditions, rng, split)

    def train_base(self) -> dict[str, Tensor]:
        """The one network for all sensors, from fresh sensors in every step."""
        config, rng = self.config.generalist, make_rng(self.config.seed, "generalist")

        def batch() -> tuple[Tensor, Tensor]:
            images, classes = self.draw_for_each(config.sensors, config.images, rng)
            seen = self.see(images, self.draw_tasks(config.sensors, rng))
            return seen.flatten(0, 1)[None], classes.view(1, -1)

        trained = self.train(repeat(self.build().state_dict(), 1), batch, config.steps, config.learning_rate)
        return {name: value[0] for name, value in trained.items()}

    def train_specialists(self, base: dict[str, Tensor], settings: Tensor, steps: int | None = None) -> Stacked:
        """A network for each of the sensors ``[T, C]``, from the generalist; all see the same images."""
        config, rng = self.config.specialist, make_rng(self.config.seed, "specialists")

        def batch() -> tuple[Tensor, Tensor]:
            images, classes = self.draw(config.images, rng)
            return self.see(images, settings), classes.expand(len(settings), -1)

        return self.train(repeat(base, len(settings)), batch, steps or config.steps, config.learning_rate)

    def train(
        self, start: Stacked, batch: Callable[[], tuple[Tensor, Tensor]], steps: int, learning_rate: float
    ) -> Stacked:
        """Adam with a one-cycle schedule on T networks side by side; ``batch`` gives images ``[T, B, …]``, classes."""
        weights = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in start.items()}
        trained = [value for value in weights.values() if value.requires_grad]
        optimizer = torch.optim.Adam(trained, learning_rate, fused=True)
        one_cycle(optimizer, lambda: self.losses(weights, *batch()).sum(), learning_rate, steps)
        return {name: value.detach() for name, value in weights.items()}

    def train_part(self, runs: list[int], folder: Path) -> tuple[list[Stacked], dict[str, Tensor]]:
        """Train the specialists of one part."""
        settings = self.sensors()[0][runs]
        trained = self.train_specialists(load_file(folder / BASE), settings)
        return [trained], {"validation_accuracy": self.accuracies(trained, settings, "validation")[None]}

    def losses(self, weights: Stacked, images: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy ``[T]`` of T networks on images ``[T, B, …]`` of the classes ``[T, B]``."""
        run = TinyMLP.side_by_side if self.config.network == "mlp" else self.side
        logits = run(weights, images)  # [T, B, K]
        found = F.cross_entropy(logits.flatten(0, 1).float(), classes.flatten(), reduction="none")
        return found.view(classes.shape).mean(1)

    def behaviour_losses(
        self, weights: Stacked, conditions: Tensor, num_images: int, rng: torch.Generator,
        teacher: Teacher | None = None, noise: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Cross-entropy ``[T]`` of T networks on random *training* images as their sensors ``[T, C]`` see them.

        Each has images of its own: shared ones make a step's gradient vary far more. Differentiable in ``weights``.
        Normal noise of the standard deviation ``noise`` is added to what they see.
        """
        images, classes = self.draw_for_each(len(conditions), num_images, rng)
        seen = self.see(images.to(conditions), conditions)
        if noise:
            seen = seen + noise * torch.randn(seen.shape, generator=rng).to(seen)
        return self.losses(weights, seen, classes.to(conditions.device))

    def teacher(self, zoo: Zoo) -> Teacher:
        """There is none. Raises InputError."""
        raise InputError("sensors have no base network to learn from; set train.behaviour.target to labels")

    def probabilities(self, weights: Stacked, settings: Tensor, split: str = "test") -> Tensor:
        """Class probabilities ``[T · M, B, K]`` on a split's images as sensors ``[T, C]`` see them, of M networks each.

        Networks are stacked sensor by sensor, ``[T · M, *shape]``.
        """
        images, num = self.images(split), len(next(iter(weights.values()))) // len(settings)
        with torch.inference_mode():
            parts = [
                self.side(
                    {name: value[row * num : (row + 1) * num] for name, value in weights.items()},
                    self.see(images, each[None])[0],
                )
                for row, each in enumerate(settings)
            ]
        return torch.cat(parts).softmax(-1)

    def accuracies(self, weights: Stacked, conditions: Tensor, split: str = "test") -> Tensor:
        """Share of right answers ``[T]`` of T networks at their sensors ``[T, C]``."""
        answers = self.probabilities(weights, conditions, split).argmax(-1)
        return (answers == self.classes(split)).double().mean(1)

    def untrained(self, zoo: Zoo, bits: Tensor) -> dict[str, Stacked]:
        """The generalist, for each of the sensors ``[T, C]``."""
        return {"generalist": repeat(self.base_network(zoo), len(bits))}


class InformedNetwork(nn.Module):
    """An MLP of image and settings."""

    def __init__(self, task: SensorsTask, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = task.images("train")[0].numel() + task.condition.num_inputs
        sizes = [inputs, *widths]
        layers = [each for first, last in itertools.pairwise(sizes) for each in (nn.Linear(first, last), nn.ReLU())]
        self.network = nn.Sequential(*layers, nn.Linear(sizes[-1], len(task.class_names)))

    def forward(self, images: Tensor, inputs: Tensor) -> Tensor:
        """What sensors see ``[T, B, C, S, S]`` and their settings' features ``[T, F]`` → logits ``[T, B, K]``."""
        told = inputs[:, None].expand(-1, images.shape[1], -1)
        return self.network(torch.cat([images.flatten(2), told], -1))

    @property
    def num_values(self) -> int:
        """Values of the network."""
        return sum(each.numel() for each in self.parameters())


def train_informed(task: SensorsTask, widths: Sequence[int], steps: int) -> InformedNetwork:
    """Train it as the generalist is trained, on fresh sensors in every step."""
    config, rng = task.config.generalist, make_rng(task.config.seed, "informed", *widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(task.config.seed, "informed", *widths))
        network = InformedNetwork(task, widths)

    def loss() -> Tensor:
        images, classes = task.draw_for_each(config.sensors, config.images, rng)
        settings = task.draw_tasks(config.sensors, rng)
        logits = network(task.see(images, settings), task.condition.inputs(settings))
        return F.cross_entropy(logits.flatten(0, 1), classes.flatten())

    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate / 4, fused=True)
    one_cycle(optimizer, loss, config.learning_rate / 4, steps)
    return network.eval().requires_grad_(False)


def informed_probabilities(task: SensorsTask, network: InformedNetwork, settings: Tensor, split: str) -> Tensor:
    """Class probabilities ``[T, B, K]`` on a split's images at each of the sensors ``[T, C]``."""
    return network(task.see(task.images(split), settings), task.condition.inputs(settings)).softmax(-1)
