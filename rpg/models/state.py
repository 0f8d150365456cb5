"""Permutation states: learned embeddings of runs or checkpoints, or codes that are measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from rpg.models.centre import CodeTable, TaskTable
from rpg.models.code_prior import CodePriorConfig
from rpg.section import Section


class StateConfig(Section):
    """The permutation state: which training run, or which checkpoint, the weights came from."""

    of: Literal["none", "run", "checkpoint", "code", "task"] = Field(
        "run",
        description="what has a learned embedding of its own; code: no embedding, but the whole checkpoint's whitened "
        "leading principal components, which tokens are a linear function of, and diffusion makes the rest; task: what "
        "the zoo says of its task, for a prior that is given something else, such as examples",
    )
    width: int | None = Field(
        64, ge=1, description="width of the embedding; null: the backbone's, to which it is added without a linear map"
    )
    initial: Literal["random", "constant"] = Field(
        "random", description="untrained embeddings: normal numbers, or 1 / width everywhere, the same for all"
    )
    noise: float = Field(
        0.0, ge=0, description="noise added to the embedding in training, relative to the table's own spread"
    )
    linear: bool = Field(False, description="of code or task: networks see a linear map of it, not an MLP")
    prior: CodePriorConfig | None = Field(
        None, description="of code or task: a diffusion over them, given the condition, for generate.state: prior"
    )

    @model_validator(mode="after")
    def _only_codes_have_a_prior(self) -> StateConfig:
        if self.prior is not None and self.of not in ("code", "task"):
            raise ValueError("prior needs of: code or task")
        if self.linear and self.of not in ("code", "task"):
            raise ValueError("linear needs of: code or task")
        if self.of in ("code", "task") and self.width is None:
            raise ValueError(f"of: {self.of} needs a width, how many numbers it has")
        return self


def permutation_state(config: StateConfig, num_states: int, width: int) -> tuple[nn.Embedding | CodeTable, nn.Module]:
    """The table of states, and what maps them to the width of the backbone."""
    if config.of in ("code", "task"):
        codes = (CodeTable if config.of == "code" else TaskTable)(num_states, config.width or width)
        first = nn.Linear(codes.embedding_dim, width)
        return codes, first if config.linear else nn.Sequential(first, nn.SiLU(), nn.Linear(width, width))
    table = nn.Embedding(num_states, config.width or width)
    if config.initial == "constant":
        nn.init.constant_(table.weight, 1 / table.embedding_dim)
    return table, nn.Linear(config.width, width) if config.width else nn.Identity()
