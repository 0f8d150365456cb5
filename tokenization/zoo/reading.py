"""Reading a user's checkpoints one after the other: each is checked, and what all must agree in is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, has_plain_names, pickled_files, read_weights
from tokenization.checkpoint.structure import Structure, check_checkpoint_values, check_values
from tokenization.checkpoint.weights import Chosen, NoWeightsError, common_prefix
from tokenization.errors import InputError
from tokenization.lora.adapter import (
    CONFIG_NAME,
    check_adapter_tensors,
    is_adapter,
    read_adapter_config,
    require_same_config,
)
from tokenization.zoo.metadata_table import Label
from tokenization.zoo.twins import are_twins, fingerprint
from tokenization.zoo.zoo import Zoo


@dataclass(frozen=True)
class Row:
    """One checkpoint found: its path, where it was named, and what a table or pattern says of it."""

    path: Path
    where: str
    known: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One checkpoint that is read and checked: its row, fingerprint, and whether it stays where it is."""

    row: Row
    fingerprint: str
    adopted: Checkpoint | None


class Reading:
    """Reads checkpoints one after the other and keeps what all of them must agree in.

    Attributes:
        adapter: folder of the first adapter.
    """

    def __init__(self, zoo: Zoo, chosen: Chosen, skip_bad: bool, say: Callable[[str], None]) -> None:
        self.zoo, self.chosen, self.skip_bad, self.say = zoo, chosen, skip_bad, say
        self.expected = zoo.structure if zoo.entries else None
        self.adapter: Path | None = None
        self._reference: tuple[dict[str, Any], Path] | None = None
        if (zoo.path / CONFIG_NAME).is_file() and zoo.entries:
            self._reference = (read_adapter_config(zoo.path), zoo.path)

    def read(self, rows: Sequence[Row], progress: Callable[[int, int], None] | None) -> list[Source]:
        """Read and check all; those without weights are left out where others have some, bad ones if that was asked."""
        sources: list[Source] = []
        notes: Counter[str] = Counter()
        empty: list[NoWeightsError] = []
        bad: list[InputError] = []
        for index, row in enumerate(rows):
            try:
                sources.append(self._read(row, notes))
            except NoWeightsError as error:
                empty.append(error)
            except InputError as error:
                if not self.skip_bad:
                    raise
                bad.append(error)
            if progress is not None:
                progress(index + 1, len(rows))
        if not sources and (empty or bad):
            raise [*bad, *empty][0]
        for note, count in notes.items():
            self.say(f"{note} ({count} of {len(sources)} checkpoints)")
        if empty:
            more = f" (and {len(empty) - 1} more such)" if len(empty) > 1 else ""
            self.say(f"left out: {str(empty[0]).partition(';')[0]}{more}")
        for fault in bad:
            self.say(f"skipped: {fault}")
        names = [*self.expected.tensors, *self.expected.ties] if self.expected is not None else []
        if not self.zoo.entries and not self.chosen.strip and (prefix := common_prefix(names)):
            self.say(f"every name begins with {prefix}; cut it off with --strip {prefix} if the network's own do not")
        return sources

    def _read(self, row: Row, notes: Counter[str]) -> Source:
        path, where = row.path, str(row.path)
        config = read_adapter_config(path) if is_adapter(path) else None
        if config is not None:
            require_same_config(config, path, *(self._reference or (config, path)))
        checkpoint = None if pickled_files(path) else Checkpoint.open(path)
        if checkpoint is not None and has_plain_names(checkpoint, self.chosen):
            structure = Structure.of_checkpoint(checkpoint)
            if self.expected is not None:
                self.expected.require(structure, where)
            check_checkpoint_values(checkpoint, where)
            found = fingerprint(checkpoint)
        else:
            checkpoint, weights = None, read_weights(path, self.chosen)
            notes.update(weights.notes)
            state_dict = in_order(weights.tensors, self.expected)
            structure = Structure.of_state_dict(state_dict)
            check_values(state_dict, where)
            found = fingerprint({name: state_dict[name] for name in structure.tensors})
        if config is not None:
            check_adapter_tensors({name: shape for name, (_, shape) in structure.tensors.items()}, config, path)
            self._reference = self._reference or (config, path)
            self.adapter = self.adapter or path
        (self.expected or structure).require(structure, where)
        self.expected = self.expected or structure
        return Source(row, found, checkpoint)

    def without_twins(self, sources: Sequence[tuple[Source, Label]], keep: bool) -> list[tuple[Source, Label]]:
        """Each network once: of the same one under two names, that with a step of its own; the rest is said.

        Args:
            sources: all that were read, with their labels.
            keep: only say what is there twice, as the user named every checkpoint's run and step.
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
            copy, original = twins[0]
            more = f" (and {len(twins) - 1} more such)" if len(twins) > 1 else ""
            what = "kept, as table or pattern name both" if keep else "counted once"
            self.say(f"{what}: {copy} is the same network as {original}{more}")
        return list(sources if keep else kept.values())


def in_order(state_dict: Mapping[str, Tensor], structure: Structure | None) -> dict[str, Tensor]:
    """A converted state dict in the zoo's order, so that pickles and safetensors mix."""
    if structure is None:
        return dict(state_dict)
    names = [name for name in [*structure.tensors, *structure.ties] if name in state_dict]
    return {name: state_dict[name] for name in names} | dict(state_dict)
