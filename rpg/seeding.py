"""Independent random streams, derived by name from one seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: ``derive_seed(seed, "noise", step, example)``."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_rng(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator on ``device`` seeded with :func:`derive_seed` of the parts."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def permutation(num: int, *parts: int | str) -> Tensor:
    """A random order of ``range(num)``, ``[num]`` long, decided by the parts."""
    return torch.randperm(num, generator=make_rng(*parts))


def in_turns(places: Sequence[int], num: int, *parts: int | str) -> list[int]:
    """Which of ``num`` things come at ``places``: each once in a random order, then each once in another, and so on."""
    orders = {turn: permutation(num, *parts, turn) for turn in {place // num for place in places}}
    return [int(orders[place // num][place % num]) for place in places]
