"""The compressed weights of a zoo: found, brought into the form that becomes tokens, and stored again.

In that form each is two tensors of floats (`tokenization.compressed.parts`), computed once and kept in the zoo's
folder ``cache``. Everything else a checkpoint holds stays as it is.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, StateDict, TensorInfo, fits
from tokenization.checkpoint.tensor_file import Closing, TensorFile, save_checkpoint
from tokenization.compressed.parts import Part, find_parts, share_out
from tokenization.errors import InputError
from tokenization.files import temporary_name
from tokenization.zoo.cache import MARK, Form, cached_tensors
from tokenization.zoo.zoo import Zoo

VERSION = 1


class Compressed(Form):
    """Brings checkpoints of one structure into the form of tokens, and state dicts back into the zoo's.

    ``sparsity`` is the share of zeros among the pruned weights of what is stored again; the zoo's when None.
    """

    def __init__(self, parts: Sequence[Part], order: Sequence[str]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.order = tuple(order)
        self.sparsity: float | None = None

    @classmethod
    def find(cls, checkpoint: Checkpoint, zeros: Sequence[str] = ()) -> Compressed | None:
        """The compressed weights of one checkpoint; None without. The zeros of tensors like ``zeros`` are masks.

        Raises InputError if a pattern fits nothing, sizes contradict each other, or a compressed weight is tied.
        """
        for pattern in zeros:
            if not any(fits(name, pattern, checkpoint.tensors) for name in checkpoint.tensors):
                what = f"tokens.pruned: {pattern!r} fits no tensor of {checkpoint.path}"
                raise InputError(f"{what}; write glob patterns of tensor names")
        specs = checkpoint.specs
        if not checkpoint.sizes:  # nothing can be read of it: only what needs no shape is found
            specs = {name: spec for name, spec in specs.items() if not name.endswith(("_crow_indices", "_packed"))}
        meant = {name for name in specs for pattern in zeros if fits(name, pattern, specs)}
        parts = find_parts(specs, lambda name: checkpoint.flat(name).tolist(), meant)
        stored = {name for part in parts for name in part.stored}
        for alias, name in checkpoint.ties.items():
            if name in stored:
                raise InputError(f"{checkpoint.path}: {alias!r} is tied to the compressed {name!r}; store it untied")
        return cls(parts, checkpoint.order) if parts else None

    def measured(self, zoo: Zoo, indices: Sequence[int]) -> Compressed:
        """With the zoo's own number of living values in each pruned weight."""
        parts = []
        for part in self.parts:
            if part.kind in ("mask", "zeros"):
                name = list(part.stored)[-1]
                counts = [int(zoo.checkpoint(index).flat(name).count_nonzero()) for index in indices]
                alive = round(sum(counts) / len(counts))
                part = replace(part, alive=alive, varies=len(set(counts)) > 1)
            parts.append(part)
        return Compressed(parts, self.order)

    def with_sparsity(self, sparsity: float) -> Compressed:
        """The same, that stores masks of another share. Raises InputError if it is not a share."""
        if not 0 <= sparsity <= 1:
            raise InputError(f"sparsity is {sparsity}, but it is a share of zeros; give one of 0 to 1")
        changed = copy.copy(self)
        Form.__init__(changed)
        changed.sparsity = sparsity
        return changed

    @property
    def zoo_sparsity(self) -> float | None:
        """The zoo's share of zeros among the pruned weights; None where nothing is pruned."""
        pruned = [part for part in self.parts if part.pruned]
        total = sum(part.num_values for part in pruned)
        return 1 - sum(part.alive for part in pruned) / total if pruned else None

    @functools.cached_property
    def key(self) -> str:  # type: ignore[override]
        """SHA-256 (hexadecimal) of all that decides the form."""
        parts = [{**part.to_json(), "alive": 0, "varies": False} for part in self.parts]
        return hashlib.sha256(json.dumps([VERSION, "compressed", parts]).encode()).hexdigest()

    def describe(self, checkpoint: Checkpoint) -> Checkpoint:
        """Names, dtypes and shapes of a checkpoint in this form; its values cannot be read."""

        def infos(part: Part) -> dict[str, TensorInfo]:
            return {name: TensorInfo(name, *spec, checkpoint.path, 0) for name, spec in part.tokens.items()}

        return self._opened_as(checkpoint, self._merge(checkpoint.tensors, infos), {})

    def _open(self, zoo: Zoo, index: int) -> Checkpoint:
        return self.open(zoo, zoo.checkpoint(index), zoo.digest_of(index))

    def open(self, zoo: Zoo, original: Checkpoint, digest: str) -> Checkpoint:
        """A checkpoint in this form, from the zoo's cache, under the checkpoint's digest."""

        def write(file: TensorFile) -> None:
            for part in self.parts:
                for name, tensor in zip(part.tokens, part.expand(original.flat, str(original.path)), strict=True):
                    file.write(name, 0, tensor)

        specs = {name: spec for part in self.parts for name, spec in part.tokens.items()}
        cached = cached_tensors(zoo, "compressed", [self.key, digest], specs, write)
        infos = self._merge(original.tensors, lambda part: {name: cached.tensors[name] for name in part.tokens})
        return self._opened_as(original, infos, cached.sizes)

    def _opened_as(self, original: Checkpoint, infos: dict[str, TensorInfo], sizes: Mapping[Any, int]) -> Checkpoint:
        order = list(self._merge(dict.fromkeys(original.order), lambda part: dict.fromkeys(part.tokens)))
        metadata = {**original.metadata, MARK: self.key}
        return replace(original, tensors=infos, order=order, metadata=metadata, sizes={**original.sizes, **sizes})

    def expand(self, network: StateDict) -> dict[str, Tensor]:
        """A state dict, as it is stored, in this form. Raises InputError if a tensor is missing or broken."""
        missing = [name for part in self.parts for name in part.stored if name not in network]
        if missing:
            what = f"tensor {missing[0]!r} is missing from the state dict"
            raise InputError(f"{what}; give a network stored as the zoo's")
        return self._merge(network, lambda part: dict(zip(part.tokens, part.expand(network.__getitem__), strict=True)))

    def compress(self, expanded: StateDict) -> dict[str, Tensor]:
        """A state dict in this form → as the zoo's checkpoints are stored: masks cut, codes rounded."""
        wanted = {} if self.sparsity is None else self._alive(self.sparsity)
        stored = {name: tensor for name, tensor in expanded.items() if name not in self._token_names}
        for part in self.parts:
            first, second = (expanded[name] for name in part.tokens)
            stored |= part.restore(first, second, wanted.get(part.name))
        return {name: stored[name] for name in self.order}

    def again(self, network: StateDict) -> dict[str, Tensor]:
        """A dense network, as if it had been pruned by magnitude or quantised as the zoo's are; dense again."""
        changed = {part.name: part.again(network[part.name]) for part in self.parts}
        return {**network, **changed}

    def _alive(self, sparsity: float) -> dict[str, int]:
        """How many values of each pruned weight live: in proportion to the zoo's numbers, none above its size."""
        pruned = [part for part in self.parts if part.pruned]
        sizes = [part.num_values for part in pruned]
        total = sum(sizes) - round(sparsity * sum(sizes))
        counts = share_out(total, [max(part.alive, 1) for part in pruned], sizes)
        return {part.name: count for part, count in zip(pruned, counts, strict=True)}

    @functools.cached_property
    def _token_names(self) -> set[str]:
        return {name for part in self.parts for name in part.tokens}

    def _merge(self, stored: Mapping[str, Any], tokens: Any) -> dict[str, Any]:
        """Entries by stored name, those of each part (in place of its first) replaced by ``tokens(part)``."""
        first = {next(name for name in stored if name in part.stored): part for part in self.parts}
        others = {name for part in self.parts for name in part.stored} - set(first)
        result: dict[str, Any] = {}
        for name, value in stored.items():
            if name in first:
                result |= tokens(first[name])
            elif name not in others:
                result[name] = value
        return result

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"order": list(self.order), "weights": [part.to_json() for part in self.parts]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Compressed:
        """Read what ``to_json`` wrote. Raises KeyError, TypeError or ValueError if it is something else."""
        return cls([Part.from_json(each) for each in content["weights"]], [str(name) for name in content["order"]])


