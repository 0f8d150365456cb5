"""The page's HTML, from templates that escape their inputs."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from rpg.app.digits import Answer
from rpg.app.loaded import LoadedRun, PageResult, told
from rpg.app.sensors import Panel
from rpg.evaluation.judges import less_is_better
from rpg.evaluation.page.page import heat_png
from rpg.labs.fields.task import FieldsTask
from rpg.tasks.images.digits import DigitsSubsetsTask
from tokenization.checkpoint.structure import StateDict

FIELD_SIZE = 96
"""Height and width of a field's picture, whatever the grid it was fitted on."""

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=StrictUndefined,
)  # fmt: skip
_templates.filters["percent"] = lambda share: f"{100 * share:.1f}\u00a0%"


def _render(part: str, **shown: Any) -> str:
    html = getattr(_templates.get_template("parts.html.j2").module, part)(**shown)
    return str(html).replace("{", "&#123;").replace("$", "&#36;")  # which the page would take for its own templates


def show_header(run: LoadedRun) -> str:
    """What the generator is, in a line or two, and what is missing beside it."""
    config, generator = run.config, run.generator
    facts = [
        f"{generator.layout.num_values:,} values a network",
        f"{config.model.kind.replace('_', ' ')} generator",
        f"condition: {run.condition.kind if run.condition else 'none'}" if generator.metric is None else
        f"condition: {generator.metric.name}",
    ]  # fmt: skip
    if config.task is not None:
        facts.insert(0, f"task {config.task.name}")
    if run.originals is not None:
        facts.append(f"{run.originals.total:,} originals")
        if run.originals.total > len(run.originals):
            facts.append(f"{len(run.originals):,} of them compared")
    return _render("header", name=run.name, facts=facts, missing=run.missing)


def show_mistake(line: str) -> str:
    """What the user got wrong, as one line."""
    return _render("mistake", line=" ".join(line.split()))


def show_made(run: LoadedRun, made: PageResult | None) -> str:
    """Networks with metrics, nearest originals and pictures; before there are any, what will be here."""
    if made is None:
        return _render("nothing")
    rows = [
        {
            "number": index + 1,
            "figure": _first(made.metrics[index]) if made.metrics else None,
            "beside": _first(made.original_metrics[index]) if made.original_metrics else None,
            "nearest": made.nearest[index] if made.nearest else [],
            "shared": made.shared_errors[index] if made.shared_errors else None,
        }
        for index in range(len(made.networks))
    ]
    name = next(iter(made.metrics[0])) if made.metrics else ""
    mean = statistics.fmean(map(_first, made.metrics)) if made.metrics else None
    return _render(
        "made", made=made, rows=rows, name=name, percent=_is_share(name), mean=mean, wanted=made.wanted,
        heat=_heat(run, made), fields=_fields(run, made), large=run.is_large,
    )  # fmt: skip


def _first(metrics: dict[str, float]) -> float:
    return next(iter(metrics.values()))


def _is_share(name: str) -> bool:
    """Whether a figure is a share of something, which is shown in percent."""
    return "accuracy" in name and not less_is_better([name])


def _heat(run: LoadedRun, made: PageResult) -> tuple[list[str], str] | None:
    """Each network over its nearest original, as colours: what the rows are, and a PNG."""
    if run.originals is None or not run.originals.span.scales:
        return None
    labels, networks = [], []
    for index, network in enumerate(made.networks[:8]):
        labels += [f"network {index + 1}", "nearest original"]
        networks += [network, run.originals.state_dict(made.nearest[index][0].index)]
    return labels, heat_png(run.originals.deviations(networks))


def _fields(run: LoadedRun, made: PageResult) -> list[tuple[str, str, str]]:
    """Of neural fields: what each shows and what its nearest original does, as PNGs, and that one's name."""
    if not isinstance(run.task, FieldsTask):
        return []
    own = _pictures(run.task, made.networks)
    if run.originals is None:
        return [(picture, "", "") for picture in own]
    beside = _pictures(run.task, [run.originals.state_dict(each[0].index) for each in made.nearest])
    return [(a, b, each[0].name) for a, b, each in zip(own, beside, made.nearest, strict=True)]


def _pictures(task: FieldsTask, networks: Sequence[StateDict]) -> list[str]:
    images = task.render(networks, FIELD_SIZE)
    return [_png(1 - image if len(image) == 1 else image) for image in images]


def _png(image: Tensor) -> str:
    """``[C, H, W]`` in 0 … 1 as a base64 PNG."""
    values = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def show_sensor(panel: Panel) -> str:
    """What a sensor sees, what networks say of each picture, and how often they are right."""
    places = []
    for right, (picture, said, votes) in enumerate(zip(panel.pictures, panel.answers, panel.votes, strict=True)):
        fan = [(panel.classes[k], votes[k].item() / panel.num) for k in votes.argsort(descending=True) if votes[k]]
        places.append({"picture": _png(picture), "said": panel.classes[int(said)] if said >= 0 else "", "votes": fan,
                       "right": right == said})  # fmt: skip
    return _render("sensor", places=places, accuracies=panel.accuracies, several=panel.num > 1)


def show_drawing() -> str:
    """What the canvas is for."""
    return _render("draw")


def show_answers(
    run: LoadedRun, made: PageResult, counts: Tensor, found: list[tuple[Answer, Answer | None, str]]
) -> str:
    """What networks say to a drawn digit ``[8, 8]``, originals beside them."""
    family = isinstance(run.task, DigitsSubsetsTask)
    question = f"Is it one of: {told(run.condition, made.request.condition)}?" if family else ""
    return _render("answers", picture=_png(1 - counts[None] / 16), question=question, found=found)
