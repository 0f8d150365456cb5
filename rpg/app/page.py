"""The page itself: components, and what happens when they are used. The run is fixed; nothing names a path to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from rpg.app.controls import condition_controls, example_controls, sampling_controls, start_controls, wish_of
from rpg.app.digits import answers, drawn, reads_digits
from rpg.app.loaded import LoadedRun, Made, Wish
from rpg.app.show import show_answers, show_header, show_made, show_mistake
from tokenization.errors import InputError

HERE = Path(__file__).parent
CSS = (HERE / "page.css").read_text(encoding="utf-8")
PAD = (HERE / "pad.js").read_text(encoding="utf-8")
CANVAS = (
    '<div class="pad"><canvas width="256" height="256" aria-label="Draw a digit here"></canvas>'
    '<button type="button" class="pad-clear">Clear</button></div>'
)
KEPT_SECONDS = 3600
"""How long the networks of a closed page, and what was uploaded, are kept."""


def theme() -> Any:
    """Gradio's plain one, in fonts that every computer has."""
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"], radius_size=gr.themes.sizes.radius_md,
    )  # fmt: skip


def build_page(run: LoadedRun, folder: Path) -> Any:
    """The page of a run, as Gradio's blocks.

    Args:
        run: what it is about.
        folder: where it writes; whoever serves the page removes it.
    """
    with gr.Blocks(
        title=f"rpg: {Path(run.name).name}", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)
    ) as page:
        gr.HTML(show_header(run))
        made = gr.State(None, time_to_live=KEPT_SECONDS, delete_callback=_forget)
        with gr.Row(elem_id="work"):
            with gr.Column(scale=2, min_width=300):
                condition = condition_controls(run)
                examples = example_controls(run, condition)
                parts = [condition, start_controls(run), sampling_controls(run)]
                button = gr.Button("Generate", variant="primary", elem_id="generate")
                mistake = gr.HTML(elem_id="mistake")
                download = gr.DownloadButton("Download", elem_id="download", interactive=False)
                if reads_digits(run):
                    pad = gr.HTML(html_template=CANVAS, js_on_load=PAD, elem_id="pad")
            with gr.Column(scale=5, min_width=300):
                if reads_digits(run):
                    said = gr.HTML(show_answers(run, None, None, []), elem_id="answers")
                result = gr.HTML(show_made(run, None), elem_id="result")
        inputs = [component for each in parts for component in each.components]

        def generate(old: Made | None, *values: Any) -> list[Any]:
            return _or_refused(lambda: _generate(run, folder, old, wish_of(parts, values)), 3)

        def ask(now: Made | None, event: gr.EventData) -> list[Any]:
            return _or_refused(lambda: [_answers(run, now, event._data)], 1)

        button.click(generate, [made, *inputs], [made, result, download, mistake], api_visibility="private",
                     concurrency_limit=1)  # fmt: skip
        if examples is not None:
            files, read = examples
            files.upload(lambda paths: _or_refused(lambda: [read(paths)], 1), files,
                         [condition.components[0], mistake], api_visibility="private")  # fmt: skip
        if reads_digits(run):
            pad.input(ask, made, [said, mistake], api_visibility="private")
    return page


def _or_refused(work: Callable[[], list[Any]], outputs: int) -> list[Any]:
    """What the work puts out and an empty line, or nothing new and the line that says what the user got wrong."""
    try:
        return [*work(), ""]
    except InputError as error:
        line = str(error)
    except OSError as error:  # the disk, as on the command line
        line = (error.strerror or str(error)).lower()
    return [*[gr.skip()] * outputs, show_mistake(line)]


def _generate(run: LoadedRun, folder: Path, old: Made | None, wish: Wish) -> list[Any]:
    made = run.make(wish, folder)
    _forget(old)
    file = made.download()
    label = "Download the network" if file.suffix == ".safetensors" else f"Download {file.name}"
    return [made, show_made(run, made), gr.DownloadButton(label, value=str(file), interactive=True)]


def _forget(made: Made | None) -> None:
    if made is not None:
        shutil.rmtree(made.folder, ignore_errors=True)


def _answers(run: LoadedRun, made: Made | None, data: Any) -> str:
    counts = drawn(data.get("image") if isinstance(data, dict) else None)
    if made is None:
        raise InputError("there are no networks to ask yet; generate some first")
    return show_answers(run, made, counts, answers(run, made, counts))
