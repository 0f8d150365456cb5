"""Checkpoints that hold one network twice: a run's best and last, a final model beside its last checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, read_state_dict
from tokenization.checkpoint.weights import Chosen

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
            digest.update(_bytes(part).numpy().tobytes())
    return digest.hexdigest()


def are_twins(first: Path, second: Path, chosen: Chosen) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    one, other = read_state_dict(first, chosen), read_state_dict(second, chosen)
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and torch.equal(_bytes(value.reshape(-1)), _bytes(other[name].reshape(-1)))
        for name, value in one.items()
    )


def _bytes(flat: Tensor) -> Tensor:
    return flat.resolve_conj().resolve_neg().contiguous().view(torch.uint8)
