"""How far a request is from what was learned, and which error networks had at that distance.

S seen conditions, V validation requests, P parts of a request (phrases of a text; else 1), F numbers of a part.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpg.models.recurrent_diffusion import RecurrentDiffusion
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec

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
