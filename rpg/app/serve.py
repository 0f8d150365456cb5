"""The page: rendering of networks and their metrics, and the server, on the local machine only by default."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from rpg.app.controls import (
    Controls,
    condition_controls,
    example_controls,
    initial_controls,
    knob_values,
    request_of,
    sampling_controls,
)
from rpg.app.loaded import LoadedRun, PageRequest, PageResult, told
from rpg.app.panels import Answer, Panel, answers, drawn, look, reads_digits, sensors_task, settings_of
from rpg.evaluation.judges import less_is_better
from rpg.evaluation.page.page import heat_png
from rpg.labs.fields.task import FieldsTask
from rpg.tasks.images.digits import DigitsSubsetsTask
from tokenization.checkpoint.checkpoint import StateDict
from tokenization.errors import InputError

FIELD_SIZE = 96
"""Height and width at which fields are rendered, whatever grid they were fitted on."""

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=StrictUndefined,
)  # fmt: skip
_templates.filters["percent"] = lambda share: f"{100 * share:.1f}\u00a0%"


def _render(part: str, **shown: Any) -> str:
    html = getattr(_templates.get_template("parts.html.j2").module, part)(**shown)
    return str(html).replace("{", "&#123;").replace("$", "&#36;")  # or the page would expand them as templates


def show_header(run: LoadedRun) -> str:
    """A short description of the generator, and what is missing."""
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
    """A user's error in one line."""
    return _render("mistake", line=" ".join(line.split()))


def show_made(run: LoadedRun, made: PageResult | None) -> str:
    """Networks with metrics, nearest originals and pictures; a placeholder before the first ones."""
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
    is_share = "accuracy" in name and not less_is_better([name])  # shown in percent
    return _render(
        "made", made=made, rows=rows, name=name, percent=is_share, mean=mean, wanted=made.wanted,
        heat=_heat(run, made), fields=_fields(run, made), large=run.is_large,
    )  # fmt: skip


def _first(metrics: dict[str, float]) -> float:
    return next(iter(metrics.values()))


def _heat(run: LoadedRun, made: PageResult) -> tuple[list[str], str] | None:
    """A heatmap of each network above its nearest original: row labels and a PNG."""
    if run.originals is None or not run.originals.span.scales:
        return None
    labels, networks = [], []
    for index, network in enumerate(made.networks[:8]):
        labels += [f"network {index + 1}", "nearest original"]
        networks += [network, run.originals.state_dict(made.nearest[index][0].index)]
    return labels, heat_png(run.originals.deviations(networks))


def _fields(run: LoadedRun, made: PageResult) -> list[tuple[str, str, str]]:
    """For neural fields: PNGs of each field and its nearest original, and the original's name."""
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
    """A sensor's view, the networks' predictions for each picture, and their accuracy."""
    places = []
    for right, (picture, said, votes) in enumerate(zip(panel.pictures, panel.answers, panel.votes, strict=True)):
        fan = [(panel.classes[k], votes[k].item() / panel.num) for k in votes.argsort(descending=True) if votes[k]]
        places.append({"picture": _png(picture), "said": panel.classes[int(said)] if said >= 0 else "", "votes": fan,
                       "right": right == said})  # fmt: skip
    return _render("sensor", places=places, accuracies=panel.accuracies, several=panel.num > 1)


def show_answers(
    run: LoadedRun, made: PageResult, counts: Tensor, found: list[tuple[Answer, Answer | None, str]]
) -> str:
    """The networks' predictions for a drawn digit ``[8, 8]``, beside those of originals."""
    family = isinstance(run.task, DigitsSubsetsTask)
    question = f"Is it one of: {told(run.condition, made.request.condition)}?" if family else ""
    return _render("answers", picture=_png(1 - counts[None] / 16), question=question, found=found)


HERE = Path(__file__).parent
CSS = (HERE / "page.css").read_text(encoding="utf-8")
PAD = (HERE / "pad.js").read_text(encoding="utf-8")
CANVAS = (
    '<div class="pad"><canvas width="256" height="256" aria-label="Draw a digit here"></canvas>'
    '<button type="button" class="pad-clear">Clear</button></div>'
)
KEPT_SECONDS = 3600
"""How long networks and uploads are kept after a page is closed."""


def theme() -> Any:
    """Gradio's base theme with system fonts."""
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"], radius_size=gr.themes.sizes.radius_md,
    )  # fmt: skip


