"""Samplers: from noise to tokens in a number of network calls.

One function per algorithm, all with one signature. ``predict(x_t, network_time)`` is the denoiser: the noisy
tokens and a scalar tensor on the scale 0 … 1000 in, the prediction the objective was trained for out.
Shape letters: N sampled tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rpg.diffusion import DDPM, Flow

Predict = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor], None]


def _ignore(step: int, x: Tensor) -> None:
    """The callback of a caller who wants none."""


def euler(
    objective: Flow,
    predict: Predict,
    noise: Tensor,
    *,
    num_steps: int,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
    callback: Callback = _ignore,
) -> Tensor:
    """Euler's method along the flow (arXiv 2210.02747): first order, one call a step.

    A step in terms of x₀ is an interpolation between it and x_t, which at time zero *is* x₀: no division by t.
    """
    del generator, eta
    x = noise  # [N, D]
    times = objective.sampling_times(num_steps, noise.device)  # [num_steps + 1]
    network_times = objective.network_time(times)
    for step, (t, t_next) in enumerate(times.unfold(0, 2, 1)):
        x0 = objective.to_sample(x, predict(x, network_times[step]), t)  # [N, D]
        x = torch.lerp(x0, x, t_next / t)  # [N, D]
        callback(step, x)
    return x


def heun(
    objective: Flow,
    predict: Predict,
    noise: Tensor,
    *,
    num_steps: int,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
    callback: Callback = _ignore,
) -> Tensor:
    """Heun's method along the flow (arXiv 2206.00364, algorithm 1): second order, two calls a step but the last.

    The last step is Euler's, since the velocity at time zero is not defined by a prediction of x₀.
    """
    del generator, eta
    x = noise  # [N, D]
    times = objective.sampling_times(num_steps, noise.device)  # [num_steps + 1]
    network_times = objective.network_time(times)
    for step, (t, t_next) in enumerate(times.unfold(0, 2, 1)):
        x0 = objective.to_sample(x, predict(x, network_times[step]), t)  # [N, D]
        x_euler = torch.lerp(x0, x, t_next / t)  # [N, D]
        if step < num_steps - 1:
            velocity = (x - x0) / t  # [N, D]
            x0 = objective.to_sample(x_euler, predict(x_euler, network_times[step + 1]), t_next)  # [N, D]
            next_velocity = (x_euler - x0) / t_next  # [N, D]
            x = x + (t_next - t) / 2 * (velocity + next_velocity)  # [N, D]
        else:
            x = x_euler  # [N, D]
        callback(step, x)
    return x
