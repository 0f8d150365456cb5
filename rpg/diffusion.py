"""The mathematics of diffusion: how tokens are noised, what the denoiser predicts, and how tokens are sampled.

An objective has times of shape ``[N]`` in its own unit; only ``network_time`` is on the scale 0 … 1000. A sampler is
one function per algorithm, all with one signature: from noise to tokens in a number of network calls. Nothing here
holds parameters or global random state.
Shape letters: N sampled tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rpg.section import Section
from tokenization.errors import InputError

Predict = Callable[[Tensor, Tensor], Tensor]
"""The denoiser: from noisy tokens and a scalar tensor on the scale 0 … 1000 to the prediction it was trained for."""
Callback = Callable[[int, Tensor], None]


class Sampling(NamedTuple):
    """How a sampler is to work; `Objective.sample` says what each is."""

    num_steps: int
    generator: torch.Generator | None
    eta: float
    callback: Callback


class FlowConfig(Section):
    """Flow matching on straight lines between tokens (t = 0) and noise (t = 1)."""

    kind: Literal["flow"] = "flow"
    prediction: Literal["velocity", "sample"] = Field(
        "sample", description="What the denoiser predicts: the velocity e - x0, or the clean token x0."
    )
    time_mean: float = Field(1.0, description="Mean of the normal whose sigmoid is the training time.")
    time_std: float = Field(1.0, gt=0, description="Standard deviation of the normal whose sigmoid is the time.")
    weight_cap: float = Field(4.0, gt=0, description="Upper bound of the loss weight 1/t² of sample prediction.")
    time_shift: float = Field(
        1.0, gt=0, description="Spacing of the sampling steps: 1 is uniform, larger is denser near the noise."
    )


class DDPMConfig(Section):
    """Denoising diffusion in T steps with linearly growing noise."""

    kind: Literal["ddpm"] = "ddpm"
    prediction: Literal["epsilon", "sample", "velocity"] = Field(
        "epsilon", description="What the denoiser predicts: the noise, the clean token x0, or the velocity between."
    )
    num_steps: int = Field(1000, ge=1, description="Number of noise levels T.")
    beta_start: float = Field(1e-4, gt=0, lt=1, description="Variance added by the first step.")
    beta_end: float = Field(2e-2, gt=0, lt=1, description="Variance added by the last step.")


class _Objective:
    """What both objectives share: their samplers, by name, the default first."""

    samplers: ClassVar[Mapping[str, Callable[..., Tensor]]] = {}
    plain_sampler: ClassVar[str]  # the one of first order that draws nothing

    def sample(
        self, predict: Predict, noise: Tensor, *, sampler: str, num_steps: int,
        generator: torch.Generator | None = None, eta: float = 0.0, callback: Callback | None = None,
    ) -> Tensor:  # fmt: skip
        """Turn noise into tokens.

        Args:
            predict: maps (x_t ``[N, D]``, scalar network time) to the prediction ``[N, D]``.
            noise: standard normal, ``[N, D]``.
            sampler: one of ``self.samplers``.
            eta: stochasticity of ``ddim``: 0 none, 1 that of ``ddpm``. Other samplers have no use for it.
            callback: called after every step with its index and x_t.

        Raises:
            InputError: no such sampler, or a number of steps it cannot take.
        """
        if sampler not in self.samplers:
            raise InputError(f"this objective has no sampler {sampler}; choose one of {', '.join(self.samplers)}")
        if num_steps < 1:
            raise InputError(f"num_steps is {num_steps}; give at least 1")

        def exactly(x_t: Tensor, network_time: Tensor) -> Tensor:
            # Autocast may leave predictions in a lower precision; the samplers' arithmetic keeps that of the noise.
            return predict(x_t, network_time).to(x_t.dtype)

        return self.samplers[sampler](self, exactly, noise, Sampling(num_steps, generator, eta, callback or _ignore))


def randn(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Standard normals drawn on the generator's device, so that a CPU generator serves every device."""
    source = torch.device(device) if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


