"""Examples as conditions: in every step, a few of each checkpoint's task are drawn and shown to the networks.

T tasks, n examples, P values of an example, K classes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from rpg.generation.generator import Generator
from rpg.generation.text_encoder import TextTable, phrases_of, sentence_encoder
from rpg.models.conditioning import ConditionConfig, example_rows, row_size
from rpg.models.recurrent_diffusion import Batch, CodeBatch, RecurrentDiffusion
from rpg.seeding import make_rng
from rpg.tasks import task_of
from rpg.tasks.base import DescribedTask, ExampleTask, TaskSimulator
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.zoo import Zoo

NUM_DESCRIPTIONS = 300
"""Descriptions of training tasks, at least, whose phrases a generator keeps."""

NUM_READ, PHRASE_NOISE = 128, 0.8
"""Descriptions that are read in a training step; noise on their phrases' vectors, of unit mean square."""


def example_conditions(zoo: Zoo, condition: ConditionConfig, seed: int = 0) -> ExampleConditions | None:
    """Turns conditions into examples or descriptions of the zoo's task; None for other kinds of conditions."""
    if condition.phrases:
        return Descriptions(zoo, task_of(zoo), condition, seed)
    return ExampleConditions(task_of(zoo), condition, seed) if condition.kind == "examples" else None


def fresh_codes(codes: CodeBatch, task: object, spec: ConditionSpec | None, rng: torch.Generator) -> CodeBatch:
    """The prior's batch with new tasks, drawn by their family, in place of the zoo's."""
    assert isinstance(task, TaskSimulator) and spec is not None
    tasks = task.draw_tasks(len(codes.noise), rng).to(codes.noise)
    return replace(codes, tasks=spec.inputs(tasks), conditions=tasks)


READER = "condition.reader."


def take_networks(network: RecurrentDiffusion, layout: Layout, run: str) -> None:
    """Take another run's networks but for what reads requests as settings, which alone is left to be trained.

    Raises:
        InputError: nothing reads requests, or the run's networks or zoo are others.
    """
    if getattr(network.condition, "reader", None) is None:
        raise InputError(
            "train.networks needs requests that are read as settings; set model.condition.read: true, or phrases"
        )
    other = Generator.from_pretrained(run)
    taken, own = ({name: value for name, value in each.state_dict().items() if not name.startswith(READER)}
                  for each in (other.network, network))  # fmt: skip
    means, wanted = (each.decode_batch(layout.mask.float()[None], constants=True) for each in (other.layout, layout))
    shapes, own_shapes = ({name: value.shape for name, value in each.items()} for each in (taken, own))
    same = shapes == own_shapes and means.keys() == wanted.keys()
    if not same or not all(torch.equal(value, wanted[name]) for name, value in means.items()):
        raise InputError(
            f"train.networks {run} has other networks, or learned from another zoo; give it the same zoo, tokens, "
            "backbone and denoiser"
        )
    network.load_state_dict(taken, strict=False)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(READER))


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
