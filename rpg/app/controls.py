"""The page's controls: one set for each kind of condition, one for sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from rpg.app.loaded import MOST_NETWORKS, LoadedRun, PageRequest
from rpg.app.panels import classes_of, condition_for, reads_examples, sensors_task, settings_of
from rpg.generation.conditions import named_condition
from rpg.generation.examples import read_examples
from rpg.tasks.base import TaskFamily
from rpg.tasks.class_splits import bits_of_classes
from tokenization.errors import InputError
from tokenization.zoo.condition import MetricScale, Setting

WORDS, WORDS_SENSOR = "upside down, light on dark, a little too close", {"angle": 180.0, "scale": 1.08}
"""The example description of a sensor, and its settings."""

MOST_SHOWN = 20
"""Largest number of pictures to request a network by."""

STARTS = 50
"""Originals offered as initial weights."""


@dataclass
class Controls:
    """Components, and the function that reads their values as part of a request (it raises InputError)."""

    components: list[Any]
    read: Callable[..., dict[str, Any]]


def condition_controls(run: LoadedRun) -> Controls:
    """Controls of the condition: checkboxes, a class, words, numbers, or the value of a metric."""
    spec, metric = run.condition, run.generator.metric
    if spec is None:
        return Controls([], dict)
    if metric is not None:
        return _metric(metric)
    if sensors_task(run) is not None:
        return _sensor(run)
    if run.generator.texts is not None:
        texts = list(run.generator.texts.texts)
        box: Any = gr.Dropdown(
            texts, value=texts[0], label="In words", allow_custom_value=True, elem_id="condition",
            info="Choose a text that was learned, or write one of your own.",
        )  # fmt: skip
        return Controls([box], lambda text: {"condition": str(text or "")})
    if spec.kind == "binary":
        names = list(spec.names) or [str(place) for place in range(spec.size)]
        box = gr.CheckboxGroup(names, value=names[: max(1, len(names) // 3)], label="Classes that count as positive",
                               elem_id="condition")  # fmt: skip

        def bits(chosen: list[str]) -> dict[str, Any]:
            if isinstance(run.task, TaskFamily):
                return {"condition": bits_of_classes(chosen, names, "the condition").float().tolist()}
            return {"condition": [float(name in chosen) for name in names]}

        return Controls([box], bits)
    if spec.kind == "class":
        names = list(spec.names) or [str(place) for place in range(spec.size)]
        box = gr.Dropdown(names, value=names[0], label="Class", elem_id="condition")
        return Controls([box], lambda name: {"condition": [float(names.index(name))]})
    box = gr.Textbox(
        ", ".join(["0"] * spec.size), label=f"{spec.size} numbers, separated by commas", elem_id="condition"
    )
    return Controls([box], lambda text: {"condition": named_condition(spec, text.replace(" ", ""), "the condition")})


def _sensor(run: LoadedRun) -> Controls:
    """Sliders for a sensor's settings: the condition itself, or the sensor on which networks are tried."""
    kind, settings = run.condition.kind if run.condition is not None else "", settings_of(run)
    parts: list[Any] = []
    if kind == "text":
        settings = tuple(replace(each, default=WORDS_SENSOR.get(each.name, each.default)) for each in settings)
        parts.append(gr.Textbox(WORDS, label="The sensor in words",
                                elem_id="condition", info="Phrases between commas."))  # fmt: skip
    elif kind == "examples":
        parts += [
            gr.Slider(1, MOST_SHOWN, value=1, step=1, label="Unlabelled pictures from the sensor below", buttons=[],
                      elem_id="condition"),
            gr.File(label="… or pictures of your own", file_types=["image"], file_count="multiple", height=110,
                    elem_id="pictures"),
        ]  # fmt: skip
    knobs = [_knob(each, kind != "vector" and each is settings[0]) for each in settings]

    def read(*values: Any) -> dict[str, Any]:
        at = knob_values(run, values[-len(knobs) :])
        if kind == "examples" and values[1]:
            return {"condition": torch.cat([read_examples(file, run.condition, "picture") for file in values[1]])}
        return {"condition": condition_for(run, at, *(values[:1] if kind == "text" else ["", int(values[0])]))}

    return Controls([*parts, *knobs], read)


def _knob(setting: Setting, first: bool) -> Any:
    name = setting.name.replace("_", " ")
    if setting.kind == "boolean":
        return gr.Checkbox(bool(setting.default), label=name, elem_id=f"knob-{setting.name}")
    step = 1 if setting.high - setting.low > 20 else 0.01
    about = "The sensor that networks are tried on." if first else None
    return gr.Slider(setting.low, setting.high, value=setting.default, step=step, label=name, buttons=[], info=about,
                     elem_id=f"knob-{setting.name}")  # fmt: skip


def knob_values(run: LoadedRun, values: Sequence[Any]) -> list[float]:
    """Settings read from the sliders. Raises InputError for an empty or impossible value."""
    named = zip(settings_of(run), values, strict=True)
    return [each.check(math.nan if value is None else float(value)) for each, value in named]


