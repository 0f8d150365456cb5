"""Serving the page, on this machine alone unless its user says otherwise."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rpg.app.loaded import LoadedRun
from rpg.app.page import CSS, build_page, theme
from tokenization.errors import InputError

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
