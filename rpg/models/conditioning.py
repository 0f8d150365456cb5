"""Conditions: what the user asks for, checked, and as one vector of the model's width.

B examples, C condition values, H model width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rpg.generation.text_encoder import TextTable
from rpg.section import Section
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec


class ConditionConfig(Section):
    """What the generator is conditioned on."""

    kind: Literal["none", "binary", "class", "vector", "text"] = Field(
        "none", description="none; binary vector; class index; real vector; text (an embedding vector)"
    )
    encoder: str | None = Field(
        None, description="of text: a sentence encoder for transformers, by name or local path; its vectors are kept"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of training examples that see no condition (guidance)")
    withhold: float = Field(
        0.0, ge=0, lt=1, description="share of a binary condition's bits that a training example is not told; "
        "train.behaviour passes over the images of their classes"
    )  # fmt: skip
    inject: Literal["both", "backbone", "last_tokens"] = Field(
        "both", description="backbone input and denoiser; backbone input only; only the last tokens' backbone input"
    )
    last_tokens: int = Field(8, ge=1, description="with inject last_tokens: how many tokens see the condition")

    @model_validator(mode="after")
    def _only_bits_are_withheld(self) -> ConditionConfig:
        if self.withhold and self.kind != "binary":
            raise ValueError("withhold needs kind: binary")
        return self


class ConditionEncoder(nn.Module):
    """A condition ``[B, C]`` as an embedding ``[B, H]``; a dropped one becomes a learned null embedding.

    Args:
        kind: one of ``ConditionConfig.kind`` except ``none``.
        size: C; for ``class`` the number of classes (and the condition itself is ``[B, 1]``), for ``text`` the width
            of the sentence encoder.
        width: H.
    """

    def __init__(self, kind: str, size: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.null = nn.Parameter(torch.randn(width) * 0.02)
        self.network: nn.Module
        if kind == "class":
            self.network = nn.Embedding(size, width)
        else:
            self.network = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed ``condition`` ``[B, C]``; rows where ``dropped`` ``[B]`` is true get the null embedding."""
        if self.kind == "class":
            embedded = self.network(condition[:, 0].long())  # [B, H]
        elif self.kind == "binary":
            embedded = self.network(condition * 2 - 1)  # bits as ±1, [B, H]
        else:
            embedded = self.network(condition)  # [B, H]
        if dropped is not None:
            embedded = torch.where(dropped[:, None], self.null.to(embedded.dtype), embedded)
        return embedded


def requested_conditions(
    condition: Any, num: int, spec: ConditionSpec | None, table: TextTable | None
) -> Tensor | None:
    """What is asked of a generator as ``[num, C]``, checked; None of one that takes no condition.

    Args:
        condition: ``[C]`` for all networks or ``[num, C]``, in any form that torch takes; a text or ``num`` texts.
        num: networks.
        spec: what the generator's conditions mean.
        table: its texts, where they are texts.

    Raises:
        InputError: it is missing or of another kind or size, has impossible values, or cannot be encoded.
    """
    if spec is None:
        if condition is not None:
            raise InputError("condition", "a condition", "none", "this generator was trained without one")
        return None
    width = table.vectors.shape[1] if table is not None else 1 if spec.kind == "class" else spec.size
    expected = f"{width} values ({spec.kind})" if table is None else "a text"
    if condition is None:
        raise InputError("condition", "none", expected, "say what to generate for")
    texts = requested_texts(condition, num)
    if texts is not None:
        if table is None or len(texts) != num:
            raise InputError("condition", f"{len(texts)} texts", expected if table is None else f"one, or {num}")
        if not all(text.strip() for text in texts):
            raise InputError("condition", "an empty text", "one that says what to generate")
        vectors = {text: table.condition(text) for text in dict.fromkeys(texts)}
        return torch.stack([vectors[text] for text in texts])
    values = torch.as_tensor(condition, dtype=torch.float32)
    values = values.expand(num, -1) if values.ndim == 1 else values
    if values.shape != (num, width):
        raise InputError("condition", f"{list(values.shape)} values", f"[{num}, {width}]")
    if not torch.isfinite(values).all():
        raise InputError("condition", "NaN or infinity", "finite numbers")
    if spec.kind == "binary" and not ((values == 0) | (values == 1)).all():
        raise InputError("condition", "values other than 0 and 1", "a binary vector")
    if spec.kind == "class" and not ((values == values.round()) & (values >= 0) & (values < spec.size)).all():
        raise InputError("condition", "no class of the generator", f"a whole number from 0 to {spec.size - 1}")
    return values


def requested_texts(condition: Any, num: int) -> tuple[str, ...] | None:
    """A condition that is a text, or one for each network, as one for each; None if it is not."""
    if isinstance(condition, str):
        return (condition,) * num
    if isinstance(condition, list | tuple) and condition and all(isinstance(each, str) for each in condition):
        return tuple(condition)
    return None
