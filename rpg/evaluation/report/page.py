"""``report.html``: one self-contained page, readable in light and dark, on a phone and on paper."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from rpg.evaluation.report import svg
from rpg.evaluation.report.svg import Axis, Series
from rpg.evaluation.results import AT_DISTANCE, TRAINED_FROM, EvaluationResult, NetworkScores, NoveltyReport
from tokenization.files import publish_text

STYLE = (Path(__file__).parent / "page.css").read_text()
GENERATED, ORIGINAL, AVERAGE = 0, 1, 2


@dataclass
class ReportData:
    """What a report shows beside the scores; parts that are empty are left out.

    Attributes:
        title: of the page.
        provenance: rows of the last table.
        losses: (optimizer steps, losses) of training.
        trajectories: (sampling steps taken, accuracy ``[networks]`` then).
        components: first two principal components ``[num, 2]`` by kind of networks, and what share they explain.
        original_distances: of each original to its nearest neighbour, in their median.
        heatmap: rows of values to compare ``[rows, columns]`` with a label each.
    """

    title: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[Sequence[float], Sequence[float]] = ((), ())
    trajectories: Sequence[tuple[int, Tensor]] = ()
    components: Mapping[str, Tensor] = field(default_factory=dict)
    explained: float = 0.0
    original_distances: Sequence[float] = ()
    heatmap: tuple[Sequence[str], Tensor] | None = None


def write_page(path: Path | str, result: EvaluationResult, data: ReportData) -> None:
    """Write the report. Raises InputError if the file cannot be written."""
    sections = [
        ("Verdict", _verdict(result)),
        ("Accuracy", _accuracy_table(result)),
        ("Accuracy against similarity", _scatter(result)),
        ("New and good", _novelty(result)),
        ("Distance to the nearest original", _distances(result, data)),
        ("Parameters beside their nearest originals", _heatmap(data)),
        ("From noise to network", _trajectories(result, data)),
        ("Where the networks lie", _components(data)),
        ("Training loss", _losses(data)),
        ("Provenance", _provenance(data)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    publish_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{html.escape(data.title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{html.escape(data.title)}</h1>{body}</main></body></html>\n",
    )


def _name(key: str) -> str:
    label = key.removesuffix(AT_DISTANCE).replace("_", " ")
    return label + (" (at equal distance)" if key.endswith(AT_DISTANCE) else "")


def _verdict(result: EvaluationResult) -> str:
    """What the figures say, in words."""
    generated, original = result.generated.accuracy, result.original.accuracy
    lines = [
        f"Generated networks are {100 * generated.mean:.1f} % accurate on average (best {100 * generated.max:.1f} %), "
        f"the originals {100 * original.mean:.1f} % (best {100 * original.max:.1f} %), "
        f"and the average of all originals {100 * result.ensemble.accuracy:.1f} %."
    ]
    novelty = result.novelty_details
    if novelty is not None:
        own = novelty.sets["generated"]
        middle = float(np.median(own.matched_distances))
        kind = "lie" if middle >= 1 else "are closer than the originals are to one another: they lie"
        lines.append(
            f"They {kind} {middle:.1f} of the zoo’s nearest-neighbour distances from the nearest original (median)."
        )
        lines += _rivals(novelty)
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _rivals(novelty: NoveltyReport) -> list[str]:
    """How the generated networks do at τ = 2 beside the best of each kind of baselines, in words."""
    index = min(range(len(novelty.taus)), key=lambda i: abs(novelty.taus[i] - 2))
    shares = {name: each.novel_and_performant[index] for name, each in novelty.sets.items()}
    share = shares.pop("generated")
    control = {name for name in shares if TRAINED_FROM in name}
    kinds = {
        "trivial baseline": shares.keys() - control,
        "trivial baseline as far from the zoo as they are": {n for n in shares if AT_DISTANCE in n} - control,
        "baseline trained on images": control,
    }
    lines = [f"At τ = {novelty.taus[index]:g}, {100 * share:.0f} % of them are new and good."]
    for kind, names in kinds.items():
        if names:
            best = max(sorted(names), key=lambda name: shares[name])
            than = "more than" if share > shares[best] else "as many as" if share == shares[best] else "fewer than"
            lines.append(f"That is {than} the {100 * shares[best]:.0f} % of the best {kind}, {_name(best)}.")
    return [" ".join(lines)]


def _accuracy_table(result: EvaluationResult) -> str:
    rows: list[tuple[str, NetworkScores]] = [("generated", result.generated), ("original", result.original)]
    rows += [(f"noise added, σ {n.sigma:g}{' relative' if n.relative else ''}", n) for n in result.noise]
    rows += [(_name(name), scores) for name, scores in result.baselines.items()]
    cells = [
        (
            name,
            str(s.count),
            _percent(s.accuracy.mean) + f" <small>[{', '.join(map(_percent, s.accuracy.ci95))}]</small>",
            _percent(s.accuracy.max),
            _percent(s.accuracy.min),
            f"{s.similarity.mean:.2f}",
        )
        for name, s in rows
    ]
    average = _percent(result.ensemble.accuracy)
    cells.insert(2, ("average of all originals", "1", average, average, average, f"{result.ensemble.similarity:.2f}"))
    heads = ("networks", "number", "mean, % [95 % interval]", "best", "worst", "IoU")
    note = (
        f"<p>On {result.num_images} {html.escape(result.split)} images. IoU: similarity of wrong predictions to the "
        "most similar (other) original’s; 1 is a copy in behaviour.</p>"
    )
    return _table(heads, cells) + note


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "scores") -> str:
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _scatter(result: EvaluationResult) -> str:
    kinds: list[tuple[str, NetworkScores]] = [("original", result.original)]
    kinds += [(f"noise added, σ {n.sigma:g}", n) for n in result.noise]
    kinds += [(_name(name), s) for name, s in result.baselines.items() if not name.endswith(AT_DISTANCE)]
    colors = {"original": ORIGINAL}
    series = [
        Series(name, s.similarities, s.accuracies, colors.get(name, 2 + index % 8))
        for index, (name, s) in enumerate(kinds)
    ]
    series.append(Series("generated", result.generated.similarities, result.generated.accuracies, GENERATED))
    text = "Accuracy of each network against its similarity to the nearest original, by kind; upper left is best."
    similarity = Axis("similarity to the nearest original (error IoU)")
    return _figure(svg.scatter(series, similarity, Axis("accuracy", percent=True), text), text)


def _novelty(result: EvaluationResult) -> str:
    novelty = result.novelty_details
    if novelty is None:
        return ""
    names = sorted(novelty.sets, key=lambda name: (name == "generated", AT_DISTANCE in name))
    series = []
    for index, name in enumerate(names):
        each = novelty.sets[name]
        low, high = ([bounds[i] for bounds in each.ci95] for i in (0, 1)) if name == "generated" else ((), ())
        color = GENERATED if name == "generated" else 1 + index % 9
        faint = name != "generated" and AT_DISTANCE not in name
        series.append(Series(_name(name), novelty.taus, each.novel_and_performant, color, low, high, faint))
    text = (
        "Share of networks at least τ nearest-neighbour distances from every original (hidden units matched) and at "
        f"least {100 * novelty.accuracy_threshold:.1f} % accurate, by kind; the band is the 95 % interval. "
        "Dashed: baselines at distances of their own."
    )
    chart = svg.lines(series, Axis("τ", log=True), Axis("new and good", 0.0, 1.0, percent=True), text)
    heads = ("networks", *(f"τ = {tau:g}" for tau in novelty.taus), "median distance", "disagreement", "coverage")
    rows = [
        (
            _name(name),
            *(f"{100 * share:.0f} %" for share in novelty.sets[name].novel_and_performant),
            f"{np.median(novelty.sets[name].matched_distances):.1f}",
            f"{100 * novelty.sets[name].disagreement:.1f} %",
            f"{100 * novelty.sets[name].coverage:.0f} %",
        )
        for name in reversed(names)
    ]
    return _figure(chart, text) + f"<details><summary>As a table</summary>{_table(heads, rows)}</details>"


def _distances(result: EvaluationResult, data: ReportData) -> str:
    if result.novelty_details is None:
        return ""
    sets = result.novelty_details.sets
    shown = [name for name in ("average_of_16", "coordinate_gaussian", "covariance_gaussian") if name in sets]
    series = [Series("original, to another original", data.original_distances, (), ORIGINAL)]
    series += [Series(_name(n), sets[n].matched_distances, (), 3 + i) for i, n in enumerate(shown)]
    series.append(Series("generated", sets["generated"].matched_distances, (), GENERATED))
    # Gaussians over several runs lie so far away that the rest would be one bar.
    limit = 3 * max(1.0, *sets["generated"].matched_distances)
    series = [s for s in series if s.x and float(np.median(s.x)) < limit]
    text = "Distances to the nearest original in the zoo’s median nearest-neighbour distances, hidden units matched."
    return _figure(svg.histogram(series, Axis("distance"), text), text)


def _heatmap(data: ReportData) -> str:
    if data.heatmap is None:
        return ""
    labels, values = data.heatmap
    picture = _png(values)
    text = "Parameters as colours, one row a network: " + ", ".join(labels) + ". Blue is below 0, red above."
    rows = "".join(f"<li>{html.escape(label)}</li>" for label in labels)
    alt = html.escape(text, quote=True)
    image = f'<div class="heat"><ol>{rows}</ol><img alt="{alt}" src="data:image/png;base64,{picture}"></div>'
    return f"<figure>{image}<figcaption>Deviation from the zoo’s mean, in each layer’s spread.</figcaption></figure>"


def _png(values: Tensor) -> str:
    """``[rows, columns]`` in -3 … 3 as a base64 PNG on a diverging scale, one pixel a value."""
    from matplotlib import colormaps  # imported here: slow
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, colormaps["RdBu_r"]((values.clamp(-3, 3).numpy() + 3) / 6), format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _trajectories(result: EvaluationResult, data: ReportData) -> str:
    if len(data.trajectories) < 2:  # one step is no way
        return ""
    steps = [step for step, _ in data.trajectories]
    num = len(data.trajectories[0][1])
    series = [
        Series(f"network {i}", steps, [float(values[i]) for _, values in data.trajectories], i) for i in range(num)
    ]
    text = f"Accuracy on {result.split} images of {num} networks after each sampling step, noise included."
    return _figure(svg.lines(series, Axis("sampling step"), Axis("accuracy", 0.0, 1.0, percent=True), text), text)


def _components(data: ReportData) -> str:
    if not data.components:
        return ""
    colors = {"generated": GENERATED, "original": ORIGINAL, "average of all originals": AVERAGE}
    series = [
        Series(name, points[:, 0].tolist(), points[:, 1].tolist(), colors.get(name, 3 + i))
        for i, (name, points) in enumerate(data.components.items())
    ]
    text = (
        "First two principal components of the originals’ weights, which hold "
        f"{100 * data.explained:.0f} % of their variance, with the other networks projected on them."
    )
    return _figure(svg.scatter(series, Axis("first component"), Axis("second component"), text), text)


def _losses(data: ReportData) -> str:
    steps, losses = data.losses
    if len(steps) < 2:
        return ""
    text = "Training loss at each logged optimizer step."
    chart = svg.lines([Series("loss", steps, losses, GENERATED)], Axis("step"), Axis("loss", log=True), text,
                      markers=False)  # fmt: skip
    return _figure(chart, text)


def _provenance(data: ReportData) -> str:
    def cell(value: str) -> str:
        return f"<pre>{html.escape(value.strip())}</pre>" if "\n" in value.strip() else html.escape(value)

    rows = [(html.escape(key), cell(value)) for key, value in data.provenance.items()]
    return _table(("", ""), rows, "facts")


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"
