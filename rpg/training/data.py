"""Which token rows a training step sees: decided by (seed, step) alone, so that a resumed run, and a run
on another number of processes, sees the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.generation.text_encoder import text_table
from rpg.models.code_prior import CodePriorConfig
from rpg.models.conditioning import ConditionConfig, InitialConfig, StateConfig
from rpg.models.recurrent_diffusion import Batch, CodeBatch, RecurrentDiffusion
from rpg.seeding import derive_seed, in_turns, make_rng, permutation
from rpg.training.requests import example_conditions
from tokenization.errors import InputError
from tokenization.layouts import Layout, token_reader
from tokenization.zoo.condition import WITHHELD
from tokenization.zoo.metric import MetricScale, metric_conditions
from tokenization.zoo.zoo import Zoo

MOST_ROUNDS = 3
"""Times that the generator goes on from its own networks, in training, at most."""

MOST_PAIRS = 2048
"""Pairs by which the size of differences is measured."""


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


@torch.no_grad()
def with_own_initial(network: RecurrentDiffusion, batch: Batch, mask: Tensor, rng: torch.Generator) -> Batch:
    """The batch with a share of its initial weights (``model.initial.own``) replaced by networks made of them.

    They are made in one to three rounds, each of which goes on from the last. A round asks for the example's own
    condition or, in half of the cases, for something between it and 1: of a loss, for less improvement.

    Args:
        network: as it is now.
        batch: of which ``initial`` and ``conditions`` are given.
        mask: ``[L, D]``, 1 where a token holds values.
        rng: on the CPU; draws rows, rounds, what is asked for, and noise.
    """
    assert network.config.initial is not None and batch.initial is not None and batch.conditions is not None
    initial, conditions = batch.initial.clone(), batch.conditions
    num = round(network.config.initial.own * len(initial))
    rows = torch.randperm(len(initial), generator=rng)[:num].to(initial.device)
    for _ in range(int(torch.randint(1, MOST_ROUNDS + 1, (), generator=rng)) if num else 0):
        less = (torch.rand(num, 1, generator=rng) * (torch.rand(num, 1, generator=rng) < 0.5)).to(conditions)
        asked = conditions[rows] + less * (1 - conditions[rows])
        noise = torch.randn(num, *mask.shape, generator=rng).to(initial)
        initial[rows] = network.one_step(noise, mask, None, asked, initial[rows])
    return replace(batch, initial=initial)


def sample_differences(
    zoo: Zoo, layout: Layout, indices: Sequence[int], config: InitialConfig, seed: int
) -> torch.Tensor:
    """Differences ``[n, L, D]`` of the tokens of some training checkpoints from their starts."""
    pairs, reader = InitialPairs(zoo, indices, config, seed), token_reader(zoo, layout)
    places = range(0, len(indices), max(1, len(indices) // MOST_PAIRS))
    starts = [pairs.draw(place, -1, place) for place in places]
    later, earlier = (
        reader.read([indices[place] for place in some], range(layout.num_tokens)) for some in (places, starts)
    )
    return later - earlier


MOST_TOKEN_BYTES = 4 << 30
"""The most memory that the tokens of a whole zoo may take where they are needed at once."""


@dataclass(frozen=True)
class Rows:
    """A process's share of one step's data, on the CPU (shapes as in :class:`rpg.models.recurrent_diffusion.Batch`).

    ``seeds`` are of the examples' noise and times, ``group_seeds`` of the noise on each group's permutation state.
    """

    samples: Tensor
    mask: Tensor
    token_ids: Tensor
    group: Tensor
    states: Tensor
    conditions: Tensor | None
    dropped: Tensor | None
    initial: Tensor | None
    tasks: Tensor | None
    seeds: list[int]
    group_seeds: list[int]


class BatchSampler:
    """Draws the rows of each step from a zoo.

    Args:
        config: says splits, batch size and sampled tokens, what a permutation state is, and how conditions are dropped
            and withheld.
        rank, world_size: this process, of how many; the batch is split evenly among them.

    Raises:
        InputError: the batch cannot be split evenly.
    """

    def __init__(self, zoo: Zoo, layout: Layout, config: Config, rank: int = 0, world_size: int = 1) -> None:
        model, seed = config.model, config.seed
        self.settings, self.condition, self.seed, self.layout = config.train, model.condition, seed, layout
        self.indices = training_entries(zoo, config.train.splits)
        self.rank, self.world_size = rank, world_size
        self.reader = token_reader(zoo, layout)
        self.states = state_ids(zoo, self.indices, model.state)
        self.conditions = training_conditions(zoo, self.indices, model.condition)
        self.tasks = zoo_conditions(zoo, self.indices) if zoo.condition is not None and zoo.condition.settings else None
        self.initial = InitialPairs(zoo, self.indices, model.initial, seed) if model.initial is not None else None

    def __len__(self) -> int:
        return len(self.indices)

    def examples(self, step: int) -> list[int]:
        """Places in ``indices`` of the whole batch of ``step``: epoch after epoch, each in its own random order."""
        size = self.settings.batch_size
        return in_turns(range(step * size, (step + 1) * size), len(self.indices), self.seed, "epoch")

    def token_ids(self, step: int) -> Tensor:
        """The sampled tokens of ``step``, ``[N]`` ascending; all of them when the config says so."""
        total, wanted = self.layout.num_tokens, self.settings.tokens
        if wanted is None or wanted >= total:
            return torch.arange(total)
        return permutation(total, self.seed, "tokens", step)[:wanted].sort().values

    def load(self, step: int, part: int = 0) -> Rows:
        """Read part ``part`` (of ``gradient_accumulation``) of this process's share of ``step``."""
        share = self.settings.batch_size // self.world_size // self.settings.gradient_accumulation
        first = (self.rank * self.settings.gradient_accumulation + part) * share
        chosen = self.examples(step)[first : first + share]
        token_ids = self.token_ids(step)
        seeds = [derive_seed(self.seed, "example", step, first + i) for i in range(share)]
        samples = self.reader.read([self.indices[place] for place in chosen], token_ids)
        keys = [
            (int(self.states[place]), self._condition(place, step, first + i), self._dropped(step, first + i), start)
            for i, (place, start) in enumerate(zip(chosen, self._initial(chosen, step, first), strict=True))
        ]
        distinct = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        has_condition = self.conditions is not None
        return Rows(
            samples=samples,
            mask=self.layout.mask_rows(token_ids).float(),
            token_ids=token_ids,
            group=torch.tensor([distinct[key] for key in keys]),
            states=torch.tensor([key[0] for key in distinct]),
            conditions=torch.tensor([key[1] for key in distinct]) if has_condition else None,
            dropped=torch.tensor([key[2] for key in distinct]) if has_condition else None,
            initial=self._read_initial([key[3] for key in distinct]),
            tasks=None if self.tasks is None else self.tasks[[chosen[keys.index(key)] for key in distinct]],
            seeds=seeds,
            group_seeds=[derive_seed(self.seed, "state", step, repr(key[:3])) for key in distinct],
        )

    def number(self, part: int) -> int:
        """Which part of a step ``part`` of this process is, over all processes."""
        return self.rank * self.settings.gradient_accumulation + part

    def codes(self, step: int, prior: CodePriorConfig, size: int, part: int, device: torch.device) -> CodeBatch:
        """What the prior over codes of ``size`` values sees in part ``part`` of this process's share of ``step``."""
        rng = make_rng(self.seed, "codes", step, self.number(part))
        num = max(1, prior.batch_size // (self.world_size * self.settings.gradient_accumulation))
        places = torch.randint(len(self.indices), (num,), generator=rng)
        noise = torch.randn(num, size, generator=rng)
        time = torch.sigmoid(torch.randn(num, generator=rng))  # logit-normal (arXiv 2403.03206)
        conditions = None if self.conditions is None else self.conditions[places].to(device)
        return CodeBatch(places.to(device), noise.to(device), time.to(device), conditions)

    def _initial(self, chosen: Sequence[int], step: int, first: int) -> list[int]:
        """The place of each example's start; -1 where there are none."""
        if self.initial is None:
            return [-1] * len(chosen)
        return [self.initial.draw(place, step, first + i) for i, place in enumerate(chosen)]

    def _read_initial(self, starts: Sequence[int]) -> Tensor | None:
        if self.initial is None:
            return None
        return self.reader.read([self.indices[place] for place in starts], range(self.layout.num_tokens))

    def _condition(self, place: int, step: int, example: int) -> tuple[float, ...]:
        if self.conditions is None:
            return ()
        condition, rate = self.conditions[place], self.condition.withhold
        if rate > 0:
            rng = make_rng(self.seed, "withhold", step, example)
            condition = condition.masked_fill(torch.rand(len(condition), generator=rng) < rate, WITHHELD)
        return tuple(condition.tolist())

    def _dropped(self, step: int, example: int) -> bool:
        rate = self.condition.dropout
        return rate > 0 and float(torch.rand((), generator=make_rng(self.seed, "drop", step, example))) < rate

    def prefetch(self, first_step: int, last_step: int) -> Iterator[tuple[int, list[Rows] | list[None]]]:
        """Yield ``(step, parts)`` for each step; the next step is read while the caller computes.

        Parts are None where no checkpoint is imitated.
        """
        parts = range(self.settings.gradient_accumulation)
        if not self.settings.imitation:
            yield from ((step, [None] * len(parts)) for step in range(first_step, last_step))
            return

        def read(step: int) -> list[Rows]:
            return [self.load(step, part) for part in parts]

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(read, first_step) if first_step < last_step else None
            for step in range(first_step, last_step):
                assert future is not None
                rows = future.result()
                future = pool.submit(read, step + 1) if step + 1 < last_step else None
                yield step, rows


def check_split(batch_size: int, world_size: int, accumulation: int) -> None:
    """Raise InputError if the processes cannot share a batch evenly."""
    parts = world_size * accumulation
    if batch_size % parts:
        raise InputError(
            f"train.batch_size is {batch_size}; make it a multiple of processes x gradient_accumulation = {parts}"
        )


def check_zoo(zoo: Zoo, splits: Sequence[str], wanted: str) -> None:
    """Raise InputError unless the zoo has checkpoints and conditions of the kind ``wanted``."""
    if not training_entries(zoo, splits):
        raise InputError(f"{zoo.path} has no checkpoint to train on; fill it with `rpg collect`")
    if wanted in ("none", "metric", "examples"):  # looked for where they are read
        return
    found = zoo.condition.kind if zoo.condition else "none"
    if found != wanted:
        raise InputError(
            f"{zoo.path} has conditions of kind {found}, but model.condition.kind is {wanted}; set it to {found}"
        )


def training_entries(zoo: Zoo, splits: Sequence[str]) -> list[int]:
    """The entries of the zoo that are trained on, those of ``train.splits``, in its order."""
    return sorted(index for split in dict.fromkeys(splits) for index in zoo.subset(split))


def training_conditions(zoo: Zoo, indices: Sequence[int], condition: ConditionConfig) -> Tensor | None:
    """The condition of every training checkpoint, ``[K, C]``; None without one. Raises as `text_table` does."""
    if condition.kind == "none":
        return None
    if (scale := metric_scale(zoo, indices, condition)) is not None:
        return metric_conditions(zoo, indices, scale)
    conditions = zoo_conditions(zoo, indices)
    if condition.kind == "examples" or condition.phrases:  # of which examples are shown in every step
        return conditions
    if condition.kind == "text":
        return text_table(zoo, condition.encoder).conditions[conditions[:, 0].long()]
    return zoo.condition.inputs(conditions) if zoo.condition is not None else conditions


def zoo_conditions(zoo: Zoo, indices: Sequence[int]) -> Tensor:
    """The conditions of checkpoints in the zoo's form, ``[K, C]``."""
    return torch.tensor([zoo.entries[index].condition for index in indices])


def task_numbers(zoo: Zoo, indices: Sequence[int], width: int) -> Tensor:
    """The task features of checkpoints, ``[K, width]``. Raises InputError if they are not ``width`` wide."""
    if zoo.condition is None or zoo.condition.kind not in ("vector", "binary"):
        raise InputError(f"model.state.of: task needs a zoo whose conditions are numbers, which {zoo.path} has not")
    numbers = zoo.condition.inputs(zoo_conditions(zoo, indices))
    if numbers.shape[1] != width:
        raise InputError(f"model.state.width is {width}, but tasks have {numbers.shape[1]} numbers; set it to that")
    return numbers


def metric_scale(zoo: Zoo, indices: Sequence[int], condition: ConditionConfig) -> MetricScale | None:
    """The scale of the metric that is conditioned on, if one is. Raises InputError as `MetricScale.of_zoo` does."""
    if condition.name is None:
        return None
    return MetricScale.of_zoo(zoo, indices, condition.name, condition.scale == "log")


def condition_size(zoo: Zoo, condition: ConditionConfig) -> int:
    """How many values a condition is to the networks (for ``class``: classes); 0 without. Raises as `text_table`."""
    if condition.kind == "metric":
        return 1
    if (examples := example_conditions(zoo, condition)) is not None:
        return examples.num_inputs
    if zoo.condition is None or condition.kind == "none":
        return 0
    if condition.kind == "text":
        return text_table(zoo, condition.encoder).vectors.shape[1]
    return zoo.condition.num_inputs


def state_ids(zoo: Zoo, indices: Sequence[int], state: StateConfig) -> Tensor:
    """The permutation state of every training checkpoint, ``[K]`` long."""
    if state.of in ("checkpoint", "code", "task"):
        return torch.arange(len(indices))
    if state.of == "run":
        runs = {run: i for i, run in enumerate(dict.fromkeys(zoo.entries[index].run for index in indices))}
        return torch.tensor([runs[zoo.entries[index].run] for index in indices])
    return torch.zeros(len(indices), dtype=torch.long)


def all_tokens(zoo: Zoo, layout: Layout, indices: Sequence[int]) -> torch.Tensor:
    """The tokens of checkpoints, ``[n, L, D]``. Raises InputError where they are too many for memory."""
    if 4 * len(indices) * layout.num_tokens * layout.token_size > MOST_TOKEN_BYTES:
        raise InputError(
            f"The {len(indices)} checkpoints of {zoo.path} have {layout.num_tokens:,} tokens of {layout.token_size:,} "
            "values, too many to fit codes or a regression to in memory; set tokens.rank."
        )
    return token_reader(zoo, layout).read(indices, range(layout.num_tokens))


def to_batch(rows: Rows, objective, device: torch.device, num_last: int = 0, codes: CodeBatch | None = None) -> Batch:
    """Move rows to ``device`` and draw each example's noise and times there, from its own seed.

    The tokens of the first ``num_last`` examples are all at the objective's last time.
    """
    num_examples, num_sampled, width = rows.samples.shape
    noise = torch.empty(num_examples, num_sampled, width, device=device)
    times = []
    for i, seed in enumerate(rows.seeds):
        rng = torch.Generator(device).manual_seed(seed)
        times.append(objective.sample_time(num_sampled, rng, device))
        noise[i].normal_(generator=rng)
    for each in times[:num_last]:
        each.fill_(objective.last_time)

    tensors = {name: value for name, value in vars(rows).items() if name not in ("seeds", "group_seeds")}
    moved: Any = {
        name: None if value is None else value.to(device, non_blocking=True) for name, value in tensors.items()
    }
    return Batch(time=torch.stack(times), noise=noise, num_last=num_last, codes=codes, **moved)
