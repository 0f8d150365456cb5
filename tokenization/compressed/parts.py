"""One compressed weight: how it is stored, what of it becomes tokens, and what a network computes with.

A pruned weight is values and a mask, a quantised one codes and a scale for each output channel. docs/formats.md says
which tensors a weight is stored as, ``SUFFIXES`` how they are called. In tokens it is two tensors of floats: values (0
where a weight is dead) and the mask as ±1, or codes and log scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenization.checkpoint.checkpoint import SUFFIXES
from tokenization.checkpoint.safetensors import DTYPES_BY_NAME, TensorSpec, dtype_name
from tokenization.errors import InputError

LARGEST = {8: 127, 4: 7}
"""The largest code of so many bits; the smallest that is made is its negative."""


def quantised(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes of a weight ``[out, …]`` for 8 or 4 bits, and its scales ``[out]``; weight ≈ codes · scale.

    Codes are whole numbers in float32; a channel's largest value gets the last one.
    """
    largest = weight.detach().flatten(1).abs().amax(1)
    scale = (largest / LARGEST[bits]).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / by_channel(scale, weight)).round(), scale


def by_channel(scale: Tensor, like: Tensor) -> Tensor:
    """Scales, one an output channel, in a shape that multiplies ``like`` ``[out, …]``."""
    return scale.reshape(-1, *[1] * (like.ndim - 1))


def packed(codes: Tensor) -> Tensor:
    """Codes -8 … 7 ``[out, …]`` → uint8 ``[out, rest / 2]`` rounded up."""
    flat = F.pad(codes.reshape(codes.shape[0], -1) + 8, (0, codes[0].numel() % 2), value=8)
    pairs = flat.to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpacked(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `packed` made of codes of ``shape``, int8."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return (pairs[:, : math.prod(shape[1:])].to(torch.int8) - 8).reshape(shape)


def scattered(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...], where: str) -> tuple[Tensor, ...]:
    """A dense tensor of values and its mask from compressed rows. Raises InputError where indices do not fit."""
    width, counts, columns = math.prod(shape[1:]), rows.long().diff(), columns.long()
    whole = int(rows[0]) == 0 and int(rows[-1]) == len(columns) and bool((counts >= 0).all())
    inside = whole and bool(((columns >= 0) & (columns < width)).all())
    places = torch.arange(shape[0]).repeat_interleave(counts) * width + columns if inside else columns
    if not inside or not bool((places.diff() > 0).all()):
        raise InputError(f"{where} has indices of compressed rows that do not fit; save the network again")
    dense, mask = torch.zeros(math.prod(shape), dtype=values.dtype), torch.zeros(math.prod(shape), dtype=torch.bool)
    dense[places], mask[places] = values, True
    return dense.view(shape), mask.view(shape)


