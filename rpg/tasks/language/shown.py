"""Rows as examples of a task: what the base expects at each place of a completion, beside what comes there.

A row is the mean, over its completion, of the outer product of two codes: that of the token which the base expects, and
that of the token which follows. B rows, K places, V vocabulary, D numbers of a code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpg.tasks.language.rows import IGNORED, Rows

CODE = 16
"""Most numbers of a code."""

ROWS_AT_ONCE = 256


class ShownRows:
    """Shows rows as the base sees them.

    Args:
        base: a causal language model. A token's code is its output embedding in the embeddings' leading principal
            components, all of unit variance: of a vocabulary of no more than D a rotation of one-hot codes.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        embeddings = self.base.get_output_embeddings().weight.detach().float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            components, _, _ = torch.pca_lowrank(embeddings, min(CODE, *embeddings.shape), niter=4)
        self.codes = components * len(components) ** 0.5  # [V, D]

    @property
    def size(self) -> int:
        """Numbers of a row, D²."""
        return self.codes.shape[1] ** 2

    @torch.inference_mode()
    def expected(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The base's probabilities ``[B, K, V]`` wherever any completion has a token, and what follows ``[B, K]``.

        Where a row itself has none, that is ``IGNORED``.
        """
        keep, device = rows.scored, self.codes.device
        logits = self.base(rows.ids.to(device), use_cache=False).logits[:, keep.to(device)]
        return logits.float().softmax(-1), rows.targets[:, keep].to(device)

    def __call__(self, rows: Rows) -> Tensor:
        """Rows as values, ``[B, D²]`` on the CPU."""
        found = []
        for first in range(0, len(rows), ROWS_AT_ONCE):
            probabilities, targets = self.expected(rows[first : first + ROWS_AT_ONCE])
            there = (targets != IGNORED).float()[..., None]
            pairs = (probabilities @ self.codes).mT @ (self.codes[targets.clamp(min=0)] * there)  # [B, D, D]
            found.append((pairs / there.sum(1, keepdim=True)).flatten(1).cpu())
        return torch.cat(found)
