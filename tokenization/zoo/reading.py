"""Reading a user's checkpoints: which files are meant, in which order, and what all of them must agree in."""

from __future__ import annotations

import copy
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, Structure, has_plain_names, read_weights
from tokenization.checkpoint.pickles import INDEX_SUFFIXES, SUFFIXES, kind_of, pickled_files
from tokenization.checkpoint.progress import steps
from tokenization.checkpoint.safetensors import natural_key, read_json, weight_map
from tokenization.checkpoint.weights import Chosen, NoWeightsError, common_prefix
from tokenization.errors import InputError
from tokenization.lora.adapter import CollectedAdapters, is_adapter, read_adapter_config
from tokenization.zoo.comparison import Comparison, are_twins, fingerprint
from tokenization.zoo.metadata_table import Label
from tokenization.zoo.zoo import Zoo


@dataclass(frozen=True)
class Row:
    """One checkpoint found: its path, where it was named, and what a table or pattern says of it."""

    path: Path
    where: str
    known: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One checkpoint that is read and checked. It stays where it is (``adopted``) or is to be converted.

    ``factors`` multiply tensors of adapters with another scaling than the zoo's.
    """

    row: Row
    fingerprint: str
    adopted: Checkpoint | None
    factors: Mapping[str, float]

    def state_dict(self, chosen: Chosen, structure: Structure | None) -> dict[str, Tensor]:
        """What the zoo is to store of it, in the zoo's order."""
        return in_order(scaled(read_weights(self.row.path, chosen).tensors, self.factors), structure)


