"""What is asked of a generator: a number of networks, a seed, how they are sampled, and for which condition.

With a condition goes how far it is from what was learned, and which error networks had at that distance.
S seen conditions, V validation requests, P parts of a request (phrases of a text; else 1), F numbers of a part.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpg.config import GenerateConfig
from rpg.generation.text_encoder import TextTable
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.condition import ConditionSpec, parse_settings

STATES: tuple[str, ...] = get_args(GenerateConfig.model_fields["state"].annotation)
PROVENANCE = "rpg.provenance"
"""The key of a generated file's metadata that names the generator and the request."""


KNOWN_FILE = "known_range.safetensors"

FEW = 50
"""One in so many validation requests lies beyond the range in which errors count as known: too few to tell."""


@dataclass(frozen=True)
class Distance:
    """How far a request is from what was learned.

    Attributes:
        distance: to the nearest seen condition; 1 is the median distance of a seen one to its nearest other.
        known_to: the largest distance at which errors were measured, the farthest requests (`FEW`) left out.
        error: expected share of wrong answers, 0 … 1, by the validation tasks; None beyond ``known_to``.
    """

    distance: float
    known_to: float
    error: float | None

    def __str__(self) -> str:
        if self.error is None:
            return (
                f"warning: the request is {self.distance:.2g} from what was learned, and the error is known to "
                f"{self.known_to:.2g} only: check these networks on data of your own"
            )
        return f"distance from what was learned: {self.distance:.2g}; expected error {self.error:.1%}"


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


@dataclass(frozen=True)
class KnownRange:
    """What was learned, and the errors that validation tasks had by their distance from it.

    Attributes:
        seen: ``[S, F]``, at least two.
        distances: of validation requests ``[V]``, in units.
        errors: shares of wrong answers of their networks ``[V]``.
    """

    seen: Tensor
    distances: Tensor
    errors: Tensor

    @classmethod
    def measured(cls, seen: Tensor, requests: Tensor, errors: Tensor) -> KnownRange:
        """From the codes of validation requests ``[V, P, F]`` and the errors ``[V]`` of their networks."""
        own = cls(seen, torch.zeros(0), errors.float())
        return cls(seen, own.raw(requests), errors.float())

    @cached_property
    def unit(self) -> float:
        """The median distance of a seen condition to its nearest other one; 1 where all are the same."""
        between = torch.cdist(self.seen, self.seen).fill_diagonal_(torch.inf)
        return between.amin(1).median().item() or 1.0

    def raw(self, requests: Tensor) -> Tensor:
        """Distances ``[n]`` of requests ``[n, P, F]``, of which parts that are NaN are padding: the farthest part's."""
        nearest = torch.cdist(requests.nan_to_num(), self.seen).amin(-1)  # [n, P]
        return nearest.masked_fill(requests.isnan().any(-1), 0).amax(-1) / self.unit

    @cached_property
    def expected(self) -> tuple[Any, Any]:
        """Distances and the errors that are expected there, by isotonic regression; linear in between."""
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(out_of_bounds="clip").fit(self.distances.numpy(), self.errors.numpy())
        return fitted.X_thresholds_, fitted.y_thresholds_

    def of(self, requests: Tensor) -> list[Distance]:
        """The distances of requests ``[n, P, F]``, with the errors that are expected there."""
        known_to = self.distances.sort(descending=True).values[len(self.distances) // FEW].item()
        found = self.raw(requests)
        errors = np.interp(found.numpy(), *self.expected).tolist()
        return [
            Distance(distance, known_to, error if distance <= known_to else None)
            for distance, error in zip(found.tolist(), errors, strict=True)
        ]

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        save_file({each.name: getattr(self, each.name).contiguous() for each in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> KnownRange:
        """Read what ``save`` wrote. Raises InputError if it is damaged."""
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise InputError(f"{path} could not be read ({error}); copy the generator's folder again") from None


def condition_codes(network: object, spec: ConditionSpec, conditions: Tensor) -> Tensor | None:
    """What distances are measured between, ``[n, P, F]`` on the CPU; None for conditions without such a measure.

    Of settings their features, of examples what the networks' encoder makes of the set, of a text its phrases' vectors.
    ``conditions`` ``[n, C]`` are as networks see them.
    """
    if spec.kind == "text" and isinstance(network, RecurrentDiffusion) and network.config.condition.phrases:
        rows = conditions.cpu().unflatten(1, (network.config.condition.phrases, -1))
        return torch.where(rows[..., -1:] > 0, rows[..., :-1], torch.nan)
    if spec.settings:
        return conditions.cpu()[:, None]
    if spec.kind != "examples" or not isinstance(network, RecurrentDiffusion):
        return None
    encoder = network.condition if network.prior is None else network.prior.condition
    assert encoder is not None
    with torch.inference_mode():
        return encoder(conditions.to(network.position_embedding.device)).float().cpu()[:, None]
