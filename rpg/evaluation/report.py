"""The report of an evaluation: one schema for every command, written to ``evaluation.json``.

A report has *kinds* of networks (``original``, ``generated`` and each baseline) with the metrics of every network. The
first metric of ``better`` is the one that networks are compared by. `networks` makes a kind from what was measured.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from rpg.packages import install_command
from rpg.section import Section
from tokenization.errors import InputError
from tokenization.files import write_text

FORMAT: Literal[2] = 2

FILE = "evaluation.json"

AT_DISTANCE = "_at_distance"
"""Ends the names of baselines that lie as far from the zoo as the generated networks."""

TRAINED_FROM = "_steps_from_"
"""Lies within the names of baselines that were trained on images: ``<steps>_steps_from_<baseline>``."""

FAMILIES = {
    "noise": re.compile(r"noise"),
    "average": re.compile(r"average|interpolation|midpoint|copy|nearest_seen|start$"),
    "gaussian": re.compile(r"gaussian"),
    "merge": re.compile(r"(merge|peft)_"),
    "regression": re.compile(r"ridge"),
}
"""Families of simple baselines by their names; any other kind is a family of its own."""

PERCENT = re.compile(r"accuracy|exact_match")
"""Metrics that are shown in per cent."""

OF_SENSORS = ("sensors", "examples", "draws")
SENSORS = {
    "original": "trained for the sensor", "nearest_seen": "nearest", "generalist": "one network for all",
    "trained_upright": "one network, trained upright",
}  # fmt: skip
"""What kinds are called in reports on sensors, where other reports need more general words."""

Values = tuple[float | None, ...]


NUM_RESAMPLES = 2000


class Summary(Section):
    """Statistics of one metric over several networks.

    ``ci95`` is the 95 % percentile bootstrap interval of the mean: it says how well the mean over *networks* is
    known, not over images. With one network it has no width.
    """

    mean: float
    max: float
    min: float
    std: float = Field(description="over the networks, with the n − 1 denominator; 0 for one network")
    ci95: tuple[float, float]


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers of each network: predictions [num, images], labels [images] → float64 [num], 0 … 1."""
    return (predictions == labels).double().mean(1)


def summarize(values: Tensor | Iterable[float], seed: int = 0) -> Summary:
    """Summarise one metric over networks."""
    values = torch.as_tensor(values if isinstance(values, Tensor) else list(values), dtype=torch.float64)
    assert values.ndim == 1 and len(values), "nothing to summarise"
    return Summary(
        mean=values.mean().item(),
        max=values.max().item(),
        min=values.min().item(),
        std=values.std().item() if len(values) > 1 else 0.0,
        ci95=bootstrap_interval(values, seed),
    )


