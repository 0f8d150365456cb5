"""Merging: the checkpoints to merge, one tensor at a time, the arithmetic of every method, and the record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, has_plain_names, read_state_dict
from tokenization.checkpoint.pickles import pickled_files
from tokenization.checkpoint.safetensors import tensor_at
from tokenization.checkpoint.tensor_file import find_ties
from tokenization.checkpoint.weights import AS_FOUND, Chosen
from tokenization.errors import InputError
from tokenization.files import file_digest
from tokenization.lora.adapter import partner_of

METHODS = ("linear", "slerp", "ties", "dare_linear", "dare_ties", "model_stock")

NEED_BASE = ("ties", "dare_linear", "dare_ties", "model_stock")
"""Those that merge deviations from what all networks began with."""

COMBINATIONS = ("linear", "slerp", "model_stock")
"""Those whose result is a weighted sum of the networks (of their deviations), so that a product stays one."""

NORMALIZED = {"linear": True, "ties": True, "dare_linear": False, "dare_ties": False}
"""Whether weights are scaled to add up to 1, as mergekit does unless told otherwise."""

DENSITY = {"ties": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}
"""Share of the deviations that are kept: that of the TIES paper, and that of mergekit's examples."""

PARALLEL = 0.9995
"""Cosine from which on two tensors are taken as parallel, between which SLERP is a straight line."""


