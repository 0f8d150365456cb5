"""The run folder: resumable checkpoints, published whole or not at all, found numerically, checked when read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from safetensors import SafetensorError

from rpg.config import Config
from tokenization.errors import InputError
from tokenization.files import file_digest, publish, synchronise

COMPLETE = "complete.json"
# What may change between the parts of a resumed run without changing what it computes, but for rounding.
FREE_TO_CHANGE = {
    ("train", "save_every"),
    ("train", "keep"),
    ("train", "log_every"),
    ("train", "gradient_accumulation"),
    ("train", "compile"),
    ("model", "backbone", "checkpointing"),
    ("model", "denoiser", "checkpoint_rows"),
    ("generate",),
    ("evaluate",),
    ("run",),
    ("zoo",),
}


class RunFolder:
    """``config.yaml``, ``checkpoints/step-00000100/``, ``generator/``, ``metrics.jsonl`` and what later steps add."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.generator = self.path / "generator"
        self.metrics = self.path / "metrics.jsonl"

    def check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Make sure that a run may begin here, or that the one in the folder is the one to go on with.

        Raises:
            InputError: there is a run already and neither flag is set, or ``config`` differs from its own.
            OSError: the folder cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        saved = self.path / "config.yaml"
        if saved.exists() and not resume and not overwrite:
            raise InputError(
                str(self.path), "a run already", "", "continue it with --resume or start anew with --overwrite"
            )
        if saved.exists() and resume:
            # parsed, so that fields which are newer than the run have their defaults
            before = Config.parse(yaml.safe_load(saved.read_text()), str(saved)).plain()
            changed = _first_difference(before, config.plain())
            if changed:
                raise InputError(
                    f"{saved}: {changed[0]}",
                    f"{changed[1]!r} where this run asks {changed[2]!r}",
                    "the run's own configuration",
                    "resume with it, or start anew with --overwrite",
                )

    def start(self, config: Config, *, resume: bool) -> None:
        """Make the folder ready; without ``resume`` the run that is in it goes."""
        saved = self.path / "config.yaml"
        if saved.exists() and not resume:
            for name in (self.checkpoints, self.generator, self.path / "tensorboard"):
                shutil.rmtree(name, ignore_errors=True)
            self.metrics.unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in self.checkpoints.glob(".writing-*"):  # of a process that was killed while it saved
            shutil.rmtree(leftover, ignore_errors=True)
        with publish(saved) as temporary:
            config.save(temporary)

    def save(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """Publish ``checkpoints/step-<step>`` as ``write`` fills it; older ones beyond ``keep`` go.

        Raises:
            InputError: the disk is full or not writable; what was there before stays.
        """
        target = self.checkpoints / f"step-{step:08d}"
        temporary = self.checkpoints / f".writing-{step:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            publish_folder(temporary, target, {"step": step})
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            before = next((path.name for _, path in self.steps()), "no save")
            cure = f"free some space and continue with --resume, from {before}"
            raise InputError(str(target), f"{error}", "room for a checkpoint", cure) from error
        for _, old in self.steps()[keep:]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def steps(self) -> list[tuple[int, Path]]:
        """Checkpoints on disk, newest first by step number."""
        found = []
        for path in self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else []:
            match = re.fullmatch(r"step-(\d+)", path.name)
            if match:
                found.append((int(match.group(1)), path))
        return sorted(found, reverse=True)

    def newest(self, say: Callable[[str], None] = lambda _: None) -> tuple[int, Path] | None:
        """The newest checkpoint whose files are whole; ``say`` is told of each that is passed over."""
        for step, path in self.steps():
            fault = check_folder(path)
            if fault is None:
                return step, path
            say(f"{path}: {fault}; falling back to the checkpoint before it")
        return None


def publish_folder(temporary: Path, target: Path, facts: dict[str, object]) -> None:
    """Flush every file of ``temporary``, list their digests in ``complete.json``, then move it to ``target``."""
    files = {str(path.relative_to(temporary)): path for path in sorted(temporary.rglob("*")) if path.is_file()}
    record = {**facts, "files": {name: [path.stat().st_size, file_digest(path)] for name, path in files.items()}}
    complete = temporary / COMPLETE
    complete.write_text(json.dumps(record, indent=1))
    for path in [*files.values(), complete]:
        synchronise(path)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    synchronise(target.parent)


def check_folder(path: Path) -> str | None:
    """What is wrong with a published folder, or None when every file is as it was written."""
    try:
        record = json.loads((path / COMPLETE).read_text())
        files = record["files"].items()
    except (OSError, ValueError, KeyError, AttributeError):
        return f"no readable {COMPLETE}"
    for name, (size, digest) in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if file_digest(file) != digest:
            return f"{name} is damaged"
    return None


def _first_difference(old: object, new: object, path: tuple[str, ...] = ()) -> tuple[str, object, object] | None:
    if path in FREE_TO_CHANGE or old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            difference = _first_difference(old.get(key), new.get(key), (*path, key))
            if difference:
                return difference
        return None
    return ".".join(path), old, new