def _ignore(step: int, x: Tensor) -> None:
    """The callback of a caller who wants none."""


def euler(objective: Flow, predict: Predict, noise: Tensor, how: Sampling) -> Tensor:
    """Euler's method along the flow (arXiv 2210.02747): first order, one call a step.

    A step in terms of x₀ is an interpolation between it and x_t, which at time zero *is* x₀: no division by t.
    """
    x = noise  # [N, D]
    times = objective.sampling_times(how.num_steps, noise.device)  # [num_steps + 1]
    network_times = objective.network_time(times)
    for step, (t, t_next) in enumerate(times.unfold(0, 2, 1)):
        x0 = objective.to_sample(x, predict(x, network_times[step]), t)  # [N, D]
        x = torch.lerp(x0, x, t_next / t)  # [N, D]
        how.callback(step, x)
    return x


def heun(objective: Flow, predict: Predict, noise: Tensor, how: Sampling) -> Tensor:
    """Heun's method along the flow (arXiv 2206.00364, algorithm 1): second order, two calls a step but the last.

    The last step is Euler's, since the velocity at time zero is not defined by a prediction of x₀.
    """
    x = noise  # [N, D]
    times = objective.sampling_times(how.num_steps, noise.device)  # [num_steps + 1]
    network_times = objective.network_time(times)
    for step, (t, t_next) in enumerate(times.unfold(0, 2, 1)):
        x0 = objective.to_sample(x, predict(x, network_times[step]), t)  # [N, D]
        x_euler = torch.lerp(x0, x, t_next / t)  # [N, D]
        if step < how.num_steps - 1:
            velocity = (x - x0) / t  # [N, D]
            x0 = objective.to_sample(x_euler, predict(x_euler, network_times[step + 1]), t_next)  # [N, D]
            next_velocity = (x_euler - x0) / t_next  # [N, D]
            x = x + (t_next - t) / 2 * (velocity + next_velocity)  # [N, D]
        else:
            x = x_euler  # [N, D]
        how.callback(step, x)
    return x


def ddpm(objective: DDPM, predict: Predict, noise: Tensor, how: Sampling) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) with the smaller of its two variances."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(variance_type="fixed_small", clip_sample=False, **_scheduler_arguments(objective))
    scheduler.set_timesteps(timesteps=objective.sampling_times(how.num_steps, "cpu").tolist())
    return _run_scheduler(scheduler, objective, predict, noise, how, generator=how.generator)


def ddim(objective: DDPM, predict: Predict, noise: Tensor, how: Sampling) -> Tensor:
    """DDIM (arXiv 2010.02502, equations 12 and 16); ``eta`` runs from 0, deterministic, to 1, ancestral.

    Not diffusers' DDIMScheduler, which takes the next time to be T // num_steps below: where num_steps does not
    divide T (60 steps of 1000, say) its steps leave gaps and the last one stops short of the clean token.
    """
    x = noise  # [N, D]
    times = objective.sampling_times(how.num_steps, noise.device)  # [num_steps]
    network_times = objective.network_time(times)
    alphas = objective.alphas_cumprod.to(noise.device)[times]  # [num_steps]
    next_alphas = torch.cat([alphas[1:], alphas.new_ones(1)])  # [num_steps]
    sigmas = how.eta * ((1 - next_alphas) / (1 - alphas) * (1 - alphas / next_alphas)).sqrt()  # [num_steps]
    for step in range(how.num_steps):
        x0 = objective.to_sample(x, predict(x, network_times[step]), times[step])  # [N, D]
        epsilon = (x - alphas[step].sqrt() * x0) / (1 - alphas[step]).sqrt()  # [N, D]
        direction = (1 - next_alphas[step] - sigmas[step] ** 2).clamp(min=0).sqrt()
        x = next_alphas[step].sqrt() * x0 + direction * epsilon  # [N, D]
        if how.eta > 0 and step < how.num_steps - 1:
            x = x + sigmas[step] * randn(tuple(x.shape), how.generator, x.device)  # [N, D]
        how.callback(step, x)
    return x