def merge_values(
    method: str,
    values: Tensor,
    base: Tensor | None,
    weights: Tensor,
    generator: torch.Generator | None = None,
    *,
    density: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """One tensor of a merged network.

    Args:
        method: one of `METHODS`.
        values: of the networks, ``[n, V]``, n at least 2.
        base: of what all of them began with, or stands for that, ``[V]``; None for zeros. Only `NEED_BASE` look at it.
        weights: of the networks, ``[n]``: of SLERP the place between the two that weigh most; Model Stock has none.
        generator: of what DARE leaves out.
        density: share of the deviations that TIES and DARE keep; None for `DENSITY`.
        normalize: whether weights are scaled to add up to 1; where signs disagree, those that count.
    """
    weights = weights.to(values.dtype)
    if method in ("linear", "slerp"):
        gram = values @ values.T if method == "slerp" else weights  # which linear does not look at
        return combination(method, gram, weights, normalize) @ values
    deltas = values if base is None else values - base
    if method == "model_stock":
        made = combination(method, deltas @ deltas.T, weights) @ deltas
        return made if base is None else base + made
    density = DENSITY[method] if density is None else density
    deltas = deltas.clone() if base is None else deltas  # changed in place: networks are large, and values the caller's
    if method == "ties":
        kept = max(1, int(density * deltas.shape[1]))
        for row in deltas:
            sizes = row.abs()
            row.masked_fill_(sizes < sizes.kthvalue(len(row) - kept + 1).values, 0)
    else:
        deltas.mul_(torch.rand(deltas.shape, generator=generator) < density).div_(density)
    if normalize:
        weights = weights / weights.sum()
    weighted = deltas.mul_(weights[:, None])
    if method == "dare_linear":
        made = weighted.sum(0)
    else:
        agree = torch.where(weighted.sum(0) >= 0, weighted > 0, weighted < 0)
        made = weighted.mul_(agree).sum(0)
        if normalize:
            share = torch.zeros_like(made)
            for weight, each in zip(weights.tolist(), agree, strict=True):
                share.add_(each, alpha=weight)
            made = made / share.where(share > 0, 1.0)
    return made if base is None else base + made


def combination(method: str, gram: Tensor, weights: Tensor, normalize: bool = True) -> Tensor:
    """What networks are multiplied by in their merged sum, ``[n]``, found from their inner products alone.

    Args:
        method: one of `COMBINATIONS`.
        gram: inner products of the networks, of Model Stock those of their deviations from the base, ``[n, n]``.
        weights, normalize: as `merge_values` takes them.
    """
    if method == "model_stock":
        return torch.full_like(weights, 1 / len(weights)) * stock_ratio(gram)
    if method == "linear":
        return weights / weights.sum() if normalize else weights
    first, second = weights.topk(2).indices.tolist() if len(weights) > 2 else (0, 1)
    place = weights[second] / (weights[first] + weights[second])
    norms = (gram[first, first] * gram[second, second]).sqrt()
    cosine = (gram[first, second] / norms).clamp(-1, 1) if norms > 0 else torch.ones_like(norms)
    made = torch.zeros_like(weights)
    if abs(cosine) > PARALLEL:
        made[first], made[second] = 1 - place, place
    else:
        angle = torch.acos(cosine)
        made[first], made[second] = torch.sin((1 - place) * angle), torch.sin(place * angle)
        made = made / torch.sin(angle)
    return made


def stock_ratio(gram: Tensor) -> Tensor:
    """How far Model Stock goes from the base to the mean: ``k cos θ / (1 + (k - 1) cos θ)``, its equation 5.

    θ is the mean angle between the k deviations, whose inner products are ``gram`` ``[k, k]``. The method expects it
    between 0 and 90 degrees, so that the point lies between base and mean; deviations that point apart have nothing in
    common, and the base remains.
    """
    norms = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
    cosines, num = gram / norms / norms[:, None], len(gram)
    cosine = ((cosines.sum() - cosines.diagonal().sum()) / (num * (num - 1))).clamp(0, 1)
    return num * cosine / (1 + (num - 1) * cosine)


METADATA_KEY = "rpg.merge"
"""Metadata key: JSON object with the method, its settings and the files that were merged, each with its digest."""


@dataclass(frozen=True)
class Merge:
    """How networks are merged.

    Attributes:
        method: one of `METHODS`.
        weights: one for each network, as given; equal ones when None.
        normalize: whether they are scaled to add up to 1; as is usual for the method when None.
        density: share of the deviations that TIES and DARE keep; the method's own when None.
        t: of SLERP, the place between the first (0) and the second network (1).
    """

    method: str
    weights: Sequence[float] | None = None
    normalize: bool | None = None
    density: float | None = None
    t: float | None = None
    seed: int = 0

    def settled(self, num: int) -> tuple[Tensor, dict[str, Any]]:
        """The weights of ``num`` networks, float64, and what `merge_values` takes besides.

        Raises:
            InputError: an option that the method does not have, or a value out of bounds.
        """
        if self.method not in METHODS:
            raise InputError(f"--method {self.method} is unknown; choose one of {', '.join(METHODS)}")
        if num < 2:
            raise InputError(f"a merge takes two networks or more, and there is {num}; name another")
        if self.method == "slerp" and num != 2:
            raise InputError(f"--method slerp is between two networks, and here are {num}; name two of them")
        for name, given, methods in (
            ("--density", self.density, tuple(DENSITY)),
            ("--t", self.t, ("slerp",)),
            ("--weights", self.weights, tuple(NORMALIZED)),
            ("--normalize", self.normalize, tuple(NORMALIZED)),
        ):
            if given is not None and self.method not in methods:
                raise InputError(f"{name} is for {', '.join(methods)}; leave it out of --method {self.method}")
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"--density {self.density} is not a share of the values; give more than 0, and 1 at most")
        if self.t is not None and not 0 <= self.t <= 1:
            raise InputError(f"--t {self.t} is not a place between two networks; give 0 (the first) to 1 (the second)")
        weights = torch.full((num,), 1 / num).double()
        if self.weights is not None:
            weights = torch.tensor(list(self.weights)).double()
        if self.method == "slerp":
            place = 0.5 if self.t is None else self.t
            weights = torch.tensor([1 - place, place]).double()
        normalize = NORMALIZED.get(self.method, True) if self.normalize is None else self.normalize
        if len(weights) != num or not weights.isfinite().all() or (normalize and abs(float(weights.sum())) < 1e-9):
            given_weights = ",".join(map(str, weights.tolist()))
            raise InputError(f"--weights {given_weights}: give {num} numbers, one for each network, whose sum is not 0")
        return weights, {"normalize": normalize, "density": self.density}

    def record(self) -> dict[str, Any]:
        """What the merged file says of it."""
        found: dict[str, Any] = {"method": self.method}
        if self.method in DENSITY:
            found["density"] = self.density or DENSITY[self.method]
        if self.method.startswith("dare"):
            found["seed"] = self.seed
        if self.method == "slerp":
            found["t"] = 0.5 if self.t is None else self.t
        return found

    @property
    def needs_base(self) -> bool:
        """Whether it merges deviations from what all networks began with."""
        return self.method in NEED_BASE


