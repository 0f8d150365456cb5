"""The command that serves a page."""

from __future__ import annotations

from pathlib import Path

from rpg.cli import parameters as o
from rpg.cli.reading import guard
from rpg.console import console
from tokenization.errors import InputError

SHIPPED = Path("sensors")
"""The generator that comes with rpg."""


def app(
    run: o.AppFolder = SHIPPED, host: o.Host = "127.0.0.1", port: o.Port = 7860, prompt_model: o.PromptModel = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> None:  # fmt: skip
    """Try a generator in the browser: choose a condition, generate, compare, download."""
    from rpg.devices import use_device
    from rpg.generation.folders import which_generator
    from rpg.planning.plan import generation_need

    try:
        from rpg.app.loaded import LoadedRun
        from rpg.app.serve import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        from rpg.packages import install_command

        cure = f"run {install_command('gradio')}"
        raise InputError(f"the page needs Gradio, which is not installed; {cure}") from None
    place = use_device(device)
    guard(lambda: generation_need(run), ignore_memory)
    console.print(which_generator(run) or f"reading {run}", highlight=False, soft_wrap=True)
    serve(LoadedRun(run, place, prompt_model), host, port, lambda line: console.print(line, highlight=False))
