"""Calibration of a generator's expected error by distance from its training conditions.

T requests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.report import Curve
from rpg.generation.generator import Generator
from rpg.generation.request import RequestOptions

GROUPS = 5
"""Groups of requests, from near to far, over which errors are averaged."""


def error_by_distance(generator: Generator, conditions: Any, errors: Tensor) -> tuple[dict[str, Curve], dict[str, Any]]:
    """A curve and statistics of the measured errors ``[T]`` of requests, by distance; empty if distances are unknown.

    The statistics: ``known_to``, the number of requests ``beyond`` it, and the mean ``expected`` and ``measured`` error
    of the others.
    """
    options = RequestOptions(condition=conditions)
    found = generator.request(len(errors), options=options).distances
    within = sorted((each.distance, each.error, error) for each, error in zip(found, errors.tolist(), strict=False)
                    if each.error is not None)  # fmt: skip
    if not within:
        return {}, {}
    table = torch.tensor(within)  # [T, 3]
    means = torch.stack([part.mean(0) for part in table.tensor_split(min(GROUPS, len(table)))])
    places, expected, measured = (tuple(column.tolist()) for column in means.unbind(1))
    curve = Curve(
        x=places, lines={"expected": expected, "measured": measured}, across="distance from what was learned",
        up="error",
    )  # fmt: skip
    figures = {
        "known_to": found[0].known_to, "beyond": len(found) - len(within), "expected": table[:, 1].mean().item(),
        "measured": table[:, 2].mean().item(),
    }  # fmt: skip
    return {"error_by_distance": curve}, {"error_by_distance": figures}
