"""What the checkpoints of a zoo have in common, found out as they are read one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import (
    SUFFIXES,
    Checkpoint,
    Structure,
    bytes_of,
    is_counter,
    num_not_finite,
    read_state_dict,
    same_tensors,
)
from tokenization.checkpoint.safetensors import TensorSpec, dtype_name, is_learned, tensor_at
from tokenization.checkpoint.weights import Chosen
from tokenization.errors import InputError

_CHUNK_BYTES = 1 << 24
_FIRST_BYTES = 64
"""Of two tensors, that are compared before the rest is read."""


class Comparison:
    """Compares checkpoints in names, shapes, what cannot be learned of them, and which tensors are copies.

    Numbers are learned, whatever they are, if they are finite. Everything else (integers, NaN, infinities) is compared
    by digest. Keys whose values are the same in every checkpoint are ties, be they one memory or copies in the file.

    Args:
        expected: the structure of a zoo that has checkpoints already, whose ties no longer change; None for a new one.
    """

    def __init__(self, expected: Structure | None = None) -> None:
        self._expected = expected
        self._specs: dict[str, TensorSpec] = {}
        self._digests: dict[str, tuple[str, str]] = {}  # of what is not learned: digest, and the file it is of
        self._codes: set[str] = set()
        self._groups: dict[str, str] = {}  # keys of one group were the same in all checkpoints
        self._copies: set[str] = set()  # keys that are more than the same number over and over
        self._ordered = False
        self._tied: set[str] = set()
        self._num = 0
        self._first = ""
        self.counters: set[str] = set()
        self.varying: dict[str, tuple[str, str]] = {}

    def add_checkpoint(self, checkpoint: Checkpoint, where: str) -> None:
        """`add` of a checkpoint, one tensor at a time through the memory map."""
        self.add(Structure.of_checkpoint(checkpoint), checkpoint.flat, where)

    def add_state_dict(self, state_dict: Mapping[str, Tensor], where: str) -> None:
        """`add` of dense tensors in memory."""
        self.add(Structure.of_state_dict(state_dict), lambda name: state_dict[name].detach().reshape(-1), where)

    def add(self, found: Structure, flat: Callable[[str], Tensor], where: str) -> None:
        """Read a checkpoint and compare it with those before.

        Args:
            found: its structure.
            flat: the values of a tensor, 1-D.

        Raises InputError for another structure, values that are not finite unlike others', or nothing to learn.
        """
        twins = _twins(found, flat)
        if not self._num:
            self._start(found, twins)
            self._first = where
        for name, same in twins.items():
            if name in found.ties or (name != same and name not in self._copies and _varies(flat(name))):
                self._copies |= {name, same}
        self._match_names(twins)
        (self._expected or self.structure).require(found, where, twins)
        for alias, name in (self._expected.ties if self._expected is not None else {}).items():
            if twins[alias] != twins[name]:
                what = f"{tensor_at(where, alias)} is not a copy of {name!r}, to which it is tied in the zoo"
                raise InputError(f"{what}; leave this checkpoint out, or collect all of them into a new zoo")
        pairs: dict[tuple[str, str], str] = {}
        self._groups = {name: pairs.setdefault((group, twins[name]), name) for name, group in self._groups.items()}
        self._num += 1
        for name in found.tensors:
            self._compare(name, flat(name), where)
        numbers = [name for name, spec in found.tensors.items() if is_learned(spec[0])]
        if numbers and all(name in self._digests for name in numbers):
            what = f"{tensor_at(where, numbers[0])} is empty or not finite, and so is all else that could be learned"
            raise InputError(f"{what}; save the trained network (with ZeRO stage 3, gather its weights first)")

    @property
    def structure(self) -> Structure:
        """What all of them have in common: a key is tied to the first whose values were the same in all of them."""
        if self._expected is not None:
            return Structure(self._expected.tensors, self._expected.ties, self._expected.ordered, self._not_finite)
        ties = {name: group for name, group in self._groups.items() if name != group and name in self._copies}
        tensors = {name: spec for name, spec in self._specs.items() if name not in ties}
        ordered = self._ordered and ties.keys() >= self._tied  # where a tie's own place was is not known
        return Structure(tensors, ties, ordered, self._not_finite)

    @property
    def notices(self) -> list[str]:
        """A line for each thing that a user should know before anything is trained."""
        lines = []
        if self.counters:
            names = sorted({name.rpartition(".")[2] for name in self.counters})
            lines.append(f"{', '.join(names)}: counters differ; generated networks have the first checkpoint's")
        for name, files in list(self.varying.items())[:3]:
            lines.append(varying_constant(name, self._specs[name][0], *files))
        if len(self.varying) > 3:
            lines.append(f"… and so do {len(self.varying) - 3} tensors more")
        return lines

    @property
    def _not_finite(self) -> frozenset[str]:
        return frozenset(name for name in self._digests if is_learned(self._specs[name][0]))

    def _start(self, found: Structure, twins: dict[str, str]) -> None:
        self._specs = {**found.tensors, **{alias: found.tensors[name] for alias, name in found.ties.items()}}
        self._ordered = found.ordered
        self._groups, self._tied = dict(twins), set(found.ties)
        if self._expected is not None:
            ties = self._expected.ties
            self._groups = {**{name: name for name in self._expected.tensors}, **ties}
            self._copies = {*ties, *ties.values()}
        for base in {name.removesuffix(last[-1]) for name in found.tensors for last in SUFFIXES.values()}:
            for suffixes in SUFFIXES.values():
                if len(suffixes) > 1 and all(base + suffix in found.tensors for suffix in suffixes):
                    self._codes |= {base + suffix for suffix in suffixes}

    def _match_names(self, twins: dict[str, str]) -> None:
        """Bring in keys that a file leaves out because another of its tensors is the same."""
        for name in [name for name in self._groups if name not in twins and name in self._copies]:
            same = next((n for n in twins if n in self._groups and self._groups[n] == self._groups[name]), None)
            if same is not None:
                twins[name] = twins[same]
        for name in [name for name in twins if name not in self._groups and name in self._copies]:
            same = next((n for n in self._groups if twins.get(n) == twins[name]), None)
            if same is not None and self._expected is None:
                self._groups[name], self._specs[name] = self._groups[same], self._specs[same]

    def _compare(self, name: str, values: Tensor, where: str) -> None:
        name_of_first, learned = self._digests.get(name), is_learned(values.dtype)
        faults = num_not_finite(values) if learned else 0
        if learned and not faults and name_of_first is None and values.numel():
            return
        digest = _digest(values)
        if self._num == 1:
            self._digests[name] = (digest, where)
            return
        if learned and (name_of_first is None or name_of_first[0] != digest):
            at, other = (where, self._first) if faults else (self._first, where)
            what = f"{tensor_at(at, name)} has NaN or infinity" + (f" ({faults} of its values)" if faults else "")
            raise InputError(f"{what}, unlike {other}; leave this checkpoint out")
        if name_of_first is not None and name_of_first[0] != digest:
            if is_counter(name, values.dtype, values.numel()):
                self.counters.add(name)
            elif name not in self._codes:
                self.varying.setdefault(name, (name_of_first[1], where))


def varying_constant(name: str, dtype: torch.dtype, first: str, other: str) -> str:
    """What to say of a tensor that is not learned although it differs between two files."""
    return (
        f"{tensor_at(first, name)} ({dtype_name(dtype)}) differs in {other}, and only finite floating-point values "
        "are learned; list it in tokens.exclude to give every network the first checkpoint's, or, if it holds codes of "
        "quantised weights, collect the weights dequantised"
    )


def _twins(found: Structure, flat: Callable[[str], Tensor]) -> dict[str, str]:
    """Each key's first key with the same values in this checkpoint: itself, if there is no other."""
    twins: dict[str, str] = {}
    alike: dict[object, list[str]] = {}
    for name, (dtype, shape) in found.tensors.items():
        twins[name] = name
        values = bytes_of(flat(name))
        if not values.numel() or not is_learned(dtype):
            continue
        others = alike.setdefault((dtype, shape, values[:_FIRST_BYTES].numpy().tobytes()), [])
        same = next((other for other in others if torch.equal(bytes_of(flat(other)), values)), None)
        if same is None:
            others.append(name)
        else:
            twins[name] = same
    return {**twins, **{alias: twins[name] for alias, name in found.ties.items()}}


