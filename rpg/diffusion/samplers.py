"""Samplers: from noise to tokens in a number of network calls.

One function per algorithm, all with one signature. ``predict(x_t, network_time)`` is the denoiser: the noisy
tokens and a scalar tensor on the scale 0 … 1000 in, the prediction the objective was trained for out.
Shape letters: N sampled tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor], None]


class Path(Protocol):
    """What a sampler has to know of an objective (rpg/diffusion/objectives.py), whose own unit all times are in."""

    prediction: str

    def sampling_times(self, num_steps: int, device: torch.device | str) -> Tensor:
        """The times to visit, noisiest first."""

    def network_time(self, time: Tensor) -> Tensor:
        """Times as the denoiser takes them, on 0 … 1000."""

    def to_sample(self, x_t: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """x₀ from the noisy tokens and the prediction, ``[N, D]``."""


class DiscretePath(Path, Protocol):
    """That of DDPM: T noise levels."""

    config: Any
    alphas_cumprod: Tensor  # [T]


def randn(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Standard normals drawn on the generator's device, so that a CPU generator serves every device."""
    source = torch.device(device) if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


def _ignore(step: int, x: Tensor) -> None:
    """The callback of a caller who wants none."""


def euler(
    objective: Path,
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
    objective: Path,
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


def ddpm(
    objective: DiscretePath,
    predict: Predict,
    noise: Tensor,
    *,
    num_steps: int,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
    callback: Callback = _ignore,
) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) with the smaller of its two variances."""
    del eta
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(variance_type="fixed_small", clip_sample=False, **_scheduler_arguments(objective))
    scheduler.set_timesteps(timesteps=objective.sampling_times(num_steps, "cpu").tolist())
    return _run_scheduler(scheduler, objective, predict, noise, callback, {"generator": generator})


def ddim(
    objective: DiscretePath,
    predict: Predict,
    noise: Tensor,
    *,
    num_steps: int,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
    callback: Callback = _ignore,
) -> Tensor:
    """DDIM (arXiv 2010.02502, equations 12 and 16); ``eta`` runs from 0, deterministic, to 1, ancestral.

    Not diffusers' DDIMScheduler, which takes the next time to be T // num_steps below: where num_steps does not
    divide T (60 steps of 1000, say) its steps leave gaps and the last one stops short of the clean token.
    """
    x = noise  # [N, D]
    times = objective.sampling_times(num_steps, noise.device)  # [num_steps]
    network_times = objective.network_time(times)
    alphas = objective.alphas_cumprod.to(noise.device)[times]  # [num_steps]
    next_alphas = torch.cat([alphas[1:], alphas.new_ones(1)])  # [num_steps]
    sigmas = eta * ((1 - next_alphas) / (1 - alphas) * (1 - alphas / next_alphas)).sqrt()  # [num_steps]
    for step in range(num_steps):
        x0 = objective.to_sample(x, predict(x, network_times[step]), times[step])  # [N, D]
        epsilon = (x - alphas[step].sqrt() * x0) / (1 - alphas[step]).sqrt()  # [N, D]
        direction = (1 - next_alphas[step] - sigmas[step] ** 2).clamp(min=0).sqrt()
        x = next_alphas[step].sqrt() * x0 + direction * epsilon  # [N, D]
        if eta > 0 and step < num_steps - 1:
            x = x + sigmas[step] * randn(tuple(x.shape), generator, x.device)  # [N, D]
        callback(step, x)
    return x


def dpm_solver(
    objective: DiscretePath,
    predict: Predict,
    noise: Tensor,
    *,
    num_steps: int,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
    callback: Callback = _ignore,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): deterministic, second order, one call a step."""
    del generator, eta
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", **_scheduler_arguments(objective)
    )
    scheduler.set_timesteps(timesteps=objective.sampling_times(num_steps, "cpu").tolist())
    return _run_scheduler(scheduler, objective, predict, noise, callback, {})


def _scheduler_arguments(objective: DiscretePath) -> dict[str, Any]:
    """The arguments by which diffusers' schedulers describe the same noise and prediction."""
    return {
        "num_train_timesteps": objective.config.num_steps,
        "beta_start": objective.config.beta_start,
        "beta_end": objective.config.beta_end,
        "beta_schedule": "linear",
        "prediction_type": {"velocity": "v_prediction"}.get(objective.prediction, objective.prediction),
    }


def _run_scheduler(
    scheduler: Any,
    objective: DiscretePath,
    predict: Predict,
    noise: Tensor,
    callback: Callback,
    arguments: dict[str, Any],
) -> Tensor:
    """Take the steps of one of diffusers' schedulers."""
    x = noise  # [N, D]
    network_times = objective.network_time(scheduler.timesteps).to(noise.device)  # [num_steps]
    for step, t in enumerate(scheduler.timesteps):
        prediction = predict(x, network_times[step])  # [N, D]
        (x, *_) = scheduler.step(prediction, t, x, return_dict=False, **arguments)  # [N, D]
        callback(step, x)
    return x
