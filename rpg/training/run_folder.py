"""The run folder: resumable checkpoints, published whole or not at all, found numerically, checked when read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml
from safetensors.torch import save_file
from torch import Tensor

from rpg.config import Config
from tokenization.errors import InputError
from tokenization.files import (
    atomic_file,
    atomic_folder,
    file_digest,
    recover_folder,
    remove_folder,
    remove_leftovers,
    write_text,
)
from tokenization.zoo.locks import take_lock

MODEL, AVERAGE, OPTIMIZER = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
COMPLETE = "complete.json"
Files = Mapping[str, Mapping[str, Tensor]]
"""What a checkpoint holds: tensors by name, by file."""

# What may change between the parts of a resumed run without changing what it computes, but for rounding.
FREE_TO_CHANGE = {"run", "zoo", "generate", "evaluate", "train.save_every", "train.keep", "train.log_every"}
FREE_TO_CHANGE |= {"train.gradient_accumulation", "train.compile", "train.log_with"}
FREE_TO_CHANGE |= {"model.backbone.checkpointing", "model.denoiser.checkpoint_rows", "model.denoiser.checkpointing"}


class RunFolder:
    """``config.yaml``, ``checkpoints/step-00000100/``, ``generator/``, ``metrics.jsonl`` and what later steps add."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.generator = self.path / "generator"
        self.metrics = self.path / "metrics.jsonl"

    def check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Make sure that a run may begin here, or that the one in the folder is the one to go on with; take its lock.

        Raises:
            InputError: there is a run already and neither flag is set, ``config`` differs from its own, another
                command writes there, or the folder cannot be written.
        """
        take_lock(self.path)
        saved = self.path / "config.yaml"
        if saved.exists() and not resume and not overwrite:
            raise InputError(f"{self.path} has a run already; continue it with --resume or start anew with --overwrite")
        if saved.exists() and resume:
            # parsed, so that fields which are newer than the run have their defaults
            before = Config.parse(yaml.safe_load(saved.read_text()), str(saved)).plain()
            # Batch normalisation sees one part of a batch at a time.
            fixed = {"train.gradient_accumulation"} if config.model.normalises_batches else set()
            changed = _first_difference(before, config.plain(), FREE_TO_CHANGE - fixed)
            if changed:
                raise InputError(
                    f"{saved} has {changed[0]} {changed[1]!r}, but this run asks {changed[2]!r}; resume with the "
                    "run's own configuration, or start anew with --overwrite"
                )

    def start(self, config: Config, *, resume: bool) -> None:
        """Make the folder ready; without ``resume`` the run that is in it goes."""
        saved = self.path / "config.yaml"
        if saved.exists() and not resume:
            recover_folder(self.generator)  # what a kill left of it must not come back after the new run
            for name in (self.checkpoints, self.generator, self.path / "tensorboard"):
                remove_folder(name)
            self.metrics.unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.checkpoints)
        with atomic_file(saved) as temporary:
            config.save(temporary)

    def save(self, step: int, files: Files, keep: int, seconds: float, learned: str) -> Path:
        """Write ``checkpoints/step-<step>``, whole or not at all; older ones beyond ``keep`` go.

        ``seconds`` is how long the run has taken up to this step, ``learned`` the digest of what it learns from.

        Raises:
            InputError: the disk is full or not writable; what was there before stays.
        """
        target = self.checkpoints / f"step-{step:08d}"
        try:
            with atomic_folder(target) as folder:
                _write_tensors(folder, files)
                record_files(folder, step, seconds, learned)
        except InputError as error:
            before = next((path.name for _, path in self.steps()), "no save")
            raise InputError(
                f"{target} could not be written ({error.__cause__ or error}); free some space and continue with "
                f"--resume, from {before}"
            ) from error
        for _, old in self.steps()[keep:]:
            remove_folder(old)
        return target

    def steps(self) -> list[tuple[int, Path]]:
        """Checkpoints on disk, newest first by step number."""
        found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in self.checkpoints.glob("step-*"))
        return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)

    def newest(self, say: Callable[[str], None] = lambda _: None) -> tuple[int, Path] | None:
        """The newest checkpoint whose files are whole; ``say`` is told of each that is passed over."""
        for step, path in self.steps():
            fault = check_folder(path)
            if fault is None:
                return step, path
            say(f"{path}: {fault}; falling back to the checkpoint before it")
        return None

    def truncate_metrics(self, step: int) -> None:
        """Drop what was logged after the checkpoint that the run goes on from, and a line that a kill cut short."""
        if self.metrics.exists():
            lines = [line for line in self.metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
            write_text(self.metrics, "".join(line for line in lines if json.loads(line)["step"] <= step))


def saved_config(run: Path | str) -> Config | None:
    """The configuration of the run in a folder, if there is a readable one."""
    saved = Path(run) / "config.yaml"
    try:
        return Config.parse(yaml.safe_load(saved.read_text()), str(saved))
    except (OSError, InputError, yaml.YAMLError):
        return None


def _write_tensors(folder: Path, files: Files) -> None:
    """Write each file of whole tensors. Raises SafetensorError when the disk is full."""
    for name, tensors in files.items():
        seen: set[int] = set()
        content = {}
        for key, value in tensors.items():
            value = value.contiguous()
            # 8-bit AdamW's tables are one tensor for all parameters, which the format does not allow.
            content[key] = value.clone() if value.numel() and value.data_ptr() in seen else value
            seen.add(value.data_ptr())
        save_file(content, folder / name)


def record_files(folder: Path, step: int, seconds: float, learned: str) -> None:
    """Write a checkpoint's ``complete.json``: step, seconds of training, what it learns from, and every file."""
    files = {path.name: [path.stat().st_size, file_digest(path)] for path in sorted(folder.iterdir())}
    record = {"step": step, "seconds": seconds, "learned": learned, "files": files}
    (folder / COMPLETE).write_text(json.dumps(record, indent=1))


def seconds_of(path: Path) -> float:
    """Seconds of the run up to a checkpoint; 0 if an earlier version did not record them."""
    return json.loads((path / COMPLETE).read_text()).get("seconds", 0.0)


def require_learned(path: Path, learned: str, single: str | None) -> None:
    """Raise InputError if a checkpoint's run learned from other data than now; ``learned`` is the digest of these.

    ``single`` names a layer of a single value, which earlier versions did not learn, if there is one.
    """
    before = json.loads((path / COMPLETE).read_text()).get("learned")
    if before is None and single is not None:
        what = f"is of a version that took {single!r}, a single value, from the first checkpoint; this one learns it"
        raise InputError(f"{path} {what}; start anew with --overwrite")
    if before is not None and before != learned:
        what = "learned from other checkpoints or labels than the zoo has now"
        raise InputError(f"{path} {what}; give it back the zoo that it began with, or start anew with --overwrite")


def check_folder(path: Path) -> str | None:
    """A fault of a checkpoint, or None if every file is as it was written."""
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


def _first_difference(old: object, new: object, free: set[str], field: str = "") -> tuple[str, object, object] | None:
    """The first field, of those that are not ``free``, in which two configurations differ, with both values."""
    if field in free or old == new:
        return None
    if not isinstance(old, dict) or not isinstance(new, dict):
        return field, old, new
    parts = (_first_difference(old.get(key), new.get(key), free, f"{field}.{key}".lstrip(".")) for key in old | new)
    return next(filter(None, parts), None)
