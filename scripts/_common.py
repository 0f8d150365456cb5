"""What the scripts share: a command line whose mistakes are one line, measuring, and figures written as JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from rpg.console import run_command
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

__all__ = [
    "Figures", "Parser", "alone", "make_zoo", "measured", "peak_resident_bytes", "run_command", "run_rpg", "timed",
    "work_folder",
]  # fmt: skip

GIB = 2**30


class Parser(argparse.ArgumentParser):
    """A parser that shows a script's docstring as its help and raises InputError for wrong arguments.

    Args:
        description: the docstring.
        figures: whether the script takes ``--json FILE`` and ``--folder FOLDER``, for `Figures` and `folder`.
    """

    def __init__(self, description: str | None, *, figures: bool = False) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        if figures:
            self.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
            self.add_argument("--folder", type=Path, help="where all is written and kept; else a temporary one")

    def error(self, message: str) -> NoReturn:
        """Raise InputError with what argparse says of the arguments."""
        raise InputError(f"{message}; see `{self.prog} --help`")


class Figures(dict[str, Any]):
    """What a script has measured so far: printed as it comes, and written as JSON where a file is named."""

    def __init__(self, path: Path | None, **known: Any) -> None:
        super().__init__({"threads": torch.get_num_threads(), "torch": torch.__version__, **known})
        self.path = path

    def take(self, *names: str, **found: Any) -> None:
        """Add figures under a path of names."""
        place: dict[str, Any] = self
        for name in names:
            place = place.setdefault(name, {})
        place |= found
        print(*names, json.dumps(found), flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self, indent=2) + "\n")


@contextmanager
def work_folder(folder: Path | None) -> Iterator[Path]:
    """The folder that is named, or a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        yield folder or Path(temporary)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, so that its memory is counted apart."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measured(function: Callable[..., dict[str, Any] | None], *arguments: Any, threads: int | None = None) -> Any:
    """What a function finds in a fresh process, its seconds by the clock and of the processor, and peak memory."""
    return alone(_measured, function, arguments, threads)


def peak_resident_bytes() -> int:
    """The highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held when it started this process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _measured(function: Callable[..., dict[str, Any] | None], arguments: tuple[Any, ...], threads: int | None) -> Any:
    if threads is not None:
        torch.set_num_threads(threads)
    started, processor = time.perf_counter(), time.process_time()
    found = function(*arguments) or {}
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "peak_gib": round(peak_resident_bytes() / GIB, 2),
        **found,
    }


def run_rpg(*arguments: object) -> dict[str, float]:
    """Run ``rpg``: seconds by the clock and of the processor, and peak resident memory, as the system says them."""
    return timed([sys.executable, "-m", "rpg", *map(str, arguments)])


def timed(command: list[str], folder: Path | None = None, limit: float | None = None) -> dict[str, Any]:
    """Run a command, in a folder: seconds by the clock and of the processor, and peak resident memory.

    It and the processes that it started are ended after ``limit`` seconds. Raises SystemExit if it fails.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder, start_new_session=True)
    stop = threading.Timer(limit or threading.TIMEOUT_MAX, os.killpg, (process.pid, signal.SIGKILL))
    stop.daemon = True
    stop.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # a session of its own is not reached by Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        stop.cancel()
    if status == signal.SIGKILL and limit:
        sys.exit(f"{' '.join(command)} was ended after {limit:g} s")
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def skeleton(name: str) -> dict[str, torch.Tensor]:
    """The state dict of a timm network without values."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name).state_dict()


def make_zoo(path: Path, num_checkpoints: int, name: str, dtype: torch.dtype = torch.float32) -> Zoo:
    """Random checkpoints of one run of a timm network: a common start and small steps, as fine-tuning leaves them."""
    if (path / "zoo.json").exists():
        zoo = Zoo.open(path)
        if len(zoo) == num_checkpoints:
            return zoo
        raise InputError(f"{path} is a zoo of {len(zoo)}, not of {num_checkpoints} checkpoints; choose another folder")
    zoo, rng = Zoo.create(path), torch.Generator().manual_seed(0)
    start = {key: torch.empty(value.shape).normal_(0, 0.02, generator=rng) for key, value in skeleton(name).items()}
    for step in range(num_checkpoints):
        for value in start.values():
            value.mul_(0.999).add_(torch.randn(min(value.numel(), 4096), generator=rng).mean(), alpha=1e-3)
            value.view(-1)[::7].add_(torch.randn(-(-value.numel() // 7), generator=rng), alpha=1e-4)
        zoo.append({key: value.to(dtype) for key, value in start.items()}, run=0, step=step)
    return zoo