class Reading:
    """Reads checkpoints one after the other and keeps what all of them must agree in."""

    def __init__(
        self, zoo: Zoo, adapters: CollectedAdapters, chosen: Chosen, skip_bad: bool, say: Callable[[str], None]
    ) -> None:
        self.zoo, self.adapters, self.chosen, self.skip_bad, self.say = zoo, adapters, chosen, skip_bad, say
        self.expected = zoo.structure if zoo.entries else None
        self.comparison = Comparison(self.expected)

    def read(self, rows: Sequence[Row]) -> list[Source]:
        """Read and check all; those without weights are left out where others have some, bad ones if that was asked."""
        sources: list[Source] = []
        notes: Counter[str] = Counter()
        empty: list[NoWeightsError] = []
        bad: list[InputError] = []
        if self.zoo.entries and rows:
            self.comparison.add_checkpoint(Checkpoint.open(self.zoo.file(0)), str(self.zoo.file(0)))
        for row in steps("reading", rows):
            before = copy.deepcopy(self.comparison) if self.skip_bad else self.comparison
            try:
                sources.append(self._read(row, notes))
            except NoWeightsError as error:
                empty.append(error)
            except InputError as error:
                if not self.skip_bad:
                    raise
                bad.append(error)
                self.comparison = before
        if not sources and (empty or bad):
            raise [*bad, *empty][0]
        for note, count in notes.items():
            self.say(f"{note} ({count} of {len(sources)} checkpoints)")
        if empty:
            self.say(f"left out: {str(empty[0]).partition(';')[0]}{and_more(empty)}")
        for notice in self.comparison.notices:
            self.say(notice)
        for fault in bad:
            self.say(f"skipped: {fault}")
        names = [*self.expected.tensors, *self.expected.ties] if self.expected is not None else []
        if not self.zoo.entries and not self.chosen.strip and (prefix := common_prefix(names)):
            self.say(f"every name begins with {prefix}; cut it off with --strip {prefix} if the network's own do not")
        return sources

    def _read(self, row: Row, notes: Counter[str]) -> Source:
        path, where = row.path, str(row.path)
        config = read_adapter_config(path) if is_adapter(path) else None
        checkpoint = None if pickled_files(path) else Checkpoint.open(path)
        if checkpoint is not None and not has_plain_names(checkpoint, self.chosen):
            checkpoint = None
        tensors: dict[str, Tensor] = {}
        if checkpoint is None:
            weights = read_weights(path, self.chosen)
            notes.update(weights.notes)
            tensors, structure = weights.tensors, Structure.of_state_dict(weights.tensors)
        else:
            structure = Structure.of_checkpoint(checkpoint)
        shapes = {name: shape for name, (_, shape) in structure.tensors.items()}
        read = tensors.__getitem__ if checkpoint is None else checkpoint.tensor
        factors = self.adapters.factors(path, config, shapes, read)
        if checkpoint is not None and not factors:
            self.comparison.add_checkpoint(checkpoint, where)
            found = fingerprint(checkpoint)
        else:
            tensors = scaled(tensors or read_weights(path, self.chosen).tensors, factors)
            checkpoint, tensors = None, in_order(tensors, self.expected)
            structure = Structure.of_state_dict(tensors)
            self.comparison.add_state_dict(tensors, where)
            found = fingerprint({name: tensors[name] for name in structure.tensors})
        self.expected = self.expected or structure
        return Source(row, found, checkpoint, factors)

    def without_twins(self, sources: Sequence[tuple[Source, Label]], keep: bool) -> list[tuple[Source, Label]]:
        """Each network once: of the same one under two names, that with a step of its own; the rest is reported.

        ``keep`` only reports what is there twice, where the user named every checkpoint's run and step.
        """
        kept: dict[tuple[str, Any], tuple[Source, Label]] = {}
        twins: list[tuple[Path, Path]] = []
        there = {fingerprint(self.zoo.checkpoint(index)): self.zoo.file(index) for index in range(len(self.zoo))}
        for each, label in sources:
            path, key = each.row.path, (each.fingerprint, label.condition)
            if (old := there.get(each.fingerprint)) and label.condition is None and are_twins(old, path, self.chosen):
                twins.append((path, old))
                continue
            if key not in kept or not are_twins(path, kept[key][0].row.path, self.chosen):
                kept[key if key not in kept else (str(path), key)] = (each, label)
                continue
            first, its_label = kept[key]
            if (its_label.step == 0, its_label.step) > (label.step == 0, label.step):
                kept[key] = (each, label)
                twins.append((first.row.path, path))
            else:
                twins.append((path, first.row.path))
        if twins:
            what = "kept, as table or pattern name both" if keep else "counted once"
            self.say(f"{what}: {twins[0][0]} is the same network as {twins[0][1]}{and_more(twins)}")
        left = {id(each) for each, _ in kept.values()}
        return [pair for pair in sources if keep or id(pair[0]) in left]


def and_more(found: Sequence[Any]) -> str:
    """What to say of all but the first."""
    return f" (and {len(found) - 1} more such)" if len(found) > 1 else ""


def in_order(state_dict: Mapping[str, Tensor], structure: Structure | None) -> dict[str, Tensor]:
    """A converted state dict in the zoo's order, so that pickles and safetensors mix."""
    if structure is None:
        return dict(state_dict)
    names = [name for name in [*structure.tensors, *structure.ties] if name in state_dict]
    return {name: state_dict[name] for name in names} | dict(state_dict)


