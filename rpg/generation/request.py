"""What is asked of a generator: a number of networks, a seed, how they are sampled, and for which condition."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from rpg.config import GenerateConfig
from rpg.generation.known_range import Distance
from rpg.generation.text_encoder import TextTable
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.condition import ConditionSpec, parse_settings

STATES: tuple[str, ...] = get_args(GenerateConfig.model_fields["state"].annotation)
PROVENANCE = "rpg.provenance"
"""The key of a generated file's metadata that names the generator and the request."""


@dataclass(frozen=True)
class RequestOptions:
    """What a caller wants other than the ``generate`` section of the configuration says; None is what it says."""

    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    state: str | None = None
    temperature: float | None = None
    condition: Any = None  # in any form that ``Generator.generate`` takes
    initial: Any = None  # likewise
    sparsity: float | None = None  # of pruned networks

    def over(self, settings: GenerateConfig) -> GenerateConfig:
        """The section with these options in place of its values."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return settings.model_copy(update={name: given[name] for name in given.keys() & GenerateConfig.model_fields})


@dataclass(frozen=True)
class Request:
    """What is asked of one call of ``generate``, every default filled in."""

    num: int
    seed: int
    sampler: str
    steps: int
    eta: float
    guidance_scale: float
    state: str
    conditions: Tensor | None  # [num, C]
    temperature: float = 1.0
    texts: tuple[str, ...] | None = None  # what the conditions were made of
    values: Tensor | None = None  # [num, C] likewise: settings, or values of a metric
    of_examples: bool = False  # whether the conditions are examples, of which files name the digest
    initial: Tensor | None = None  # [num, L, D] tokens to go on from
    sparsity: float | None = None  # share of zeros among pruned weights; None is the zoo's
    distances: tuple[Distance, ...] = ()  # of the conditions, from what was learned; empty where never measured

    def __post_init__(self) -> None:
        for name in ("num", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1.")
        if self.state not in STATES:
            raise InputError(f"Unknown permutation state {self.state!r}; choose {', '.join(STATES)}.")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"The temperature is {self.temperature}; give a number of at least 0 (0 is the mean).")
        if not 0 <= self.guidance_scale < math.inf:
            raise InputError(f"The guidance scale is {self.guidance_scale}; give a number of at least 0 (1 is none).")
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta is {self.eta}; give 0 (no fresh noise) to 1 (DDPM's)")

    def provenance(self, generator: str, copied: Sequence[str], index: int) -> dict[str, str]:
        """The metadata of network ``index``, made by the generator with the digest ``generator``.

        ``copied`` names the tensors that are one checkpoint's, although they differ in the zoo.
        """
        sampled = ("sampler", "steps", "eta", "guidance_scale", "state", "temperature")
        facts: dict[str, Any] = {"generator": generator, "seed": self.seed, "index": index}
        facts |= {name: getattr(self, name) for name in sampled}
        facts["condition"] = None if self.conditions is None else self.conditions[index].tolist()
        if self.texts is not None:
            facts["condition"] = self.texts[index]
        if self.values is not None:
            facts["condition"] = [float(f"{value:.6g}") for value in self.values[index].tolist()]
        if self.of_examples and self.conditions is not None:
            facts["condition"] = f"examples {digest_of(self.conditions[index])}"
        facts["start"] = None if self.initial is None else digest_of(self.initial[index])
        if self.sparsity is not None:
            facts["sparsity"] = self.sparsity
        if self.distances:
            facts["distance"] = asdict(self.distances[index])
        if copied:
            facts["copied"] = list(copied)
        return {"format": "pt", PROVENANCE: json.dumps(facts)}


def digest_of(values: Tensor) -> str:
    """SHA-256 of float32 values."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def requested_conditions(
    condition: Any, num: int, spec: ConditionSpec | None, table: TextTable | None
) -> Tensor | None:
    """What is asked of a generator as ``[num, C]``, checked; None of one that takes no condition.

    Args:
        condition: ``[C]`` for all networks or ``[num, C]``, in any form that torch takes; settings by name; a text or
            ``num`` texts.
        table: its texts, where they are texts.

    Raises:
        InputError: it is missing or of another kind or size, has impossible values, or cannot be encoded.
    """
    if spec is None:
        if condition is not None:
            raise InputError("this generator was trained without conditions, and takes none; leave the condition out")
        return None
    if spec.kind == "examples":
        return requested_examples(condition, num, spec)
    width = table.width if table is not None else 1 if spec.kind == "class" else spec.size
    expected = f"{width} values ({spec.kind})" if table is None else "a text"
    if condition is None:
        raise InputError(f"this generator needs a condition that says what to generate for; give {expected}")
    texts = requested_texts(condition, num)
    if texts is not None:
        if table is None or len(texts) != num:
            raise InputError(
                f"the condition is {len(texts)} texts; give {expected if table is None else f'one text, or {num}'}"
            )
        if not all(text.strip() for text in texts):
            raise InputError("the condition has an empty text; say what to generate")
        return table.conditions_of(texts)
    if isinstance(condition, Mapping) and spec.settings:
        condition = parse_settings(spec.settings, condition)
    values = torch.as_tensor(condition, dtype=torch.float32)
    values = values.expand(num, -1) if values.ndim == 1 else values
    if values.shape != (num, width):
        raise InputError(f"the condition has shape {list(values.shape)}; give {width} values, or [{num}, {width}]")
    if not torch.isfinite(values).all():
        raise InputError("the condition has NaN or infinity; give finite numbers")
    for setting, column in zip(spec.settings, values.unbind(1), strict=False):
        for value in column.unique().double().tolist():
            setting.check(float(f"{value:.6g}"))
    if spec.kind == "binary" and not ((values == 0) | (values == 1)).all():
        raise InputError("the condition has values other than 0 and 1; give a binary vector")
    if spec.kind == "class" and not ((values == values.round()) & (values >= 0) & (values < spec.size)).all():
        raise InputError(
            f"the condition is not a class of the generator; give a whole number from 0 to {spec.size - 1}"
        )
    return values


