"""Fine-tuning adapters: one PEFT model at a time for any base, or many side by side on one base.

Both see the same rows in the same order and give the same weights; for small bases the second is many times faster.
T tasks, B rows, S token positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rpg.tasks.collecting import warm_cosine
from rpg.tasks.images.finetuning import average_into, checkpoint_stretches
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
    """Train T adapters at once.

    Args:
        bank: runs them.
        start: ``[T, *shape]`` under PEFT's names.
        draw: the next rows.
        config: the recipe.
        check: validation rows of each, with ``config.until``.

    Returns:
        ``config.checkpoints`` of each, in the order of their steps.
    """
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = _optimizer(list(weights.values()), config)
    stretches = checkpoint_stretches(config.steps, config.tail, config.checkpoints)
    kept: list[Stacked] = []
    stopper = _Stopper(config, len(check))
    for step in range(config.steps):
        rows = draw()
        loss = completion_losses(bank, weights, rows).sum()
        _update(optimizer, loss, step, config)
        if config.until is None:
            average_into(kept, stretches, step + 1, weights)
        elif stopper.looks(step) and stopper.take(weights, score_adapters(bank, weights, check)["exact_match"]):
            break
    return kept if config.until is None else [stopper.kept]


def train_one(
    base: nn.Module,
    adapter: LoraConfig,
    start: Mapping[str, Tensor],
    draw: Draw,
    config: AdapterTraining,
    check: Sequence[Rows] = (),
) -> list[dict[str, Tensor]]:
    """Train one adapter by PEFT alone, in the base's own precision; returns what ``train_side_by_side`` does of one."""
    from peft import set_peft_model_state_dict

    stretches = checkpoint_stretches(config.steps, config.tail, config.checkpoints)
    kept: list[dict[str, Tensor]] = []
    stopper = _Stopper(config, len(check))
    with peft_on(base, adapter) as adapted:
        set_peft_model_state_dict(adapted, dict(start))
        if config.gradient_checkpointing:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        adapted.train()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = _optimizer(trained, config)
        for step in range(config.steps):
            rows = draw()
            logits = adapted(rows.ids[0], use_cache=False).logits
            loss = token_losses(logits, rows.targets[0]).sum() / (rows.targets != IGNORED).sum()
            _update(optimizer, loss, step, config)
            if config.until is None and step + 1 > stretches[0][0]:
                average_into(kept, stretches, step + 1, adapter_state(adapted))
            elif config.until is not None and stopper.looks(step):
                state = {name: value[None] for name, value in adapter_state(adapted).items()}
                if stopper.take(state, _exact_match(adapted, check[0], config.batch_size)[None]):
                    break
        adapted.eval()
        if config.gradient_checkpointing:
            adapted.gradient_checkpointing_disable()
    return kept if config.until is None else [{name: value[0] for name, value in stopper.kept.items()}]


def _optimizer(parameters: list[Any], config: AdapterTraining) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
    )


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, config: AdapterTraining) -> None:
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * warm_cosine(step, config.steps)
    optimizer.zero_grad()
    loss.backward()  # not autograd.grad: the fused optimizer needs gradients in the layout of the weights
    optimizer.step()


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
