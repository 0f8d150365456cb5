"""A start: the checkpoint that shall be improved, as a condition (G.pt, arXiv 2209.12892)."""

from __future__ import annotations

from pydantic import Field

from rpg.section import Section


class StartConfig(Section):
    """Training pairs: a checkpoint, and one of the same run, no later, as its start."""

    first: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of examples whose start is their run's first checkpoint; else any earlier one",
    )
