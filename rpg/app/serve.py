"""Serves the page, to this machine only by default."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from rpg.app.controls import (
    Controls,
    condition_controls,
    example_controls,
    initial_controls,
    knob_values,
    request_of,
    sampling_controls,
)
from rpg.app.digits import answers, drawn, reads_digits
from rpg.app.loaded import LoadedRun, PageRequest, PageResult
from rpg.app.sensors import look, sensors_task, settings_of
from rpg.app.show import show_answers, show_drawing, show_header, show_made, show_mistake, show_sensor
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
                    gr.HTML(show_drawing(), elem_id="draw-head")
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
            made.change(lambda: "", None, said, api_visibility="private")  # what the networks before these said
    return page


def _follow_the_knobs(run: LoadedRun, page: Any, made: Any, condition: Controls, shown: list[Any]) -> None:
    """Show what the sensor sees, and what networks say, whenever it is turned or there are new networks."""
    knobs = condition.components[-len(settings_of(run)) :]

    def turn(now: PageResult | None, *values: Any) -> list[Any]:
        found, line = _tried(lambda: [show_sensor(look(run, knob_values(run, values), now))])
        return [*(found or [gr.skip()]), line]

    gr.on([page.load, made.change, *(each.change for each in knobs)], turn, [made, *knobs], shown,
          api_visibility="private", trigger_mode="always_last", show_progress="hidden")  # fmt: skip


def _tried(work: Callable[[], list[Any]]) -> tuple[list[Any] | None, str]:
    """What the work puts out and an empty line, or nothing and the line that says what the user got wrong."""
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
    except (AttributeError, TypeError):  # what came is not a picture
        image = None
    counts = drawn(image)
    if made is None:
        raise InputError("there are no networks to ask yet; generate some first")
    return show_answers(run, made, counts, answers(run, made, counts))


LEAST_UPLOAD = 8 << 20
"""Bytes of an upload that are always enough for pictures; a checkpoint to go on from may have twice its own size."""


@contextmanager
def served(run: LoadedRun, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Serve the page of a run while the block runs; yields its address.

    All files, generated and uploaded, lie in a temporary folder that goes with it.

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
    """Serve the page until the program is interrupted or told to end; its files go either way."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with served(run, host, port) as address:
        say(f"{address} (stop with Ctrl+C)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("stopped")
