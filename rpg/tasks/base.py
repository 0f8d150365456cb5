"""What the rest of the package asks of a task: one protocol for all tasks, and one for each further ability.

T networks or tasks, C condition values, B images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor, nn

from rpg.tasks.side_by_side import Stacked, Teacher
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.zoo import Zoo


class Task(Protocol):
    """Trains the checkpoints of a zoo."""

    def build(self) -> nn.Module:
        """The target network, untrained."""

    def collect(
        self, path: Path | str, *, progress: Callable[[int, int], None] | None = None, limit: int | None = None
    ) -> Zoo:
        """Train checkpoints into the zoo at ``path``; complete it if it is partly there.

        Args:
            path: the zoo folder, on a disk that all processes share.
            progress: called with what is done and the total: optimizer steps, runs, fields or tasks.
            limit: stop once there are so many, rounded up to whole groups.

        Raises:
            InputError: data are missing, or the zoo there was collected with another configuration.
        """


@runtime_checkable
class Classifier(Task, Protocol):
    """A single task: all networks classify the same images."""

    def predict(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Tensor:
        """Predicted classes of each network, int64 ``[T, B]``."""

    def labels(self, split: str = "test") -> Tensor:
        """Right classes, int64 ``[B]``."""


@runtime_checkable
class LogitTask(Protocol):
    """A task that returns logits, not only predicted classes."""

    def logits(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Iterator[Tensor]:
        """The logits ``[B, classes]`` of one network after another; none is kept."""


@runtime_checkable
class ImageTask(Task, Protocol):
    """A task whose images are all in memory."""

    def images(self, split: str = "test") -> Tensor:
        """The images of a split as the network takes them, ``[B, channels, height, width]``."""


@runtime_checkable
class ImageClassifier(ImageTask, Classifier, Protocol):
    """A single task whose images are all in memory."""


@runtime_checkable
class BehaviourTask(Task, Protocol):
    """A task that scores many networks at once, differentiably."""

    def teacher(self, zoo: Zoo) -> Teacher:
        """The base network that all networks of the zoo started from. Raises InputError if the zoo has none."""

    def behaviour_losses(
        self, weights: Stacked, conditions: Tensor, num_images: int, rng: Generator, teacher: Teacher | None = None
    ) -> Tensor:
        """Loss ``[T]`` of T stacked networks at their tasks ``[T, C]`` on random *training* images.

        The right answers are the images' labels, or the teacher's. Differentiable in ``weights``.
        """


@runtime_checkable
class FunctionTask(Task, Protocol):
    """A task whose networks are functions that can be compared by what they show."""

    def shown(self, weights: Stacked) -> Tensor:
        """What T stacked networks show, ``[T, F]``."""


@runtime_checkable
class ExampleTask(Task, Protocol):
    """Tasks with conditions that can be shown by labelled examples."""

    @property
    def example_classes(self) -> Sequence[str]:
        """What the classes of examples are called."""

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Of one example, of P values."""

    def examples(self, conditions: Tensor, classes: Tensor, rng: Generator, split: str = "train") -> Tensor:
        """Random examples of the classes ``[T, n]``, as each of T tasks ``[T, C]`` shows them: ``[T, n, P]``."""

    def inputs(self, examples: Tensor) -> Tensor:
        """Examples ``[…, P]`` as networks take them, ``[…, *example_shape]``."""


@runtime_checkable
class DescribedTask(Task, Protocol):
    """Tasks with conditions that can be described in words."""

    def describe(self, conditions: Tensor, rng: Generator, split: str = "train") -> list[str]:
        """A description of each of T tasks ``[T, C]``, phrases between commas, in any of many wordings.

        Those of ``validation`` and ``test`` are never taught.
        """


@runtime_checkable
class TaskSimulator(BehaviourTask, Protocol):
    """A family that can draw new tasks and knows their correct answers."""

    def draw_tasks(self, num: int, rng: Generator) -> Tensor:
        """Conditions of new tasks as the zoo has them, ``[num, C]``."""