def build_page(run: LoadedRun, folder: Path) -> Any:
    """The page of a run, as Gradio's blocks."""
    with gr.Blocks(
        title=f"rpg: {Path(run.name).name}", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)
    ) as page:
        gr.HTML(show_header(run))
        made = gr.State(None, time_to_live=KEPT_SECONDS, delete_callback=_forget)
        with gr.Row(elem_id="work"):
            with gr.Column(scale=2, min_width=300):
                condition = condition_controls(run)
                examples = example_controls(run, condition)
                parts = [condition, initial_controls(run), sampling_controls(run)]
                button = gr.Button("Generate", variant="primary", elem_id="generate")
                mistake = gr.HTML(elem_id="mistake")
                download = gr.DownloadButton("Download", elem_id="download", interactive=False)
            with gr.Column(scale=5, min_width=300):
                sensor = gr.HTML(elem_id="sensor", visible=sensors_task(run) is not None)
                result = gr.HTML(show_made(run, None), elem_id="result")
                if reads_digits(run):
                    gr.HTML(_render("draw"), elem_id="draw-head")
                    with gr.Row(elem_id="draw"):
                        pad = gr.HTML(html_template=CANVAS, js_on_load=PAD, elem_id="pad")
                        said = gr.HTML(elem_id="answers")
        inputs = [component for each in parts for component in each.components]

        def generate(old: PageResult | None, *values: Any) -> list[Any]:
            found, line = _tried(lambda: _generate(run, folder, old, request_of(parts, values)))
            return [*(found or [gr.skip()] * 3), line]

        def understand(paths: list[str]) -> list[Any]:
            found, line = _tried(lambda: [read(paths)])
            return [*(found or [gr.skip()]), line]

        def ask(now: PageResult | None, event: gr.EventData) -> str:
            found, line = _tried(lambda: [_answers(run, now, event)])
            return found[0] if found else line

        button.click(generate, [made, *inputs], [made, result, download, mistake], api_visibility="private",
                     concurrency_limit=1)  # fmt: skip
        if examples is not None:
            files, read = examples
            files.upload(understand, files, [condition.components[0], mistake], api_visibility="private")
        if sensors_task(run) is not None:
            _follow_the_knobs(run, page, made, condition, [sensor, mistake])
        if reads_digits(run):
            pad.input(ask, made, said, api_visibility="private")
            made.change(lambda: "", None, said, api_visibility="private")  # predictions of the previous networks
    return page


def _follow_the_knobs(run: LoadedRun, page: Any, made: Any, condition: Controls, shown: list[Any]) -> None:
    """Update the sensor's view and the predictions when a setting changes or there are new networks."""
    knobs = condition.components[-len(settings_of(run)) :]

    def turn(now: PageResult | None, *values: Any) -> list[Any]:
        found, line = _tried(lambda: [show_sensor(look(run, knob_values(run, values), now))])
        return [*(found or [gr.skip()]), line]

    gr.on([page.load, made.change, *(each.change for each in knobs)], turn, [made, *knobs], shown,
          api_visibility="private", trigger_mode="always_last", show_progress="hidden")  # fmt: skip


def _tried(work: Callable[[], list[Any]]) -> tuple[list[Any] | None, str]:
    """The result of ``work`` and an empty line, or None and the user's error in one line."""
    try:
        return work(), ""
    except InputError as error:
        return None, show_mistake(str(error))
    except OSError as error:  # the disk, as on the command line
        return None, show_mistake((error.strerror or str(error)).lower())


def _generate(run: LoadedRun, folder: Path, old: PageResult | None, request: PageRequest) -> list[Any]:
    made = run.make(request, folder)
    _forget(old)
    file = made.download()
    label = "Download the network" if file.suffix == ".safetensors" else f"Download {file.name}"
    return [made, show_made(run, made), gr.DownloadButton(label, value=str(file), interactive=True)]


def _forget(made: PageResult | None) -> None:
    if made is not None:
        shutil.rmtree(made.folder, ignore_errors=True)


def _answers(run: LoadedRun, made: PageResult | None, event: gr.EventData) -> str:
    try:
        image = event.image
    except (AttributeError, TypeError):  # the event holds no picture
        image = None
    counts = drawn(image)
    if made is None:
        raise InputError("there are no networks to ask yet; generate some first")
    return show_answers(run, made, counts, answers(run, made, counts))


LEAST_UPLOAD = 8 << 20
"""Upload limit in bytes, enough for pictures; raised for large checkpoints given as initial weights."""


@contextmanager
def served(run: LoadedRun, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Serve the page of a run while the block runs; yields its address.

    Generated and uploaded files lie in a temporary folder that is removed afterwards.

    Raises:
        InputError: the port is taken, or there is no such host.
    """
    with tempfile.TemporaryDirectory(prefix="rpg-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "gradio")
        page = build_page(run, Path(folder))
        try:
            page.launch(
                server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
                show_error=False, allowed_paths=[], footer_links=[], enable_monitoring=False, ssr_mode=False,
                max_file_size=max(LEAST_UPLOAD, 8 * run.generator.layout.num_values), theme=theme(), css=CSS,
            )  # fmt: skip
        except OSError as error:
            raise InputError(
                f"the page cannot be served at {host}:{port} ({' '.join(str(error).split())}); choose another --port"
            ) from None
        try:
            yield f"http://{host}:{port}"
        finally:
            page.close(verbose=False)


def serve(run: LoadedRun, host: str, port: int, say: Callable[[str], object]) -> None:
    """Serve the page until the program is interrupted or terminated; temporary files are removed in both cases."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with served(run, host, port) as address:
        say(f"{address} (stop with Ctrl+C)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("stopped")
