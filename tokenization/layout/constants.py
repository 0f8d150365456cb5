"""What is outside the tokens, compared over the checkpoints whose tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.structure import is_counter
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.errors import InputError
from tokenization.layout.placement import Layer, TokenOptions, is_left_out
from tokenization.zoo.cache import cached_tensors
from tokenization.zoo.comparison import varying_constant
from tokenization.zoo.zoo import Zoo

VERSION = 1
VARIES = "varies"
_CHUNK_BYTES = 1 << 24


def copied_constants(
    zoo: Zoo,
    indices: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    layers: Sequence[Layer],
    options: TokenOptions,
) -> tuple[str, ...]:
    """The tensors that the options keep out of the tokens although they differ between the checkpoints.

    Every generated network has those of one checkpoint. Counters are not among them.

    Raises:
        InputError: a tensor differs that the options do not leave out; names it and two files.
    """
    first, tokenised = checkpoints[0], {layer.name for layer in layers}
    names = [name for name in first.tensors if name not in tokenised and first.tensors[name].num_values]
    if not names or len(checkpoints) < 2:
        return ()

    def write(file: TensorFile) -> None:
        flags = [any(_differ(first, other, name) for other in checkpoints[1:]) for name in names]
        file.write(VARIES, 0, torch.tensor(flags, dtype=torch.uint8))

    key = [VERSION, zoo.digest(), list(indices), names]
    flags = cached_tensors(zoo, "constants", key, {VARIES: (torch.uint8, (len(names),))}, write).flat(VARIES)
    copied = []
    for name, varies in zip(names, flags.tolist(), strict=True):
        info = first.tensors[name]
        if not varies or is_counter(name, info.dtype, info.num_values):
            continue
        if not is_left_out(first, name, options):
            other = next(place for place, each in enumerate(checkpoints) if place and _differ(first, each, name))
            files = (zoo.entries[indices[place]].source or str(checkpoints[place].path) for place in (0, other))
            raise InputError(varying_constant(name, str(info.dtype).removeprefix("torch."), *files))
        copied.append(name)
    return tuple(copied)


def _differ(first: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether two checkpoints have different bytes there; reads no further than to the first that differs."""
    left, right = (each.flat(name).view(torch.uint8) for each in (first, other))
    found = False
    for start in range(0, len(left), _CHUNK_BYTES):
        if found := not torch.equal(left[start : start + _CHUNK_BYTES], right[start : start + _CHUNK_BYTES]):
            break
    first.release(name)
    other.release(name)
    return found