def cut_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Which weights live, bool in the shape of ``scores``: those of the highest scores, of equal ones the earlier.

    Args:
        sparsity: share of weights that are zero, 0 … 1; their number is rounded. Raises InputError for others.
    """
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity is {sparsity}, but it is a share of zeros; give one of 0 to 1")
    alive = scores.numel() - round(sparsity * scores.numel())
    mask = torch.zeros_like(scores, dtype=torch.bool).flatten()
    mask[scores.flatten().argsort(descending=True, stable=True)[:alive]] = True
    return mask.view_as(scores)


def share_out(total: int, shares: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """``total`` living weights among tensors, in proportion to their shares, none above its size.

    Args:
        shares: of each tensor, above 0; what does not fit into one goes to the others.
        sizes: values of each tensor, of a sum of ``total`` or more.

    Returns:
        whole numbers that sum to ``total``; largest remainders are rounded up.
    """
    weights, room = (torch.tensor(each, dtype=torch.float64) for each in (shares, sizes))
    counts = torch.zeros_like(room)
    for _ in sizes:
        open_shares = torch.where(counts < room, weights, 0.0)
        counts += open_shares / open_shares.sum().clamp(min=1e-300) * (total - counts.sum())
        counts = counts.minimum(room)
    whole = (counts + 1e-9).floor()
    order = (counts - whole).argsort(descending=True, stable=True)
    whole[order[: total - int(whole.sum())]] += 1
    return [int(count) for count in whole.tolist()]


Kind = Literal["mask", "zeros", "csr", "int8", "int4"]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Part:
    """A compressed weight of all checkpoints of a zoo.

    Attributes:
        stored: dtype and shape of each stored tensor, by name, in the order of ``SUFFIXES``.
        alive: of a pruned weight: how many values live, on average over the zoo.
        varies: whether that number differs between the checkpoints.
    """

    kind: Kind
    name: str
    shape: tuple[int, ...]
    stored: Mapping[str, TensorSpec]
    alive: int = field(default=0, compare=False)
    varies: bool = field(default=False, compare=False)

    @property
    def pruned(self) -> bool:
        """Whether it has a mask; else it has codes."""
        return self.kind in ("mask", "zeros", "csr")

    @property
    def num_values(self) -> int:
        """How many values the weight has, dead ones included."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of values or scales."""
        return next(dtype for dtype, _ in self.stored.values() if dtype in FLOATS)

    @property
    def tokens(self) -> dict[str, TensorSpec]:
        """The two tensors that become tokens, by name."""
        if self.pruned:
            return {f"{self.name}_orig": (self.dtype, self.shape), f"{self.name}_mask": (torch.float32, self.shape)}
        scale = (torch.float64, self.stored[f"{self.name}_scale"][1])  # a logarithm that gives a float32 scale back
        return {f"{self.name}_codes": (torch.float32, self.shape), f"{self.name}_scale": scale}

    def expand(self, read: Read, where: str = "the state dict") -> tuple[Tensor, Tensor]:
        """Stored tensors, which ``read`` gives by name in any shape, → the two that become tokens.

        Raises InputError of ``where`` for mask values beside 0 and 1, indices that do not fit, scales of 0 or less.
        """
        found = []
        for name, (_, shape) in self.stored.items():
            tensor = read(name).detach().cpu()
            if tensor.numel() != math.prod(shape):
                raise InputError(f"{where}: {name!r} has {tensor.numel()} values, but the zoo's {math.prod(shape)}")
            found.append(tensor.reshape(shape))
        if self.kind in ("csr", "int4") and tuple(found[-1].tolist()) != self.shape:
            raise InputError(f"{where}: {self.name!r} has shape {found[-1].tolist()}, but the zoo's {list(self.shape)}")
        if not self.pruned:
            codes = unpacked(found[0], self.shape) if self.kind == "int4" else found[0]
            if not bool((found[1] > 0).all()):
                raise InputError(f"{where}: {self.name}_scale has values that are not above 0; quantise it anew")
            return codes.float(), found[1].double().log()
        if self.kind == "csr":
            values, mask = scattered(found[0], found[1], found[2], self.shape, f"{where}: {self.name!r}")
        else:
            values, mask = found[0], found[-1] != 0
            if self.kind == "mask" and not bool((found[1] == mask).all()):
                raise InputError(f"{where}: {self.name}_mask has values other than 0 and 1, so that it is not a mask")
        return torch.where(mask, values, torch.zeros((), dtype=values.dtype)), mask.float() * 2 - 1

    def restore(self, first: Tensor, second: Tensor, alive: int | None = None) -> dict[str, Tensor]:
        """Values and mask logits, or codes and log scales, of ``shape`` → the stored tensors: cut, rounded and clipped.

        ``alive`` values live; when None, as many as in the zoo, or those above 0 where that differs.
        """
        if not self.pruned:
            most = LARGEST[8 if self.kind == "int8" else 4]
            codes = first.round().clamp(-most - 1, most)
            tensors = [packed(codes) if self.kind == "int4" else codes, second.double().exp(), self._shape]
            return self._stored(tensors)
        if alive is None and self.varies:
            mask = second > 0
        else:
            mask = cut_mask(second, 1 - (self.alive if alive is None else alive) / self.num_values)
        return self.masked(first, mask)

    def masked(self, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Values and a bool mask of ``shape`` → the stored tensors; a value is stored as 0 where it is dead."""
        values = torch.where(mask, values, torch.zeros((), dtype=values.dtype))
        if self.kind != "csr":
            return self._stored([values, mask])
        flat = mask.reshape(self.shape[0], -1)
        rows = torch.cat([torch.zeros(1, dtype=torch.long), flat.sum(1).cumsum(0)])
        return self._stored([rows, flat.nonzero()[:, 1], values[mask], self._shape])

    def dense(self, first: Tensor, second: Tensor) -> Tensor:
        """What a network computes with: values under their mask, or codes times their channel's scale."""
        return torch.where(second > 0, first, 0) if self.pruned else first * by_channel(second.exp().float(), first)

    def again(self, weight: Tensor) -> Tensor:
        """A dense weight, as if it had been pruned by magnitude to the zoo's share or quantised, dense again."""
        if self.pruned:
            return weight * cut_mask(weight.abs(), 1 - self.alive / self.num_values)
        codes, scale = quantised(weight, 8 if self.kind == "int8" else 4)
        return codes * by_channel(scale, codes)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        stored = [[name, dtype_name(dtype), list(shape)] for name, (dtype, shape) in self.stored.items()]
        return {**asdict(replace(self, stored={})), "shape": list(self.shape), "stored": stored}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Part:
        """Read what ``to_json`` wrote. Raises KeyError, TypeError or ValueError if it is something else."""
        stored = {str(n): (DTYPES_BY_NAME[kind], tuple(int(s) for s in shape)) for n, kind, shape in content["stored"]}
        if content["kind"] not in get_args(Kind) or set(content) != set(cls.__dataclass_fields__):
            raise ValueError("a compressed weight of an unknown kind")
        shape = tuple(int(size) for size in content["shape"])
        return cls(content["kind"], content["name"], shape, stored, int(content["alive"]), bool(content["varies"]))

    @property
    def _shape(self) -> Tensor:
        return torch.tensor(self.shape)

    def _stored(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Under their names and in their dtypes and, but for indices and values of another sparsity, their shapes."""
        result = {}
        for (name, (dtype, shape)), tensor in zip(self.stored.items(), tensors, strict=False):
            result[name] = tensor.reshape(shape if tensor.numel() == math.prod(shape) else -1).to(dtype)
        return result


def new_part(kind: Kind, name: str, weight: Tensor, alive: int = 0) -> Part:
    """How a dense weight ``[out, …]`` of ``alive`` values is stored: indices int32, masks and scales in its dtype."""
    out, rest = weight.shape[0], weight[0].numel()
    shape = (torch.int64, (weight.ndim,))
    scale = (weight.dtype, (out,))
    floats = (weight.dtype, tuple(weight.shape))
    rows, columns, values = (torch.int32, (out + 1,)), (torch.int32, (alive,)), (weight.dtype, (alive,))
    specs: dict[str, list[TensorSpec]] = {
        "mask": [floats, floats],
        "zeros": [floats],
        "csr": [rows, columns, values, shape],
        "int8": [(torch.int8, tuple(weight.shape)), scale],
        "int4": [(torch.uint8, (out, -(-rest // 2))), scale, shape],
    }
    stored = dict(zip((name + suffix for suffix in SUFFIXES[kind]), specs[kind], strict=True))
    return Part(kind, name, tuple(weight.shape), stored, alive)


def find_parts(
    specs: Mapping[str, TensorSpec], shape_of: Callable[[str], Sequence[int]], zeros: Collection[str] = ()
) -> list[Part]:
    """The compressed weights among tensors, by names, dtypes and shapes.

    Args:
        shape_of: reads a ``w_shape``.
        zeros: names of weights whose zeros are their mask.

    Raises InputError if sizes contradict each other.
    """
    parts = []
    for name, (_, shape) in specs.items():
        for kind, suffixes in SUFFIXES.items():
            base = name.removesuffix(suffixes[0])
            names = [base + suffix for suffix in suffixes]
            if not name.endswith(suffixes[0]) or not base or not all(each in specs for each in names):
                continue
            stored = {each: specs[each] for each in names}
            if _is(kind, name, [*stored.values()], zeros):
                full = tuple(int(size) for size in shape_of(names[-1])) if kind in ("csr", "int4") else shape
                alive = stored[names[2]][1][0] if kind == "csr" else 0
                parts.append(Part(kind, base, full, stored, alive))  # type: ignore[arg-type]
                _require_sizes(parts[-1])
                break
    return parts


def _is(kind: str, name: str, specs: Sequence[TensorSpec], zeros: Collection[str]) -> bool:
    """Whether tensors that are called like a kind's are of its dtypes."""
    (first, shape), rest = specs[0], specs[1:]
    if kind == "zeros":
        return first in FLOATS and math.prod(shape) > 1 and name in zeros
    if kind == "mask":
        return first in FLOATS and rest[0][1] == shape
    if kind == "csr":
        return first in (torch.int32, torch.int64) and rest[1][0] in FLOATS
    return first == (torch.int8 if kind == "int8" else torch.uint8) and rest[0][0] in FLOATS and len(shape) > 1


def _require_sizes(part: Part) -> None:
    shapes = [shape for _, shape in part.stored.values()]
    rest = part.num_values // part.shape[0] if part.shape and part.shape[0] else 0
    fits = {
        "csr": lambda: shapes[0] == (part.shape[0] + 1,) and shapes[1] == shapes[2] and len(shapes[1]) == 1,
        "int8": lambda: math.prod(shapes[1]) == part.shape[0],
        "int4": lambda: shapes[0] == (part.shape[0], -(-rest // 2)) and math.prod(shapes[1]) == part.shape[0],
    }.get(part.kind, lambda: True)
    if part.num_values < 1 or not fits():
        found = ", ".join(f"{name} of shape {list(shape)}" for name, (_, shape) in part.stored.items())
        raise InputError(f"{found} do not make a weight of shape {list(part.shape)}; save the network again")