def dpm_solver(objective: DDPM, predict: Predict, noise: Tensor, how: Sampling) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): deterministic, second order, one call a step."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", **_scheduler_arguments(objective)
    )
    scheduler.set_timesteps(timesteps=objective.sampling_times(how.num_steps, "cpu").tolist())
    return _run_scheduler(scheduler, objective, predict, noise, how)


def _scheduler_arguments(objective: DDPM) -> dict[str, Any]:
    """The arguments by which diffusers' schedulers describe the same noise and prediction."""
    return {
        "num_train_timesteps": objective.config.num_steps,
        "beta_start": objective.config.beta_start,
        "beta_end": objective.config.beta_end,
        "beta_schedule": "linear",
        "prediction_type": {"velocity": "v_prediction"}.get(objective.prediction, objective.prediction),
    }


def _run_scheduler(
    scheduler: Any, objective: DDPM, predict: Predict, noise: Tensor, how: Sampling, **arguments: Any
) -> Tensor:
    """Take the steps of one of diffusers' schedulers."""
    x = noise  # [N, D]
    network_times = objective.network_time(scheduler.timesteps).to(noise.device)  # [num_steps]
    for step, t in enumerate(scheduler.timesteps):
        prediction = predict(x, network_times[step])  # [N, D]
        (x, *_) = scheduler.step(prediction, t, x, return_dict=False, **arguments)  # [N, D]
        how.callback(step, x)
    return x


