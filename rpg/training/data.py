"""What a run learns from: checkpoints of a zoo and their conditions, as networks see them.

Where examples are the condition, a few of each checkpoint's task are drawn and shown to the networks in every step.
K checkpoints, L tokens of a checkpoint, D token width, C condition values; T tasks, n examples, P values of an example.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.generation.text_encoder import TextTable, phrases_of, sentence_encoder, text_table
from rpg.models import Network, build_network
from rpg.models.conditioning import ConditionConfig, InitialConfig, example_rows, row_size
from rpg.models.recurrent_diffusion import Batch, CodeBatch, RecurrentConfig, RecurrentDiffusion
from rpg.models.states import TaskTable
from rpg.seeding import make_rng
from rpg.tasks import task_of
from rpg.tasks.base import DescribedTask, ExampleTask, FunctionTask, TaskSimulator
from tokenization.errors import InputError
from tokenization.layouts import Layout, token_reader
from tokenization.zoo.condition import ConditionSpec, MetricScale
from tokenization.zoo.zoo import Zoo

MOST_PAIRS = 2048
"""Pairs by which the size of differences is measured."""

MOST_TOKEN_BYTES = 4 << 30
"""The most memory that the tokens of a whole zoo may take where they are needed at once."""

NUM_DESCRIPTIONS = 300
"""Descriptions of training tasks, at least, whose phrases a generator keeps."""

NUM_READ, PHRASE_NOISE = 128, 0.8
"""Descriptions that are read in a training step; noise on their phrases' vectors, of unit mean square."""


def training_entries(zoo: Zoo, splits: Sequence[str]) -> list[int]:
    """The entries of the zoo that are trained on, those of ``train.splits``, in its order."""
    return sorted(index for split in dict.fromkeys(splits) for index in zoo.subset(split))


def zoo_conditions(zoo: Zoo, indices: Sequence[int]) -> Tensor:
    """The conditions of checkpoints in the zoo's form, ``[K, C]``."""
    return torch.tensor([zoo.entries[index].condition for index in indices])


