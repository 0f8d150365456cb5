"""Configuration of pruned and quantised zoos."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from rpg.section import Section


class Pruning(Section):
    """Networks of which most weights are zero."""

    kind: Literal["prune"] = "prune"
    sparsity: float = Field(0.8, gt=0, lt=1, description="share of zeros among the weights of layers, biases apart")
    steps: int = Field(400, ge=1, description="fine-tuning steps in which the share of zeros rises")
    masks: Literal["csr", "stored", "implied"] = Field(
        "csr", description="compressed rows; values and mask, as torch.nn.utils.prune; zeros (name them: tokens.pruned)"
    )


class Quantisation(Section):
    """Networks whose weights are integers with one scale for each output channel."""

    kind: Literal["quantise"] = "quantise"
    bits: Literal[8, 4] = Field(8, description="of a code")
    steps: int = Field(200, ge=1, description="fine-tuning steps with rounded weights before the first checkpoint")


Compress: TypeAlias = Annotated[Pruning | Quantisation, Field(discriminator="kind")]