def dense(network: StateDict) -> StateDict:
    """A state dict with dense weights in place of any compressed ones. Raises InputError if those are broken."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in network.items()}
    parts = find_parts(specs, lambda name: network[name].tolist())
    if not parts:
        return network
    form = Compressed(parts, list(network))
    return form._merge(network, lambda part: {part.name: part.dense(*part.expand(network.__getitem__))})


class CompressedWriter(Closing):
    """`CheckpointWriter` for compressed weights: a mask is cut once all of its logits are there.

    One network, in the form of its tokens, is in memory while the file is closed. ``open_writer`` writes that form.
    Raises InputError as it does.
    """

    def __init__(
        self, path: Path | str, form: Compressed, open_writer: Callable[[Path], Any], metadata: Mapping[str, str] | None
    ) -> None:
        self.path, self.form, self.metadata = Path(path), form, dict(metadata or {})
        self.process = os.getpid()
        self.expanded = temporary_name(self.path)
        self._writer = open_writer(self.expanded)

    def write(self, first_token: int, rows: Tensor) -> None:
        """Write tokens ``first_token …``. Raises ValueError if they do not fit into the layout."""
        self._writer.write(first_token, rows)

    def close(self) -> None:
        """Put the file in place; in another process's copy, only stop writing. Raises as `CheckpointWriter.close`."""
        self._writer.close()
        if self.process != os.getpid() or not self.expanded.exists():
            return
        try:
            stored = self.form.compress(Checkpoint.open(self.expanded).state_dict())
            save_checkpoint(self.path, stored, self.metadata, materialize_ties=True)
        finally:
            self.expanded.unlink(missing_ok=True)

    def abort(self) -> None:
        """Drop all that was written. Harmless when repeated."""
        self._writer.abort()