class TrainingSet:
    """The checkpoints of a zoo that a run learns from, and their conditions as networks see them.

    Attributes:
        indices: the entries of ``train.splits``, K of them.
    """

    def __init__(self, zoo: Zoo, config: Config) -> None:
        self.zoo, self.config, self.condition = zoo, config, config.model.condition
        self.indices = training_entries(zoo, config.train.splits)

    def __len__(self) -> int:
        return len(self.indices)

    def check(self) -> None:
        """Raise InputError unless there are checkpoints, and conditions of the configured kind."""
        zoo, wanted = self.zoo, self.condition.kind
        if not self.indices:
            raise InputError(f"{zoo.path} has no checkpoint to train on; fill it with `rpg collect`")
        described = self.condition.phrases and isinstance(self.config.model, RecurrentConfig)
        if described or wanted in ("none", "metric", "examples"):  # looked for where they are read
            return
        found = zoo.condition.kind if zoo.condition else "none"
        if found != wanted:
            raise InputError(
                f"{zoo.path} has conditions of kind {found}, but model.condition.kind is {wanted}; set it to {found}"
            )

    @cached_property
    def tasks(self) -> Tensor:
        """The checkpoints' conditions in the zoo's form, ``[K, C]``."""
        return zoo_conditions(self.zoo, self.indices)

    @cached_property
    def scale(self) -> MetricScale | None:
        """The scale of the metric that is conditioned on, if one is. Raises InputError as `MetricScale.of_values`."""
        if (name := self.condition.name) is None:
            return None
        values = self.zoo.metric_values(self.indices, name)
        return MetricScale.of_values(name, values, self.condition.scale == "log", self.zoo.path)

    @cached_property
    def examples(self) -> ExampleConditions | None:
        """What turns conditions into examples or descriptions of the zoo's task, where these are the condition."""
        condition, seed = self.condition, self.config.seed
        if condition.phrases:
            return Descriptions(self.zoo, task_of(self.zoo), condition, seed)
        return ExampleConditions(task_of(self.zoo), condition, seed) if condition.kind == "examples" else None

    @cached_property
    def conditions(self) -> Tensor | None:
        """The condition of every checkpoint, ``[K, C]``; None without one. Raises as `text_table`."""
        if self.condition.kind == "none":
            return None
        if self.scale is not None:
            values = self.zoo.metric_values(self.indices, self.scale.name)
            return self.scale.scaled(torch.tensor(values))[:, None]
        if self.condition.kind == "examples" or self.condition.phrases:  # of which examples are shown in every step
            return self.tasks
        if self.condition.kind == "text":
            return text_table(self.zoo, self.condition.encoder).conditions[self.tasks[:, 0].long()]
        return self.zoo.condition.inputs(self.tasks) if self.zoo.condition is not None else self.tasks

    @property
    def condition_size(self) -> int:
        """How many values a condition has for the networks; of classes, how many there are; 0 without conditions."""
        if self.condition.kind == "metric":
            return 1
        if self.examples is not None:
            return self.examples.num_inputs
        if self.zoo.condition is None or self.condition.kind == "none":
            return 0
        if self.condition.kind == "text":
            return text_table(self.zoo, self.condition.encoder).vectors.shape[1]
        return self.zoo.condition.num_inputs

    @cached_property
    def states(self) -> Tensor:
        """The permutation state of every checkpoint, ``[K]`` long."""
        of = self.config.model.state.of
        if of in ("checkpoint", "code", "task"):
            return torch.arange(len(self))
        if of == "run":
            runs = {run: i for i, run in enumerate(dict.fromkeys(self.zoo.entries[i].run for i in self.indices))}
            return torch.tensor([runs[self.zoo.entries[index].run] for index in self.indices])
        return torch.zeros(len(self), dtype=torch.long)

    @property
    def num_states(self) -> int:
        """How many permutation states there are, one at least."""
        return int(self.states.max()) + 1 if len(self) else 1

    def digest(self, layout: Layout) -> str:
        """A digest of what is learned: the checkpoints' digests and labels, and the layers."""
        trained = [self.zoo.entries[index] for index in self.indices]
        entries = [(entry.sha256, entry.run, entry.step, entry.condition) for entry in trained]
        layers = [(layer.name, layer.num_values) for layer in layout.layers]
        return hashlib.sha256(json.dumps([entries, layers]).encode()).hexdigest()

    def tokens(self, layout: Layout) -> Tensor:
        """The checkpoints' tokens, ``[K, L, D]``. Raises InputError where they are too many for memory."""
        if 4 * len(self) * layout.num_tokens * layout.token_size > MOST_TOKEN_BYTES:
            raise InputError(
                f"The {len(self)} checkpoints of {self.zoo.path} have {layout.num_tokens:,} tokens of "
                f"{layout.token_size:,} values, too many to fit codes or a regression to in memory; set tokens.rank."
            )
        return token_reader(self.zoo, layout).read(self.indices, range(layout.num_tokens))

    def build_network(self, layout: Layout) -> Network:
        """The untrained networks, initialised from the seed."""
        size = self.condition_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return build_network(self.config.model, layout, self.num_states, size)

    def fit_closed_form(self, network: RecurrentDiffusion, layout: Layout) -> None:
        """Fit the model's closed-form part, if it has one, to the checkpoints."""
        config = self.config
        if isinstance(network.state, TaskTable):
            network.state.measure(self._task_numbers(network.state.embedding_dim))
        if config.model.initial is not None:
            network.fit_initial(self._differences(layout, config.model.initial))
        elif network.centre is not None:
            tokens = self.tokens(layout)
            shown = self._shown(tokens, layout) if config.model.state.shown else None
            network.fit_centre(tokens, self.conditions, layout.token_weight, shown)

    def _task_numbers(self, width: int) -> Tensor:
        """The task features of the checkpoints, ``[K, width]``. Raises InputError if they are not ``width`` wide."""
        condition = self.zoo.condition
        if condition is None or condition.kind not in ("vector", "binary"):
            where = self.zoo.path
            raise InputError(f"model.state.of: task needs a zoo whose conditions are numbers, which {where} has not")
        numbers = condition.inputs(self.tasks)
        if numbers.shape[1] != width:
            raise InputError(f"model.state.width is {width}, but tasks have {numbers.shape[1]} numbers; set it to that")
        return numbers

    def _differences(self, layout: Layout, config: InitialConfig) -> Tensor:
        """Differences ``[n, L, D]`` of the tokens of some checkpoints from their starts."""
        pairs = InitialPairs(self.zoo, self.indices, config, self.config.seed)
        places = range(0, len(self), max(1, len(self) // MOST_PAIRS))
        starts, reader = [pairs.draw(place, -1, place) for place in places], token_reader(self.zoo, layout)
        later, earlier = (
            reader.read([self.indices[place] for place in some], range(layout.num_tokens)) for some in (places, starts)
        )
        return later - earlier

    def _shown(self, tokens: Tensor, layout: Layout) -> Tensor:
        """What checkpoints ``[K, L, D]`` show, ``[K, F]``."""
        task = task_of(self.zoo, self.config.task)
        if not isinstance(task, FunctionTask):
            raise InputError(
                f"{type(task).__name__} has no networks that show something; set model.state.shown to false, or choose "
                "the task fields"
            )
        return task.shown(layout.decode_batch(tokens, constants=True))

    def generator(self, layout: Layout, network: Network, facts: dict[str, Any]) -> Generator:
        """The generator of trained networks; ``facts`` of the training are for its model card."""
        examples, scale = self.examples, self.scale
        condition = examples.spec if examples is not None else self.zoo.condition if scale is None else scale.condition
        texts = examples.table if isinstance(examples, Descriptions) else None
        return Generator(self.config, layout, network, condition, facts, texts=texts, metric=scale)


class InitialPairs:
    """Draws a start for a training checkpoint, one of ``indices``; ``run`` and ``step`` say what is earlier.

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


class ExampleConditions:
    """Replaces the zoo's conditions by examples of the tasks.

    Raises:
        InputError: the task shows none, or of another number of classes.
    """

    def __init__(self, task: object, config: ConditionConfig, seed: int) -> None:
        if not isinstance(task, ExampleTask):
            raise InputError(
                f"model.condition.kind: examples needs a task that shows examples, which {type(task).__name__} does "
                "not; choose sensors"
            )
        if config.classes != (num := len(task.example_classes)):
            raise InputError(f"model.condition.classes is {config.classes}, but the task has {num}; set it to that")
        self.task, self.config, self.seed = task, config, seed

    @property
    def num_inputs(self) -> int:
        """How many numbers networks see of an example."""
        return self.spec.size

    @property
    def spec(self) -> ConditionSpec:
        """What a generator's conditions are."""
        size = row_size(math.prod(self.task.example_shape), self.config.classes)
        return ConditionSpec("examples", size, tuple(self.task.example_classes))

    def __call__(self, batch: Batch, step: int, number: int) -> Batch:
        """The batch as the networks see it: its conditions ``[G, C]`` become sets ``[G, n · size]``.

        ``number`` says which part of the step it is, over all processes.
        """
        assert batch.conditions is not None
        rng = make_rng(self.seed, "examples", step, number)
        codes = None if batch.codes is None else self.shown(batch.codes, rng)
        return replace(batch, conditions=self.draw(batch.conditions, rng), codes=codes)

    def shown(self, codes: CodeBatch, rng: torch.Generator) -> CodeBatch:
        """The prior's batch as the networks see it."""
        return codes if codes.conditions is None else replace(codes, conditions=self.draw(codes.conditions, rng))

    def draw(self, tasks: Tensor, rng: torch.Generator) -> Tensor:
        """Sets of training examples of the tasks ``[T, C]``, one of ``counts`` of each: ``[T, n · size]``."""
        num, num_classes = len(tasks), self.config.classes
        counts = torch.tensor(self.config.counts)[torch.randint(len(self.config.counts), (num, 1), generator=rng)]
        places = torch.arange(int(counts.max()))
        any_classes = torch.randint(num_classes, (num, len(places)), generator=rng)
        in_turn = (places % num_classes).expand(num, -1)
        classes = torch.where(counts < num_classes, any_classes, in_turn)  # [T, n]
        values = self.task.examples(tasks.cpu(), classes, rng)
        told = torch.rand(num, 1, generator=rng) < self.config.labelled
        rows = example_rows(values, torch.where(told, classes, -1), num_classes)
        return (rows * (places < counts)[..., None]).flatten(1).to(tasks.device)


class Descriptions(ExampleConditions):
    """Words for tasks of settings. Networks are taught by the settings' features, a reader to tell these from words.

    The phrases of the zoo's training tasks, in one wording each, are the generator's table of texts.

    Raises:
        InputError: the task has no words for its conditions, or the encoder cannot be loaded.
    """

    def __init__(self, zoo: Zoo, task: object, config: ConditionConfig, seed: int) -> None:
        if not isinstance(task, DescribedTask) or zoo.condition is None:
            raise InputError(
                f"model.condition.phrases needs a task that describes its conditions, which {type(task).__name__} does "
                "not; choose sensors"
            )
        if config.features != zoo.condition.num_inputs:
            raise InputError(
                f"model.condition.features is {config.features}, but the settings have {zoo.condition.num_inputs}; set "
                "it to that"
            )
        self.task, self.config, self.seed, self.settings = task, config, seed, zoo.condition  # type: ignore[assignment]
        self.known = torch.tensor([entry.condition for entry in zoo.entries if entry.split == "train"])
        self.table = _phrase_table(self.known, task, config)

    @property
    def num_inputs(self) -> int:
        """How many numbers networks see of a phrase."""
        return self.table.num_inputs

    @property
    def spec(self) -> ConditionSpec:
        """What a generator's conditions are."""
        return ConditionSpec("text", len(self.table.texts), self.table.texts)

    def draw(self, tasks: Tensor, rng: torch.Generator) -> Tensor:
        """The features ``[T, F]`` of the tasks ``[T, C]``, which a description is read as."""
        return self.settings.inputs(tasks)

    def describe(self, tasks: Tensor, rng: torch.Generator, split: str = "train") -> list[str]:
        """The tasks ``[T, C]`` in words of a split."""
        return self.task.describe(tasks.cpu(), rng, split)  # type: ignore[attr-defined]

    def reading_loss(self, reader: nn.Module, step: int, fresh: bool) -> Tensor:
        """Mean squared error of the features that are read in taught wordings of fresh tasks, or of the zoo's.

        Noise on the phrases' vectors lets wordings be read that lie near the taught ones.
        """
        rng = make_rng(self.seed, "descriptions", step)
        if fresh and isinstance(self.task, TaskSimulator):
            tasks = self.task.draw_tasks(NUM_READ, rng)
        else:
            tasks = self.known[torch.randint(len(self.known), (NUM_READ,), generator=rng)]
        rows = self.table.conditions_of(self.describe(tasks, rng)).unflatten(1, (-1, self.num_inputs))
        noise = PHRASE_NOISE * torch.randn(rows.shape, generator=rng) * rows[..., -1:]
        noise[..., -1] = 0
        device = next(reader.parameters()).device
        read = reader((rows + noise).flatten(1).to(device)).float()
        return (read - self.settings.inputs(tasks).to(device)).square().mean()


def _phrase_table(tasks: Tensor, task: DescribedTask, config: ConditionConfig) -> TextTable:
    if not config.encoder:
        raise InputError("model.condition.encoder is empty; name wordllama, or a sentence encoder for transformers")
    texts = task.describe(tasks.repeat(-(-NUM_DESCRIPTIONS // len(tasks)), 1), make_rng(0, "phrases"))
    phrases = tuple(dict.fromkeys(phrase for text in texts for phrase in phrases_of(text)))
    encoder = sentence_encoder(config.encoder, "model.condition.encoder")
    return TextTable(config.encoder, encoder.fingerprint, phrases, encoder.vectors(phrases), config.phrases)
