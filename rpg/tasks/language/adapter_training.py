"""Fine-tuning adapters, one PEFT model at a time or many side by side on one base, and rows as examples of a task.

Both ways see the same rows in the same order and give the same weights; for small bases the second is many times
faster.

A row is shown as the mean, over its completion, of the outer product of two codes: that of the token which the base
expects, and that of the token which follows.
T tasks, B rows, S token positions, K places of a completion, V vocabulary, D numbers of a code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rpg.tasks.collecting import descend, warm_cosine
from rpg.tasks.images.training import average_into, checkpoint_stretches
from rpg.tasks.language.adapter_bank import (
    AdapterBank,
    adapter_state,
    completion_losses,
    peft_on,
    score_adapters,
    token_losses,
)
from rpg.tasks.language.config import AdapterTraining
from rpg.tasks.language.rows import IGNORED, Rows
from rpg.tasks.side_by_side import Stacked

if TYPE_CHECKING:
    from peft import LoraConfig

Draw = Callable[[], Rows]
"""The next training rows of T tasks, ``[T, B, S]``."""


def train_side_by_side(
    bank: AdapterBank, start: Stacked, draw: Draw, config: AdapterTraining, check: Sequence[Rows] = ()
) -> list[Stacked]:
    """Train T adapters at once from ``start``, under PEFT's names; ``config.checkpoints`` of each, by their steps.

    With ``config.until``, ``check`` are validation rows of each.
    """
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    return _train(
        list(weights.values()), config, len(check),
        loss=lambda: completion_losses(bank, weights, draw()).sum(),
        now=lambda: weights,
        exact_match=lambda: score_adapters(bank, weights, check)["exact_match"],
    )  # fmt: skip


def train_one(
    base: nn.Module, adapter: LoraConfig, start: Mapping[str, Tensor], draw: Draw, config: AdapterTraining,
    check: Sequence[Rows] = (),
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Train one adapter by PEFT alone, in the base's own precision; returns what ``train_side_by_side`` does of one."""
    from peft import set_peft_model_state_dict

    with peft_on(base, adapter) as adapted:

        def loss() -> Tensor:
            rows = draw()
            logits = adapted(rows.ids[0], use_cache=False).logits
            return token_losses(logits, rows.targets[0]).sum() / (rows.targets != IGNORED).sum()

        set_peft_model_state_dict(adapted, dict(start))
        if config.gradient_checkpointing:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        adapted.train()
        kept = _train(
            [parameter for parameter in adapted.parameters() if parameter.requires_grad], config, len(check), loss=loss,
            now=lambda: {name: value[None] for name, value in adapter_state(adapted).items()},
            exact_match=lambda: _exact_match(adapted, check[0], config.batch_size)[None],
        )  # fmt: skip
        adapted.eval()
        if config.gradient_checkpointing:
            adapted.gradient_checkpointing_disable()
    return [{name: value[0] for name, value in each.items()} for each in kept]


def _train(
    parameters: list[Any], config: AdapterTraining, num: int, *, loss: Callable[[], Tensor],
    now: Callable[[], Stacked], exact_match: Callable[[], Tensor],
) -> list[Stacked]:  # fmt: skip
    """Train the parameters of T adapters by the ``loss`` of fresh rows.

    Args:
        num: adapters whose ``exact_match`` on validation rows ``[T]`` ends training, with ``config.until``.
        now: the adapters as they are, ``[T, *shape]``.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
    )
    stretches = checkpoint_stretches(config.steps, config.tail, config.checkpoints)
    kept: list[Stacked] = []
    stopper = _Stopper(config, num)
    for step in range(config.steps):
        descend(optimizer, loss(), config.learning_rate * warm_cosine(step, config.steps))
        if config.until is None and step + 1 > stretches[0][0]:
            average_into(kept, stretches, step + 1, now())
        elif config.until is not None and stopper.looks(step) and stopper.take(now(), exact_match()):
            break
    return kept if config.until is None else [stopper.kept]


class _Stopper:
    """Keeps every adapter at the step at which it first reached ``config.until``, else at the end."""

    def __init__(self, config: AdapterTraining, num: int) -> None:
        self.config = config
        self.done = torch.zeros(num, dtype=torch.bool)
        self.kept: Stacked = {}

    def looks(self, step: int) -> bool:
        """Whether the adapters are looked at after ``step``."""
        return (step + 1) % self.config.check_every == 0 or step + 1 == self.config.steps

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor], exact_match: Tensor) -> bool:
        """Look at them, ``exact_match`` ``[T]``; whether all are done."""
        for name, value in weights.items():
            if name not in self.kept:
                self.kept[name] = value.detach().clone()
            self.kept[name][~self.done] = value.detach()[~self.done]
        assert self.config.until is not None
        self.done |= exact_match >= self.config.until
        return bool(self.done.all())


@torch.inference_mode()
def _exact_match(adapted: nn.Module, rows: Rows, rows_at_once: int) -> Tensor:
    """Share of rows that the model completes right, as ``score_adapters`` counts them."""
    adapted.eval()
    right = []
    for first in range(0, len(rows), rows_at_once):
        part = rows[first : first + rows_at_once]
        answers = adapted(part.ids, use_cache=False).logits.argmax(-1)
        right.append(((answers == part.targets) | (part.targets == IGNORED)).all(-1))
    adapted.train()
    return torch.cat(right).double().mean().cpu()


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