def scaled(state_dict: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors, those that have a factor multiplied by it."""
    done = {name: (state_dict[name].double() * factor).to(state_dict[name].dtype) for name, factor in factors.items()}
    return {**state_dict, **done}


CONVERTED_NAME = re.compile(r"[0-9]{6}\.safetensors")
"""How `Zoo.append` names files in ``checkpoints/``."""

_FOLDER_FILES = {
    stem + suffix
    for stem in ("model", "diffusion_pytorch_model", "pytorch_model")
    for suffix in (".safetensors", ".bin", *INDEX_SUFFIXES)
}
"""A folder that holds one of these is one checkpoint."""

_SURE = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".th", ".pyth")
"""Endings of files that are checkpoints or broken ones; of others the content decides."""


def find_checkpoints(source: Path | str, zoo_path: Path | None = None, ignored: list[str] | None = None) -> list[Path]:
    """The checkpoints (files, or folders that hold one) that a path or glob stands for, ``step2`` before ``step10``.

    Args:
        zoo_path: a zoo whose own files are not sources: those it converted, and all if it lies in the source.
        ignored: takes a line on each file of a folder that is left out and may have been meant.

    Raises InputError if there are none.
    """
    text = str(source)
    matches = [Path(text)] if os.path.exists(text) else [Path(match) for match in glob.glob(text, recursive=True)]
    if not matches:
        raise InputError(f"{text} does not exist; give a folder or glob of checkpoints")
    found: dict[Path, None] = {}
    left_out: list[str] = []
    for path in sorted(matches, key=lambda path: natural_key(path.as_posix())):
        if path.is_dir():
            found |= dict.fromkeys(_search(path, zoo_path, left_out))
        elif path.name.startswith("adapter_model.") and is_adapter(path.parent):
            found[path.parent] = None
        else:
            found[path] = None
    # A glob such as ** matches a folder and what is in it alike.
    inside = {path: folder for path in found if not path.is_dir() for folder in path.parents if folder in found}
    left_out += dict.fromkeys(_within(path.parent) for path, folder in inside.items() if path.parent != folder)
    found = {path: None for path in found if path not in inside}
    if zoo_path is not None:
        own = (zoo_path / "checkpoints").resolve()
        converted = [path for path in found if path.resolve().parent == own and CONVERTED_NAME.fullmatch(path.name)]
        found = {path: None for path in found if path not in converted}
    if not found:
        what = f"has no checkpoint that is read: {left_out[0]}" if left_out else "has no checkpoint in it"
        raise InputError(f"{text} {what}" + ("" if left_out else "; name the files, or another folder"))
    if ignored is not None:
        ignored += dict.fromkeys(left_out)
    return list(found)


def folder_of(source: Path | str) -> Path:
    """The folder that a source is, or lies in; of a glob the part before its first pattern."""
    path = Path(source)
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _search(
    folder: Path, zoo_path: Path | None, left_out: list[str], seen: set[Path] | None = None, whole: bool = False
) -> list[Path]:
    """The checkpoints in a folder; ``whole``: it lies in one, so that loose files belong to that."""
    seen = set() if seen is None else seen
    seen.add(folder.resolve())  # links may lead in circles
    try:
        children = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise InputError(f"{folder} is unreadable ({error.strerror}); make it readable or name another") from error
    names = {child.name for child in children}
    if is_adapter(folder) or not names.isdisjoint(_FOLDER_FILES):
        found, whole = [folder], True
    else:
        indices = [child for child in children if child.name.endswith(INDEX_SUFFIXES)]
        shards: set[str] = set()
        for index in indices:
            shards.update(weight_map(read_json(index)).values())
        files = [child for child in children if child.name not in shards and _is_checkpoint(child, left_out)]
        found = sorted([*indices, *files], key=lambda path: natural_key(path.name))
        if whole and found:
            left_out.append(_within(folder))
            found = []
    for child in children:
        if not child.is_dir() or child.name.startswith(".") or child.resolve() in seen:
            continue
        if zoo_path is None or child.resolve() != zoo_path.resolve():
            found += _search(child, zoo_path, left_out, seen, whole)
    return found


def _within(folder: Path) -> str:
    return f"{folder} lies in a folder that is a checkpoint; name it to take its files"


def _is_checkpoint(file: Path, left_out: list[str]) -> bool:
    """Whether a file that was not named by itself is to be read; one of another program is left out."""
    if file.is_dir() or file.name.startswith(".") or file.name.endswith(INDEX_SUFFIXES):
        return False
    if file.suffix in _SURE:
        return True
    try:
        kind = kind_of(file) if file.is_file() else "unknown"
    except InputError as error:
        left_out.append(str(error))
        return False
    return kind in ("safetensors", "torch") or (kind == "pickle" and file.suffix in SUFFIXES)
