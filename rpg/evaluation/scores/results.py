"""What an evaluation by figures measured: the contents of its ``evaluation.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rpg.evaluation.metrics import Summary
from rpg.evaluation.results import Span
from rpg.section import Section
from tokenization.files import write_text


class ScoredNetworks(Section):
    """One kind of networks; distances are in the zoo's median nearest-neighbour distances, hidden units unmatched."""

    count: int
    figures: dict[str, tuple[float | None, ...]] = Field(description="of each network; None where it is not finite")
    summaries: dict[str, Summary | None] = Field(description="of the finite figures; None without any")
    distances: tuple[float | None, ...] = Field((), description="to the nearest (other) original; empty if not known")
    own_distances: tuple[float | None, ...] = Field(
        (), description="to the original of the condition that it was made for; empty without conditions"
    )
    novel_and_performant: tuple[float, ...] = Field(
        (), description="share that is at least τ away and as good as the median original, for each τ"
    )


class ScoreResult(Section):
    """Everything that an evaluation by a scorer measured; the first figure is the one that networks are judged by.

    Where nothing scores there are no figures, and networks are told apart by their weights alone.
    """

    scorer: str = Field(description="the function or the task")
    seed: int
    better: dict[str, Literal["more", "less"]] = Field(description="of every figure, what is better")
    threshold: float | None = Field(description="the originals' median of the first figure")
    unit: float | None = Field(description="median distance of an original to its nearest neighbour, layers normalised")
    matched: bool = Field(False, description="whether hidden units were matched before distances were taken")
    taus: tuple[float, ...]
    sets: dict[str, ScoredNetworks] = Field(description="networks by kind, originals first")
    components: dict[str, tuple[tuple[float, float], ...]] = Field(
        description="each network in the zoo's first two principal components, in units of their spread"
    )
    explained: float = Field(description="share of the zoo's variance that these two hold")
    deviation_ratio: float | None = Field(
        None, description="mean squared deviation from the zoo's mean, generated over original"
    )
    span: Span | None = None
    seconds_per_network: float | None = Field(None, description="what generating one took")

    @property
    def first(self) -> str:
        """Name of the figure that networks are judged by; empty without any."""
        return next(iter(self.better), "")

    def save(self, path: Path | str) -> None:
        """Write the result as JSON, atomically. Raises InputError if the file cannot be written."""
        write_text(path, self.model_dump_json(indent=1) + "\n")