class Flow(_Objective):
    """Flow matching (arXiv 2210.02747) along x_t = (1 - t) x₀ + t e; the time runs from 0 (tokens) to 1 (noise)."""

    samplers: ClassVar = {"euler": euler, "heun": heun}
    plain_sampler = "euler"

    def __init__(self, config: FlowConfig) -> None:
        self.config = config
        self.prediction = config.prediction

    def sample_time(self, num: int, generator: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
        """Draw times in (0, 1): the sigmoid of a normal (arXiv 2403.03206, section 3.1)."""
        normal = randn((num,), generator, device)  # [N]
        return torch.sigmoid(normal * self.config.time_std + self.config.time_mean)  # [N]

    @property
    def last_time(self) -> float:
        """1, the time at which sampling starts: noise alone."""
        return 1.0

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Interpolate: (1 - t) x₀ + t e, ``[N, D]``."""
        return torch.lerp(x0, noise, _column(time))  # [N, D]

    def target(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x₀, or the velocity e - x₀, ``[N, D]``."""
        return x0 if self.prediction == "sample" else noise - x0  # [N, D]

    def weight(self, time: Tensor) -> Tensor:
        """``[N]``: one for the velocity; for x₀ the 1/t² that makes it so, capped since it diverges at t = 0."""
        if self.prediction == "velocity":
            return torch.ones_like(time)  # [N]
        # The cap is applied to t rather than to 1/t², which is infinite at zero.
        return time.clamp(min=self.config.weight_cap**-0.5) ** -2  # [N]

    def to_sample(self, x_t: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """The prediction itself, or x_t - t v, ``[N, D]``."""
        return prediction if self.prediction == "sample" else x_t - _column(time) * prediction  # [N, D]

    def network_time(self, time: Tensor) -> Tensor:
        """1000 t, as every denoiser takes it."""
        return 1000 * time

    def sampling_times(self, num_steps: int, device: torch.device | str) -> Tensor:
        """Times of a sampler, from exactly 1 down to exactly 0, ``[num_steps + 1]``.

        Spaced by the shift of arXiv 2403.03206, equation 23.
        """
        u = torch.linspace(1, 0, num_steps + 1, device=device)  # [num_steps + 1]
        shift = self.config.time_shift
        return shift * u / (1 + (shift - 1) * u)  # [num_steps + 1]


class DDPM(_Objective):
    """Denoising diffusion (arXiv 2006.11239): x_t = √ᾱ x₀ + √(1 - ᾱ) e; the time is an integer from 0 to T - 1."""

    samplers: ClassVar = {"ddpm": ddpm, "ddim": ddim, "dpm-solver++": dpm_solver}
    plain_sampler = "ddim"

    def __init__(self, config: DDPMConfig) -> None:
        self.config = config
        self.prediction = config.prediction
        betas = torch.linspace(config.beta_start, config.beta_end, config.num_steps, dtype=torch.float64)  # [T]
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0).float()  # [T]

    def sample_time(self, num: int, generator: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
        """Draw times uniformly from 0 … T - 1, ``[N]`` int64."""
        source = torch.device(device) if generator is None else generator.device
        return torch.randint(self.config.num_steps, (num,), generator=generator, device=source).to(device)  # [N]

    @property
    def last_time(self) -> float:
        """T - 1, the time at which sampling starts: nearly noise alone."""
        return self.config.num_steps - 1

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """√ᾱ x₀ + √(1 - ᾱ) e, ``[N, D]``."""
        signal, sigma = self._scales(time)  # [N, 1]
        return signal * x0 + sigma * noise  # [N, D]

    def target(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noise e, x₀, or the velocity √ᾱ e - √(1 - ᾱ) x₀ (arXiv 2202.00512), ``[N, D]``."""
        if self.prediction == "epsilon":
            return noise  # [N, D]
        if self.prediction == "sample":
            return x0  # [N, D]
        signal, sigma = self._scales(time)  # [N, 1]
        return signal * noise - sigma * x0  # [N, D]

    def weight(self, time: Tensor) -> Tensor:
        """Ones, ``[N]``: the "simple" loss (arXiv 2006.11239, equation 14)."""
        return torch.ones(time.shape, device=time.device)  # [N]

    def to_sample(self, x_t: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """Solve for x₀, ``[N, D]``."""
        if self.prediction == "sample":
            return prediction  # [N, D]
        signal, sigma = self._scales(time)  # [N, 1]
        if self.prediction == "epsilon":
            return (x_t - sigma * prediction) / signal  # [N, D]
        return signal * x_t - sigma * prediction  # [N, D]

    def network_time(self, time: Tensor) -> Tensor:
        """The step itself for T = 1000, else stretched to 0 … 1000."""
        return time * (1000 / self.config.num_steps)

    def sampling_times(self, num_steps: int, device: torch.device | str) -> Tensor:
        """Times of a sampler in descending order, ``[num_steps]`` int64.

        The first is T - 1, the noise the denoiser was trained on, and the step after the last ends at the clean
        token ("trailing" in arXiv 2305.08891, table 2).

        Raises:
            InputError: more steps than noise levels.
        """
        total = self.config.num_steps
        if num_steps > total:
            raise InputError(f"num_steps is {num_steps}; give at most the objective's num_steps, {total}")
        remaining = torch.arange(num_steps, 0, -1, device=device)  # [num_steps]
        return (remaining * total + num_steps // 2) // num_steps - 1  # [num_steps]

    def _scales(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 - ᾱ), ``[N, 1]`` or scalars."""
        alpha = _column(self.alphas_cumprod.to(time.device)[time])  # [N, 1]
        return alpha.sqrt(), (1 - alpha).sqrt()


def _column(time: Tensor) -> Tensor:
    """Align ``[N]`` with ``[N, D]``; a scalar stays one."""
    return time[:, None] if time.dim() else time


ObjectiveConfig = Annotated[FlowConfig | DDPMConfig, Field(discriminator="kind")]

Objective = Flow | DDPM
"""Both have the same methods: how times are drawn, tokens noised, what is predicted, and what that says of tokens."""

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {"flow": Flow, "ddpm": DDPM}


def build_objective(config: FlowConfig | DDPMConfig) -> Objective:
    """Build the objective a configuration describes."""
    return OBJECTIVES[config.kind](config)