@runtime_checkable
class LossTask(Task, Protocol):
    """A task with a differentiable loss of many networks at once."""

    def losses(
        self, weights: Stacked, split: str, num_images: int | None = None, rng: Generator | None = None
    ) -> Tensor:
        """Mean loss ``[T]`` of T stacked networks on a split's images, or ``num_images`` of them drawn by ``rng``."""

    def divergences(
        self, weights: Stacked, originals: Stacked, num_images: int, rng: Generator, noise: float = 0.0
    ) -> Tensor:
        """Mean Kullback-Leibler divergence ``[T]`` of the class probabilities of T networks from those of T originals.

        On ``num_images`` random training images, under noise of this deviation. Differentiable in ``weights``.
        """


@runtime_checkable
class TaskFamily(Task, Protocol):
    """Many tasks, each with a condition; a generator is tested on tasks that it was not trained on."""

    @property
    def condition(self) -> ConditionSpec:
        """What the conditions of the zoo's entries mean."""

    def splits(self) -> list[str]:
        """The split of every task: ``train``, ``validation`` or ``unseen``."""

    def scores(self, weights: Stacked, bits: Tensor, split: str = "test") -> Mapping[str, Tensor]:
        """Metrics by name ``[T]`` of T networks at their tasks ``[T, C]``; methods are compared by the first."""

    def accuracies(self, weights: Stacked, bits: Tensor, split: str = "test") -> Tensor:
        """The first metric of ``scores``, a share of right answers ``[T]``."""

    def untrained(self, zoo: Zoo, bits: Tensor) -> dict[str, Stacked]:
        """The initial weights of training for the tasks ``[T, C]``, by the name that reports give them."""


@runtime_checkable
class ImageTaskFamily(TaskFamily, BehaviourTask, Protocol):
    """Binary tasks over the classes of one labelled image set, all fine-tuned from one base network.

    Its ``behaviour_losses`` also take T other networks, ``originals``, in place of the teacher.
    """

    def collect(
        self,
        path: Path | str,
        *,
        progress: Callable[[int, int], None] | None = None,
        limit: int | None = None,
        processes: int | None = None,
    ) -> Zoo:
        """Train the base and every task's network, ``processes`` groups at a time (on a CPU one a core when None)."""

    def classes(self, split: str = "test") -> Tensor:
        """The classes of a split's images, int64 ``[B]``."""

    def targets(self, conditions: Tensor, split: str = "test") -> Tensor:
        """Right answers 0 or 1 of each task on a split's images: ``[T, C]`` → int64 ``[T, B]``."""

    def probabilities(self, weights: Stacked, split: str) -> Tensor:
        """Class probabilities ``[T, B, 2]`` of T stacked networks on a split's images."""

    def base_probabilities(self, zoo: Zoo, split: str = "test") -> Tensor:
        """Class probabilities ``[B, C]`` of the base network."""

    def base_network(self, zoo: Zoo) -> dict[str, Tensor]:
        """The base network's state dict, one logit a class. Raises InputError if the zoo has none."""


@runtime_checkable
class AdapterScorer(Protocol):
    """A task that scores one adapter on each of its tasks."""

    def score(self, adapter: Mapping[str, Tensor], split: str = "test") -> dict[str, dict[str, float]]:
        """Metrics by task and name of one adapter, under PEFT's names. Raises InputError if it does not fit."""


@runtime_checkable
class MetricsTask(Task, Protocol):
    """A single task with metrics of its own: AP50, mIoU, a distance of samples."""

    def own_metrics(self, network: Mapping[str, Tensor], split: str = "test") -> dict[str, float]:
        """Metrics by name of one network, the one that counts first; names with loss or error are better if small.

        Raises InputError if the network does not fit.
        """


@runtime_checkable
class SampleTask(Task, Protocol):
    """A single task whose networks draw samples, which are compared with held-out data."""

    def samples(self, network: Mapping[str, Tensor], num: int | None = None) -> Tensor:
        """``num`` images that a network draws from fixed noise, ``[num, channels, S, S]`` in 0 … 1.

        As many as the configuration says when None. Raises InputError if the network does not fit.
        """

    def images(self, split: str = "test") -> Tensor:
        """The images of a split, ``[B, channels, S, S]`` in 0 … 1."""


@runtime_checkable
class PartTask(Task, Protocol):
    """A task whose checkpoints may hold only a part of the network."""

    def part(self, network: nn.Module) -> Mapping[str, Tensor]:
        """What a checkpoint holds of ``network``, by its names. Raises InputError if there is no such part."""
