"""Scores of adapters on held-out rows, many adapters in one forward pass.

T adapters, B rows, S token positions, K scored positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.tasks.language.adapter_bank import AdapterBank
from rpg.tasks.language.rows import IGNORED, Rows, stack_rows
from rpg.tasks.side_by_side import Stacked

AdapterScores = dict[str, Tensor]
"""Figures by name, float64 ``[T]``: ``symbol_accuracy`` and ``exact_match`` (0 … 1), ``perplexity`` (1 …)."""


@torch.inference_mode()
def score_adapters(
    bank: AdapterBank, weights: Stacked, rows: Sequence[Rows], rows_at_once: int = 2048
) -> AdapterScores:
    """Score T adapters, each on its own rows (as many for all).

    *Exact match* is the share of rows whose completion and its end are what greedy decoding writes: that is so exactly
    when the most likely token is the right one at every position of the completion, given the right ones before it.
    *Symbol accuracy* is the share of right ones among the completions' tokens, their end left out. *Perplexity* is the
    exponential of the mean cross-entropy of these tokens, their end included.

    Args:
        bank: runs them.
        weights: ``[T, *shape]`` under PEFT's names.
        rows: of each adapter.
        rows_at_once: rows of all adapters together in a forward pass, to bound memory.
    """
    device = next(bank.base.parameters()).device
    num_adapters = max(1, rows_at_once // len(rows[0]))
    parts = []
    for first in range(0, len(rows), num_adapters):
        chosen = {name: value[first : first + num_adapters].to(device) for name, value in weights.items()}
        stacked = stack_rows(rows[first : first + num_adapters])
        size = max(1, rows_at_once // len(stacked))
        pieces = [
            _counts(bank, chosen, stacked[:, begin : begin + size], device)
            for begin in range(0, stacked.ids.shape[1], size)
        ]
        parts.append(torch.stack(pieces).sum(0))
    symbols, right, tokens, loss, exact, num_rows = torch.cat(parts).T
    return {
        "symbol_accuracy": right / symbols.clamp(min=1),
        "exact_match": exact / num_rows,
        "perplexity": (loss / tokens).exp(),
    }


def _counts(bank: AdapterBank, weights: Stacked, rows: Rows, device: torch.device) -> Tensor:
    """What the scores are made of, float64 ``[T, 6]`` on the CPU."""
    keep = rows.scored
    targets = rows.targets[..., keep].to(device)  # [T, B, K]
    logits = bank.logits(weights, rows.ids.to(device), keep.to(device))  # [T, B, K, V]
    wanted = targets != IGNORED
    symbols = wanted & (targets != rows.end)
    right = logits.argmax(-1) == targets
    exact = (right | ~wanted).all(-1)  # [T, B]
    sums = [
        symbols.sum((1, 2)),
        (right & symbols).sum((1, 2)),
        wanted.sum((1, 2)),
        token_losses(logits, targets).double().sum((1, 2)),
        exact.sum(1),
        torch.full_like(exact.sum(1), exact.shape[1]),
    ]
    return torch.stack([each.double() for each in sums], 1).cpu()


def completion_losses(bank: AdapterBank, weights: Stacked, rows: Rows) -> Tensor:
    """Mean cross-entropy of the completions' tokens ``[T]`` of T adapters, each on its own rows ``[T, B, S]``."""
    keep = rows.scored
    targets = rows.targets[..., keep]  # [T, B, K]
    losses = token_losses(bank.logits(weights, rows.ids, keep), targets)
    return losses.sum((1, 2)) / (targets != IGNORED).sum((1, 2))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every position ``[…, K, V]``, ``[…, K]`` → ``[…, K]``; 0 where there is no target."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)
