"""Training: the loop. What a step does and what is saved is the trainer's (rpg/training/trainer.py)."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from rpg.config import Config
from rpg.console import bar_in_notebook
from rpg.generation.generator import Generator
from rpg.models import part_of
from rpg.training.trainer import Trainer
from tokenization.errors import InputError
from tokenization.zoo.locks import lock_scope

TrainingProgress = Callable[[int, int, float], None]

WatchGenerator = Callable[[Generator], None]
"""Looks at the generator while it is trained."""

WATCHED, FIRST_WATCHED = 0.03, 20.0
"""Part of the time that watching may take, and seconds of training before the first time."""

MOST_WATCHED = 1_000_000
"""Values of a network up to which generating and scoring a few is cheap."""


def train(
    config: Config | Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    max_seconds: float | None = None,
    progress: TrainingProgress | None = None,
    watch: WatchGenerator | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train a generator on the zoo of ``config`` and write it to ``<run>/generator``.

    SIGTERM and SIGINT save a checkpoint and end the run; ``resume`` continues it exactly, on any number of processes.

    Args:
        config: the experiment, or the file that describes it.
        resume: go on from the newest complete checkpoint of the run folder, if there is one.
        overwrite: discard the run that is in the run folder.
        max_seconds: stop, as if interrupted, once the loop has run that long.
        progress: called by the main process with (steps done, steps in all, loss) at every logged step; a notebook
            shows a bar where it is None.
        watch: is shown the generator now and then, as often as `WATCHED` allows; of small networks on one process.

    Returns:
        The generator folder.

    Raises:
        InputError: the zoo, the configuration, the launcher or the run folder does not allow it, the loss is not
            finite, or the disk is full. The newest checkpoint stays whole in every case.
    """
    config = config if isinstance(config, Config) else Config.load(config)
    with (
        stop_signal() as stop_requested, _disk_errors(config.run), lock_scope(config.run),
        bar_in_notebook("training", progress) as progress,
    ):  # fmt: skip
        trainer = part_of(config.model, "trainer")(config, resume=resume, overwrite=overwrite, say=say)
        watching = _Watching(trainer, watch)
        for step, parts in trainer.sampler.prefetch(trainer.step, trainer.num_steps):
            loss = trainer.train_step(step, parts)
            done = step + 1
            finished = done == trainer.num_steps
            ended = stop_requested() or (max_seconds is not None and time.monotonic() - trainer.started > max_seconds)
            stopping = not finished and trainer.distributed.any(ended)
            if done % config.train.log_every == 0 or finished or stopping:
                loss = trainer.log(done, loss)
                watching(done)
                if progress is not None and trainer.distributed.is_main:
                    progress(done, trainer.num_steps, loss)
            if done % config.train.save_every == 0 or finished or stopping:
                trainer.save(done)
            if stopping:
                trainer.say(f"stopped after step {done} of {trainer.num_steps}; continue with --resume")
                break
        return trainer.finish()


class Stopped(KeyboardInterrupt):
    """Training ended before its last step; ``folder`` is the generator of what was trained."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder


def train_to_the_end(config: Config, **options: Any) -> Path:
    """As `train`, but raises `Stopped` if training is stopped before its end."""
    progress, stopped = options.pop("progress", None), False

    def advance(done: int, total: int, loss: float) -> None:
        nonlocal stopped
        stopped = done < total
        if progress is not None:
            progress(done, total, loss)

    folder = train(config, progress=advance, **options)
    if stopped:
        raise Stopped(folder)
    return folder


class _Watching:
    """Shows the generator at every tenth of a run, as long as that takes no more than `WATCHED` of the time."""

    def __init__(self, trainer: Any, watch: WatchGenerator | None) -> None:
        plain = isinstance(trainer, Trainer) and trainer.config.model.kind == "recurrent"
        small = plain and trainer.layout.num_values <= MOST_WATCHED and trainer.distributed.world_size == 1
        self.trainer, self.watch = trainer, watch if small else None
        self.tenth, self.spent, self.last = 0, 0.0, WATCHED * FIRST_WATCHED

    def __call__(self, done: int) -> None:
        now, tenth = time.monotonic(), 10 * done // max(1, self.trainer.num_steps)
        room = WATCHED * (now - self.trainer.started)
        if self.watch is None or tenth <= self.tenth or self.spent + self.last > room:
            return
        self.tenth = tenth
        try:
            self.watch(self.trainer.generator())
        except InputError:  # nothing scores these networks, which only the scoring need say
            self.watch = None
        self.last = time.monotonic() - now
        self.spent += self.last


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGTERM or SIGINT has asked to stop; a second signal acts as usual."""
    # In other threads than the main one signals are someone else's business.
    ours = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in ours}
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, handlers[signal.Signals(number)])

    try:
        for number in ours:
            signal.signal(number, receive)
        yield lambda: bool(received)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _disk_errors(run: str) -> Iterator[None]:
    """A full or failing disk, met anywhere in a run, as one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        where, found = getattr(error, "filename", None) or run, getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{where} could not be read or written ({found}); the last save is kept, so put that right and continue "
            "with --resume"
        ) from error
