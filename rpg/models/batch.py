"""Inputs and outputs of a training step of recurrent diffusion.

B examples, G distinct (state, condition, start) groups, L tokens of a checkpoint, N sampled tokens, D token width, S
permutation-state width, C condition values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One training step's data, on the model's device."""

    samples: Tensor  # [B, N, D] normalised tokens x0, padding 0
    mask: Tensor  # [N, D] 1 where a token holds values
    token_ids: Tensor  # [N] long
    time: Tensor  # [B, N] the objective's unit
    noise: Tensor  # [B, N, D]
    group: Tensor  # [B] long, each example's row of states, conditions and dropped
    states: Tensor  # [G] long
    conditions: Tensor | None  # [G, C]
    dropped: Tensor | None  # [G] bool: the condition is withheld
    initial: Tensor | None = None  # [G, L, D] tokens of the checkpoints to go on from
    num_last: int = 0  # how many of the first examples have all their tokens at the last time
    codes: CodeBatch | None = None  # of the prior over codes
    tasks: Tensor | None = None  # [G, C] the zoo's own conditions, where networks see something else


@dataclass(frozen=True)
class CodeBatch:
    """One step's data of the prior over codes: P checkpoints of its own choice."""

    states: Tensor  # [P] long: of checkpoints
    noise: Tensor  # [P, S]
    time: Tensor  # [P] in 0 … 1
    conditions: Tensor | None  # [P, C]
    tasks: Tensor | None = None  # [P, S] what new tasks are, in place of checkpoints


class Loss(NamedTuple):
    """The mean loss of a batch, and each sampled token's share of it (detached, ``[N]``).

    ``samples`` ``[num_last, N, D]`` are the predicted x₀ of the examples at the last time, if there are any. (A tuple,
    since what spreads weights over processes looks for the forward pass's tensors in tuples, and not in data classes.)
    """

    mean: Tensor
    per_token: Tensor
    samples: Tensor | None = None
