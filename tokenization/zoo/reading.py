"""Reading a user's checkpoints one after the other: each is checked, and what all must agree in is kept."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, has_plain_names, pickled_files, read_weights
from tokenization.checkpoint.structure import Structure
from tokenization.checkpoint.weights import Chosen, NoWeightsError, common_prefix
from tokenization.errors import InputError
from tokenization.lora.adapter import is_adapter, read_adapter_config
from tokenization.lora.collected import CollectedAdapters
from tokenization.zoo.comparison import Comparison
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
    """One checkpoint that is read and checked.

    Attributes:
        row: where it was named.
        fingerprint: of its tensors.
        adopted: it stays where it is; None: to be converted.
        factors: of adapters with another scaling than the zoo's, what tensors are multiplied by.
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

    def read(self, rows: Sequence[Row], progress: Callable[[int, int], None] | None) -> list[Source]:
        """Read and check all; those without weights are left out where others have some, bad ones if that was asked."""
        sources: list[Source] = []
        notes: Counter[str] = Counter()
        empty: list[NoWeightsError] = []
        bad: list[InputError] = []
        if self.zoo.entries and rows:
            self.comparison.add_checkpoint(Checkpoint.open(self.zoo.file(0)), str(self.zoo.file(0)))
        for index, row in enumerate(rows):
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
            if progress is not None:
                progress(index + 1, len(rows))
        if not sources and (empty or bad):
            raise [*bad, *empty][0]
        for note, count in notes.items():
            self.say(f"{note} ({count} of {len(sources)} checkpoints)")
        if empty:
            more = f" (and {len(empty) - 1} more such)" if len(empty) > 1 else ""
            self.say(f"left out: {str(empty[0]).partition(';')[0]}{more}")
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
        left = {id(each) for each, _ in kept.values()}
        return [pair for pair in sources if keep or id(pair[0]) in left]


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
