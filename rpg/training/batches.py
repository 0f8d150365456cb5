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

from rpg.models.code_prior import CodePriorConfig
from rpg.models.recurrent_diffusion import Batch, CodeBatch, RecurrentDiffusion
from rpg.seeding import derive_seed, in_turns, make_rng, permutation
from rpg.training.data import InitialPairs, TrainingSet
from tokenization.errors import InputError
from tokenization.layouts import Layout, token_reader
from tokenization.zoo.condition import WITHHELD

MOST_ROUNDS = 3
"""Times that the generator goes on from its own networks, in training, at most."""


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
    """Draws the rows of each step from a training set.

    Args:
        data: its configuration says batch size and sampled tokens, and how conditions are dropped and withheld.
        rank, world_size: this process, of how many; the batch is split evenly among them.

    Raises:
        InputError: the batch cannot be split evenly.
    """

    def __init__(self, data: TrainingSet, layout: Layout, rank: int = 0, world_size: int = 1) -> None:
        config, zoo = data.config, data.zoo
        size, parts = config.train.batch_size, world_size * config.train.gradient_accumulation
        if size % parts:
            raise InputError(
                f"train.batch_size is {size}; make it a multiple of processes x gradient_accumulation = {parts}"
            )
        self.settings, self.condition, self.seed, self.layout = config.train, data.condition, config.seed, layout
        self.rank, self.world_size = rank, world_size
        self.indices, self.states, self.conditions = data.indices, data.states, data.conditions
        self.reader = token_reader(zoo, layout)
        self.tasks = data.tasks if zoo.condition is not None and zoo.condition.settings else None
        initial = config.model.initial
        self.initial = InitialPairs(zoo, self.indices, initial, config.seed) if initial is not None else None

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