@dataclass
class Part:
    """A network to merge.

    Attributes:
        names: every key of its state dict, in order.
        ties: ``{alias: stored name}``.
        files: what its values lie in.
    """

    path: Path
    names: list[str]
    ties: dict[str, str]
    files: list[Path]
    _checkpoint: Checkpoint | None = None
    _state_dict: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, chosen: Chosen = AS_FOUND) -> Part:
        """Open a checkpoint of any kind, under the names of the plain network.

        Its values stay on the disk where they are safetensors of these names already.

        Raises:
            InputError: it is broken, or as `read_weights` says.
        """
        pickles = pickled_files(path)
        checkpoint = None if pickles else Checkpoint.open(path)
        if checkpoint is not None and has_plain_names(checkpoint, chosen):
            return cls(path, list(checkpoint.order), dict(checkpoint.ties), sorted(checkpoint.sizes), checkpoint)
        state_dict = read_state_dict(path, chosen)
        files = pickles if checkpoint is None else sorted(checkpoint.sizes)
        return cls(path, list(state_dict), find_ties(state_dict), files, None, state_dict)

    def spec(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        if self._checkpoint is not None:
            info = self._checkpoint.info(name)
            return info.dtype, info.shape
        return self._state_dict[name].dtype, tuple(self._state_dict[name].shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor in its shape, to be read only."""
        if self._checkpoint is not None:
            return self._checkpoint.flat(name).view(self._checkpoint.info(name).shape)
        return self._state_dict[name]

    def release(self, name: str) -> None:
        """Drop a tensor's pages from this process."""
        if self._checkpoint is not None:
            self._checkpoint.release(self.ties.get(name, name))

    def require(self, first: Part, *, dtypes: bool = True, ranks: bool = True) -> None:
        """Check that names, shapes and dtypes are those of ``first``; ``ranks``: those of LoRA factors, too.

        Raises:
            InputError: names the first tensor that differs.
        """
        missing = next((name for name in first.names if name not in set(self.names)), None)
        extra = next((name for name in self.names if name not in set(first.names)), None)
        cure = "merge checkpoints of one network"
        if missing is not None or extra is not None:
            where, other = (self.path, first.path) if missing is not None else (first.path, self.path)
            raise InputError(f"{tensor_at(where, str(missing or extra))} is missing, but {other} has it; {cure}")
        for name in first.names:
            (dtype, shape), (own_dtype, own_shape) = self.spec(name), first.spec(name)
            side = "" if ranks else (partner_of(name) or ("",))[0]
            compared = {"A": slice(1, None), "B": slice(1)}.get(side, slice(None))
            if shape[compared] != own_shape[compared] or (dtypes and dtype != own_dtype):
                found, expected = (f"{d} of shape {list(s)}" for d, s in ((dtype, shape), (own_dtype, own_shape)))
                raise InputError(f"{tensor_at(self.path, name)} is {found}, but {expected} in {first.path}; {cure}")


class Digests:
    """SHA-256 of all parts' files, taken beside the work."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._found: list[list[Future[str]]] = [
            [self._pool.submit(file_digest, file) for file in part.files] for part in parts
        ]

    def record(self, merge: Merge, parts: Sequence[Part], weights: Tensor, base: Part | None, *, wait: bool) -> str:
        """The text under `METADATA_KEY`; without ``wait`` with zeros in place of digests, in the same length."""
        rows: list[dict[str, Any]] = []
        for part, futures in zip([*parts, *([base] if base is not None else [])], self._found, strict=True):
            found = [future.result() if wait else "0" * 64 for future in futures]
            rows.append({"path": str(part.path), "sha256": found[0] if len(found) == 1 else found})
        record: dict[str, Any] = merge.record()
        if base is not None:
            record["base"] = rows.pop()
        if merge.method in NORMALIZED:
            rows = [{**row, "weight": weight} for row, weight in zip(rows, weights.tolist(), strict=True)]
        return json.dumps({**record, "parts": rows})

    def close(self) -> None:
        """Give up what is not done yet."""
        self._pool.shutdown(wait=True, cancel_futures=True)