def _metric(scale: MetricScale) -> Controls:
    about = f"Learned from {scale.low:.3g} to {scale.high:.3g}."
    if scale.log:
        low, high = math.log10(scale.low), math.log10(scale.high)
        power = gr.Slider(low, high, value=(low + high) / 2, step=(high - low) / 200, elem_id="power", buttons=[],
                          label=f"{scale.name}, power of ten")  # fmt: skip
        value: Any = gr.Number(_power(power.value), label=f"Requested {scale.name}", elem_id="condition",
                                info=f"{about} Beyond that it is a guess.")  # fmt: skip
        power.input(_power, power, value, api_visibility="private")
    else:
        value = gr.Slider(scale.low, scale.high, value=(scale.low + scale.high) / 2, elem_id="condition", info=about,
                           label=f"Requested {scale.name}")  # fmt: skip

    def read(value: float | None) -> dict[str, Any]:
        if value is None or not math.isfinite(value):
            raise InputError(f"{scale.name} is not a number; give one from {scale.low:.3g} to {scale.high:.3g}")
        return {"condition": [float(value)]}

    return Controls([value], read)


def _power(exponent: float) -> float:
    return float(f"{10**exponent:.3g}")


def initial_controls(run: LoadedRun) -> Controls:
    """Initial weights, for generators that improve a checkpoint: an original, or an uploaded file."""
    if not run.generator.takes_initial:
        return Controls([], dict)
    chosen = list(run.originals.indices) if run.originals is not None else []
    chosen = chosen[:: max(1, len(chosen) // STARTS)][:STARTS]
    zoo, originals = run.zoo, run.originals
    names = [originals.name(index) for index in chosen] if originals is not None else []
    box = gr.Dropdown(names, value=names[0] if names else None, label="Go on from", elem_id="start",
                      info="A checkpoint that was learned from.", visible=bool(names))  # fmt: skip
    file = gr.File(label="… or from a checkpoint of your own", file_types=[".safetensors"], height=150,
                   elem_id="start-file")  # fmt: skip

    def read(name: str | None, upload: str | None) -> dict[str, Any]:
        if upload is not None:
            return {"initial": Path(upload)}
        if name not in names or zoo is None:
            raise InputError("this generator improves a checkpoint; upload one as a safetensors file")
        return {"initial": zoo.file(chosen[names.index(name)])}

    return Controls([box, file], read)


def _usual(run: LoadedRun) -> int:
    """Default number of networks: for sensors one, or all that are allowed if the generator draws them."""
    if sensors_task(run) is None:
        return 4
    return MOST_NETWORKS if run.config.generate.state == "prior" else 1


def sampling_controls(run: LoadedRun) -> Controls:
    """Number of networks, seed, and the sampling options that this kind of generator has."""
    settings, model = run.config.generate, run.config.model
    names = ["num", "seed"]
    with gr.Row():
        parts: list[Any] = [
            gr.Slider(
                1, MOST_NETWORKS, value=_usual(run), step=1, label="Networks", elem_id="num", buttons=[], min_width=150
            ),
            gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed", min_width=90),
        ]
    state = getattr(model, "state", None)
    states: list[str] = []
    if state is not None and state.of != "none":
        states = ["stored", "density", "gaussian", *(["prior"] if state.prior else [])]
    with gr.Accordion("Sampling", open=False):
        if model.kind != "kernel_ridge":
            names.append("steps")
            most = max(50, settings.steps)
            parts.append(gr.Slider(1, most, value=settings.steps, step=1, label="Steps", elem_id="steps", buttons=[]))
        if states:
            names.append("state")
            parts.append(gr.Dropdown(states, value=settings.state, label="Permutation state", elem_id="state",
                                     info="Of an original, or a fresh one."))  # fmt: skip
        if states or model.kind == "kernel_ridge":
            names.append("temperature")
            parts.append(gr.Slider(0, 2, value=settings.temperature, step=0.05, label="Temperature", buttons=[],
                                   elem_id="temperature", info="Spread of fresh ones; 0 is the mean."))  # fmt: skip

    def read(*values: Any) -> dict[str, Any]:
        for name, value in zip(names, values, strict=True):
            if value is None:
                raise InputError(f"{name} is empty; give a number")
        return dict(zip(names, values, strict=True))

    return Controls(parts, read)


def request_of(parts: list[Controls], values: tuple[Any, ...]) -> PageRequest:
    """The request described by the values of all controls. Raises InputError if it is impossible."""
    request, rest = PageRequest(), list(values)
    for each in parts:
        mine, rest = rest[: len(each.components)], rest[len(each.components) :]
        request = replace(request, **each.read(*mine))
    return request


def example_controls(run: LoadedRun, condition: Controls) -> tuple[Any, Callable[..., Any]] | None:
    """An upload button for pictures that set the condition, and their reader; None if the task reads no pictures."""
    if not reads_examples(run) or run.condition is None or run.zoo is None:
        return None
    files = gr.UploadButton(
        "… or by pictures of digits", file_count="multiple", file_types=[".png", ".jpg", ".jpeg"], size="sm",
        elem_id="examples",
    )  # fmt: skip
    names = list(run.condition.names)

    def read(paths: list[str] | None) -> Any:
        found = classes_of(run, [Path(path) for path in paths or []])
        chosen = [names[place] for place in sorted(set(found))]
        return chosen if run.condition is not None and run.condition.kind == "binary" else names[found[0]]

    return files, read