def bootstrap_interval(values: Tensor, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``values``, float64 [num]; ``seed`` decides the resamples."""
    num = len(values)
    rows = torch.randint(num, (NUM_RESAMPLES, num), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(values[rows].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


class Networks(Section):
    """One kind of networks. Values that are not finite are null."""

    count: int
    metrics: dict[str, Values] = Field(description="of each network, by name")
    summaries: dict[str, Summary | None] = Field(description="of the finite values of each metric; null without any")
    distances: dict[str, Values] = Field(
        {},
        description="of each network, in units: nearest (to the nearest other original; hidden units matched where the "
        "report says so), plain (unmatched), own (to the original of its condition)",
    )
    conditions: tuple[tuple[float, ...], ...] = Field((), description="what each network was made for")
    novel: tuple[float, ...] = Field((), description="share that is at least τ away and good, for each of taus")
    novel_ci95: tuple[tuple[float, float], ...] = Field((), description="95 % bootstrap interval of each")
    components: tuple[tuple[float, float], ...] = Field((), description="place in the zoo's two principal components")
    joint: dict[str, dict[int, float]] = Field(
        {}, description="metrics of sets of networks, for example a vote's accuracy, by the number M of networks"
    )
    extras: dict[str, Any] = Field({}, description="metrics of the kind as a whole, for example one_nna")


class Curve(Section):
    """Lines over a common axis, for example accuracy by share of zeros."""

    x: tuple[float, ...]
    lines: dict[str, Values] = Field(description="by kind")
    across: str = Field(description="title of the x axis")
    up: str = Field(description="title of the y axis")
    log: bool = False


class Report(Section):
    """Everything that an evaluation found."""

    format: Literal[2] = FORMAT
    experiment: str = Field(description="what was evaluated: networks, tasks, fields, target_loss, tickets, …")
    judge: str = Field(description="the task or function that gave the metrics")
    split: str = Field(description="data that networks were scored on")
    seed: int = Field(description="of networks, baselines' draws and bootstrap")
    better: dict[str, Literal["more", "less"]] = Field(description="by metric; the first decides; may be empty")
    kinds: dict[str, Networks] = Field(description="original, generated (count 0 for a zoo alone) and each baseline")
    references: tuple[str, ...] = Field(
        ("original", "held_out"), description="kinds that are compared with but are no rival of generated networks"
    )
    parts: dict[str, dict[str, Networks]] = Field({}, description="the same kinds on other conditions, e.g. seen tasks")
    threshold: float | None = Field(None, description="a network is good from here on: the originals' median")
    unit: float | None = Field(None, description="the originals' median distance to their nearest neighbour")
    matched: bool = Field(False, description="whether hidden units were matched before nearest distances were taken")
    taus: tuple[float, ...] = Field((), description="distances of the novelty curve, in units")
    explained: float = Field(0.0, description="share of the zoo's variance in the two principal components")
    asked: dict[str, Any] = Field({}, description="what was asked for: settings, examples, words")
    curves: dict[str, Curve] = Field({}, description="lines over a common axis, by title")
    notes: tuple[str, ...] = Field((), description="what a reader must know, in sentences")
    facts: dict[str, Any] = Field({}, description="seconds, sizes and the like")
    extras: dict[str, Any] = Field({}, description="measures that only this experiment has")

    @property
    def first(self) -> str:
        """The metric that networks are compared by; empty without any."""
        return next(iter(self.better), "")

    @property
    def sign(self) -> int:
        """1 if more of the first metric is better, else -1."""
        return -1 if self.better.get(self.first) == "less" else 1

    def label(self, kind: str) -> str:
        """A kind's label in this report's tables and pictures."""
        return SENSORS.get(kind, label_of(kind)) if self.experiment in OF_SENSORS else label_of(kind)

    def mean(self, kind: str, metric: str | None = None) -> float | None:
        """Mean of a metric (default: the first) over a kind; None if unknown."""
        found = self.kinds.get(kind)
        summary = found and found.summaries.get(metric or self.first)
        return summary.mean if summary else None

    def rivals(self) -> dict[str, float]:
        """Mean of the first metric of every simple baseline, the best first."""
        names = [name for name in self.kinds if name not in (*self.references, "generated")]
        means = {name: mean for name in names if (mean := self.mean(name)) is not None}
        return dict(sorted(means.items(), key=lambda each: -self.sign * each[1]))

    def best_of_families(self) -> list[str]:
        """The best baseline of each family, the best first; by novelty alone without metrics."""
        found: dict[str, str] = {}
        for name in self.rivals() or [each for each in self.kinds if each not in (*self.references, "generated")]:
            found.setdefault(family_of(name), name)
        return list(found.values())

    def told(self, run: Any, folder: Any) -> dict[str, Any]:
        """What a command that evaluates ``run`` into ``folder`` tells a machine."""
        files = {"figures": f"{folder}/evaluation.json", "report": f"{folder}/report.html"}
        return {"run": str(run), **files, "verdict": self.verdict, "networks": self.means()}

    def means(self) -> dict[str, dict[str, float | None]]:
        """The mean of every metric and the median distance, by kind."""
        return {
            kind: {name: self.mean(kind, name) for name in self.better} | {"distance": nearest_of(each)}
            for kind, each in self.kinds.items()
            if each.count
        }

    @property
    def verdict(self) -> str:
        """The result in one sentence, good or bad."""
        first, rivals = self.first, self.rivals()
        best = next(iter(rivals), None)
        original, own = self.mean("original"), self.mean("generated")
        words = first.replace("_", " ")
        if own is None and not first:
            middle = nearest_of(self.kinds["generated"])
            if middle is None:
                return "Nothing scores these networks; the table holds distances alone."
            return (
                f"Nothing scores these networks; generated ones lie {middle:.2g} nearest-neighbour distances from the "
                "originals (median)."
            )
        if own is None:
            if best is None or original is None:
                return "There is nothing to compare with."
            beside = f"the best baseline, {self.label(best)}, {shown(rivals[best], first)}"
            return f"Originals have {words} {shown(original, first)}, {beside}."
        said = f"Generated networks have {words} {shown(own, first)}"
        beside = "those trained for the sensor" if self.experiment in OF_SENSORS else "originals"
        said += f", {beside} {shown(original, first)}" if original is not None else ""
        if best is not None:
            ahead = self.sign * (own - rivals[best])
            how = "better than" if ahead > 0 else "as good as" if ahead == 0 else "worse than"
            said += f"; they are {how} the best simple baseline, {self.label(best)} ({shown(rivals[best], first)})"
        generated = self.kinds["generated"]
        if generated.novel and self.taus:
            place = min(range(len(self.taus)), key=lambda i: abs(self.taus[i] - 2))
            shares = {name: each.novel[place] for name, each in self.kinds.items() if name in rivals and each.novel}
            said += f"; at τ = {self.taus[place]:g}, {100 * generated.novel[place]:.0f} % are new and good"
            if shares:
                top = max(shares, key=shares.__getitem__)
                said += f" ({self.label(top)}: {100 * shares[top]:.0f} %)"
        return said + "."

    def to_frame(self) -> Any:
        """Kind, metrics and distances of each network, a row each, in pandas. Raises InputError if that is missing."""
        try:
            import pandas
        except ImportError:
            raise InputError(f"a data frame needs pandas; run {install_command('pandas')}") from None
        rows = []
        for kind, each in self.kinds.items():
            columns = {**each.metrics, **{f"distance_{name}": values for name, values in each.distances.items()}}
            rows += [{"kind": kind, **{name: values[i] for name, values in columns.items()}} for i in range(each.count)]
        return pandas.DataFrame(rows)

    def _repr_html_(self) -> str:
        rows = [["networks", *self.better, "distance"]]
        rows += [[self.label(kind), *(shown(v, k) for k, v in found.items())] for kind, found in self.means().items()]
        lines = ["".join(f"<td>{html.escape(cell.replace('_', ' '))}</td>" for cell in row) for row in rows]
        return f"<p>{html.escape(self.verdict)}</p><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def save(self, folder: Path | str) -> Path:
        """Write ``evaluation.json`` atomically. Raises InputError if the folder cannot be written."""
        path = Path(folder) / FILE
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, folder: Path | str) -> Report:
        """Read ``evaluation.json`` of a folder, or that file. Raises InputError if it is missing, old or broken."""
        path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
        if not path.is_file():
            raise InputError(f"there is no {path}; evaluate the run first, for example with `rpg evaluate`")
        try:
            content = json.loads(path.read_text())
        except ValueError:
            raise InputError(f"{path} is broken; evaluate the run again") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path} is of an earlier version of rpg; evaluate the run again")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            place = ".".join(str(each) for each in error.errors()[0]["loc"])
            raise InputError(f"{path} has an unexpected value at {place}; evaluate the run again") from None


def networks(
    metrics: Mapping[str, Tensor | Sequence[float]],
    *,
    distances: Mapping[str, Tensor | Sequence[float]] | None = None,
    conditions: Tensor | Sequence[Sequence[float]] = (),
    count: int | None = None,
    seed: int = 0,
    **more: Any,
) -> Networks:
    """One kind from what was measured.

    Args:
        metrics: of each network ``[num]``, by name.
        distances: of each network, by kind of distance.
        conditions: what each was made for, ``[num, C]``.
        count: number of networks; that of the metrics when None.
    """
    found = {name: finite_values(values) for name, values in metrics.items()}
    known = {name: [each for each in values if each is not None] for name, values in found.items()}
    return Networks(
        count=len(next(iter(found.values()), ())) if count is None else count,
        metrics=found,
        summaries={name: summarize(values, seed) if values else None for name, values in known.items()},
        distances={name: finite_values(values) for name, values in (distances or {}).items()},
        conditions=tuple(tuple(float(value) for value in row) for row in plain(conditions)),
        **more,
    )


def plain(values: Any) -> Any:
    """Tensors as lists."""
    return values.tolist() if isinstance(values, Tensor) else values


def finite_values(values: Tensor | Iterable[float | None]) -> Values:
    """Numbers for JSON: None for what is not finite."""
    return tuple(None if each is None or not math.isfinite(each) else float(each) for each in plain(values))


def nearest_of(kind: Networks, name: str = "nearest") -> float | None:
    """Median distance of a kind's networks; None if unknown."""
    known = [each for each in kind.distances.get(name, ()) if each is not None]
    return float(np.median(known)) if known else None


def family_of(name: str) -> str:
    """The family of a baseline, those at the generated networks' distance apart."""
    if TRAINED_FROM in name:
        return "trained"
    found = next((family for family, names in FAMILIES.items() if names.search(name)), name)
    return found + AT_DISTANCE if name.endswith(AT_DISTANCE) else found


def label_of(kind: str) -> str:
    """A kind's label in tables and pictures; a star marks kinds at the generated networks' distance."""
    return kind.removesuffix(AT_DISTANCE).replace("_", " ") + (" *" if kind.endswith(AT_DISTANCE) else "")


def shown(value: float | None, metric: str = "") -> str:
    """A value as text: accuracies in per cent, other numbers with four digits."""
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if PERCENT.search(metric) else f"{value:.4g}"