def _varies(values: Tensor) -> bool:
    """Whether values are more than one number over and over, which are the same in many tensors by chance."""
    return values.numel() > 1 and not bool((values == values[0]).all())


def _digest(values: Tensor) -> str:
    digest, data = hashlib.blake2b(digest_size=16), bytes_of(values).numpy().data
    for start in range(0, len(data), _CHUNK_BYTES):
        digest.update(data[start : start + _CHUNK_BYTES])
    return digest.hexdigest()


_LOOK_BYTES = 4096


def fingerprint(weights: Mapping[str, Tensor] | Checkpoint) -> str:
    """A digest of names, shapes and the ends of every tensor: equal of equal networks, whatever file they lie in."""
    digest = hashlib.sha256()
    names = weights.tensors if isinstance(weights, Checkpoint) else weights
    for name in sorted(names):
        if isinstance(weights, Checkpoint):
            shape, flat = weights.tensors[name].shape, weights.flat(name)
        else:
            shape, flat = tuple(weights[name].shape), weights[name].reshape(-1)
        most = max(1, _LOOK_BYTES // flat.dtype.itemsize)
        digest.update(f"{name} {flat.dtype} {list(shape)} ".encode(errors="surrogatepass"))
        for part in (flat[:most], flat[-most:]):
            digest.update(bytes_of(part).numpy().tobytes())
    return digest.hexdigest()


def are_twins(first: Path, second: Path, chosen: Chosen) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    return same_tensors(read_state_dict(first, chosen), read_state_dict(second, chosen))