def requested_examples(condition: Any, num: int, spec: ConditionSpec) -> Tensor:
    """Examples ``[n, size]`` for all networks, or ``[num, n, size]``, as ``[num, n · size]``, checked.

    Raises:
        InputError: there are none, they are of another size, or have impossible values.
    """
    wanted = f"examples: rows of {spec.size} numbers each (`rpg.generation.examples` reads files and arrays)"
    if condition is None:
        raise InputError(f"this generator needs examples of what to do; give {wanted}, with --examples")
    if isinstance(condition, str):
        raise InputError(f"the condition is a text; give {wanted}")
    values = torch.as_tensor(condition, dtype=torch.float32)
    values = values.expand(num, -1, -1) if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[0] != num or values.shape[2] != spec.size or not values.shape[1]:
        raise InputError(f"the condition has shape {list(values.shape)}; give {wanted}")
    if not torch.isfinite(values).all():
        raise InputError("the examples have NaN or infinity; give finite numbers")
    return values.flatten(1)


def requested_initial(initial: Any, num: int, layout: Layout, wanted: bool) -> Tensor | None:
    """What networks go on from, as tokens ``[num, L, D]``; None of a generator that takes none.

    ``initial`` is a checkpoint's path or state dict, for all networks, or a list of ``num``.

    Raises:
        InputError: it is missing, of another structure, or not ``wanted``: the generator takes none.
    """
    if not wanted:
        if initial is not None:
            raise InputError("this generator was trained without initial weights and takes none; leave them out")
        return None
    if initial is None:
        raise InputError("this generator improves a checkpoint; give one with --from FILE (in Python: initial=)")
    starts = list(initial) if isinstance(initial, list | tuple) else [initial]
    if len(starts) not in (1, num):
        raise InputError(f"there are {len(starts)} initial checkpoints for {num} networks; give one, or one each")
    tokens = [layout.encode(each if isinstance(each, Mapping) else Checkpoint.open(Path(each))) for each in starts]
    return torch.stack(tokens).expand(num, -1, -1)


def requested_texts(condition: Any, num: int) -> tuple[str, ...] | None:
    """A condition that is a text, or one for each network, as one for each; None if it is not."""
    if isinstance(condition, str):
        return (condition,) * num
    if isinstance(condition, list | tuple) and condition and all(isinstance(each, str) for each in condition):
        return tuple(condition)
    return None
