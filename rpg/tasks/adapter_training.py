"""Fine-tuning adapters: one PEFT model at a time for any base, or many side by side on one base.

Both see the same rows in the same order and give the same weights; for small bases the second is many times faster.
T tasks, B rows, S token positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rpg.section import Section
from rpg.tasks.adapter_bank import AdapterBank, adapter_state, peft_on
from rpg.tasks.finetuning import average_into, checkpoint_stretches, schedule
from rpg.tasks.language_rows import IGNORED, Rows
from rpg.tasks.side_by_side import Stacked

if TYPE_CHECKING:
    from peft import LoraConfig

Draw = Callable[[], Rows]
"""The next training rows of T tasks, ``[T, B, S]``."""


class AdapterTraining(Section):
    """How an adapter is trained from its start."""

    steps: int = Field(120, ge=1)
    batch_size: int = Field(16, ge=1, description="rows a step")
    learning_rate: float = Field(1e-2, gt=0, description="after a short warm-up; falls to 0 along a cosine")
    weight_decay: float = Field(0.0, ge=0)
    checkpoints: int = Field(1, ge=1, description="checkpoints kept of every adapter")
    tail: float = Field(
        0.5, gt=0, le=1, description="share of the steps, the last, that is cut into one stretch a checkpoint, each of "
        "which is the mean of the weights over its stretch",
    )  # fmt: skip
    gradient_checkpointing: bool = Field(False, description="with one adapter at a time: less memory, more time")


def train_side_by_side(bank: AdapterBank, start: Stacked, draw: Draw, config: AdapterTraining) -> list[Stacked]:
    """Train T adapters at once.

    Args:
        bank: runs them.
        start: ``[T, *shape]`` under PEFT's names.
        draw: the next rows.
        config: the recipe.

    Returns:
        ``config.checkpoints`` of each, in the order of their steps.
    """
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = _optimizer(list(weights.values()), config)
    stretches = checkpoint_stretches(config.steps, config.tail, config.checkpoints)
    kept: list[Stacked] = []
    for step in range(config.steps):
        rows = draw()
        loss = completion_losses(bank, weights, rows).sum()
        _update(optimizer, loss, step, config)
        average_into(kept, stretches, step + 1, weights)
    return kept


def train_one(
    base: nn.Module, adapter: LoraConfig, start: Mapping[str, Tensor], draw: Draw, config: AdapterTraining
) -> list[dict[str, Tensor]]:
    """Train one adapter by PEFT alone, in the base's own precision; returns what ``train_side_by_side`` does of one."""
    from peft import set_peft_model_state_dict

    stretches = checkpoint_stretches(config.steps, config.tail, config.checkpoints)
    kept: list[dict[str, Tensor]] = []
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
            if step + 1 > stretches[0][0]:
                average_into(kept, stretches, step + 1, adapter_state(adapted))
        adapted.eval()
        if config.gradient_checkpointing:
            adapted.gradient_checkpointing_disable()
    return kept


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


def _optimizer(parameters: list[Any], config: AdapterTraining) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
    )


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, config: AdapterTraining) -> None:
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * schedule(step, config.steps)
    optimizer.zero_grad()
    loss.backward()  # not autograd.grad: the fused optimizer needs gradients in the layout of the weights
    optimizer.step()
