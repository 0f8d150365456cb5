"""Objectives and samplers, by identities: inverses, endpoints, closed forms, reference implementations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rpg.diffusion import DDPM, DDPMConfig, Flow, FlowConfig, Objective, build_objective
from tokenization.errors import InputError

OBJECTIVES = [FlowConfig(prediction=prediction) for prediction in ("velocity", "sample")] + [
    DDPMConfig(prediction=prediction) for prediction in ("epsilon", "sample", "velocity")
]
SAMPLERS = [(config, sampler) for config in OBJECTIVES for sampler in build_objective(config).samplers]
MEAN, DEVIATION = 0.7, 0.3


def name(value):
    return f"{value.kind}-{value.prediction}" if hasattr(value, "prediction") else None


def signal_and_sigma(objective: Objective, network_time: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of x₀ and of the noise at a time on the scale 0 … 1000."""
    if isinstance(objective, Flow):
        return 1 - network_time / 1000, network_time / 1000
    assert isinstance(objective, DDPM)
    alpha = objective.alphas_cumprod[(network_time * objective.config.num_steps / 1000).round().long()]
    return alpha.sqrt(), (1 - alpha).sqrt()


def as_prediction(objective: Objective, x_t: Tensor, x0: Tensor, network_time: Tensor) -> Tensor:
    """Express the belief that the clean tokens are x0 in the objective's own prediction."""
    signal, sigma = signal_and_sigma(objective, network_time)
    noise = (x_t - signal * x0) / sigma
    if objective.prediction == "epsilon":
        return noise
    if objective.prediction == "sample":
        return x0
    return noise - x0 if isinstance(objective, Flow) else signal * noise - sigma * x0


def gaussian_predict(objective: Objective):
    """The optimal denoiser of data N(MEAN, DEVIATION²), in closed form."""

    def predict(x_t: Tensor, network_time: Tensor) -> Tensor:
        signal, sigma = signal_and_sigma(objective, network_time)
        gain = signal * DEVIATION**2 / (signal**2 * DEVIATION**2 + sigma**2)
        return as_prediction(objective, x_t, MEAN + gain * (x_t - signal * MEAN), network_time)

    return predict


@pytest.mark.parametrize("config", OBJECTIVES, ids=name)
def test_target_leads_back_to_the_sample(config):
    objective = build_objective(config)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(64, 5, generator=generator), torch.randn(64, 5, generator=generator)
    time = objective.sample_time(64, generator)
    x_t = objective.add_noise(x0, noise, time)
    found = objective.to_sample(x_t, objective.target(x0, noise, time), time)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", OBJECTIVES, ids=name)
def test_endpoints(config):
    objective = build_objective(config)
    x0, noise = torch.randn(2, 5), torch.randn(2, 5)
    first, last = (torch.zeros(2), torch.ones(2)) if config.kind == "flow" else (torch.tensor([0] * 2), [999] * 2)
    last = torch.as_tensor(last)
    tolerance = 0.0 if config.kind == "flow" else 0.05
    torch.testing.assert_close(objective.add_noise(x0, noise, first), x0, rtol=0, atol=tolerance)
    torch.testing.assert_close(objective.add_noise(x0, noise, last), noise, rtol=0, atol=tolerance)
    assert objective.network_time(first)[0] == 0
    assert objective.network_time(last)[0] == (1000 if config.kind == "flow" else 999)
    assert objective.weight(first).isfinite().all() and objective.weight(last)[0] == 1


def test_flow_weight_is_capped():
    time = torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0])
    found = Flow(FlowConfig(prediction="sample", weight_cap=4.0)).weight(time)
    torch.testing.assert_close(found, torch.tensor([4.0, 4.0, 4.0, 1 / 0.64, 1.0]))
    assert (Flow(FlowConfig(prediction="velocity")).weight(time) == 1).all()


def test_flow_times_are_logit_normal():
    objective = Flow(FlowConfig(time_mean=0.5, time_std=2.0))
    logits = torch.logit(objective.sample_time(50_000, torch.Generator().manual_seed(0)).double())
    assert abs(logits.mean() - 0.5) < 0.03 and abs(logits.std() - 2.0) < 0.03


def test_ddpm_times_are_all_steps_alike_often():
    """The first and the last among them: sampling starts at the last, which must have been learned."""
    objective = build_objective(DDPMConfig(num_steps=5))
    times = objective.sample_time(10_000, torch.Generator().manual_seed(0))
    counts = times.bincount(minlength=5)
    assert counts.shape == (5,) and (counts - 2000).abs().max() < 160  # four standard deviations
    assert times.max() == objective.last_time


def test_ddpm_alphas_are_the_product():
    alphas = build_objective(DDPMConfig()).alphas_cumprod
    product, expected = 1.0, []
    for step in range(1000):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * step / 999)
        expected.append(product)
    torch.testing.assert_close(alphas, torch.tensor(expected))
    from diffusers import DDPMScheduler

    torch.testing.assert_close(alphas, DDPMScheduler().alphas_cumprod, rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 60, 300, 999, 1000])
def test_ddpm_sampling_starts_at_the_noise_it_was_trained_on(num_steps):
    times = build_objective(DDPMConfig()).sampling_times(num_steps, "cpu").tolist()
    assert len(times) == num_steps and times[0] == 999
    assert times == sorted(set(times), reverse=True) and times[-1] == round(1000 / num_steps) - 1
    if num_steps == 1000:
        assert times[-1] == 0


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_sampling_times_run_from_one_to_zero(shift):
    times = Flow(FlowConfig(time_shift=shift)).sampling_times(5, torch.device("cpu"))
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    assert math.isclose(times[1], shift * 0.8 / (1 + (shift - 1) * 0.8), rel_tol=1e-6)


@pytest.mark.parametrize(("config", "sampler"), SAMPLERS, ids=name)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
def test_perfect_predictor_recovers_the_sample(config, sampler, num_steps):
    objective = build_objective(config)
    x0, noise = torch.randn(8, 5), torch.randn(8, 5)
    times = []

    def predict(x_t, network_time):
        assert network_time.shape == ()
        times.append(float(network_time))
        return as_prediction(objective, x_t, x0, network_time)

    found = objective.sample(
        predict, noise, sampler=sampler, num_steps=num_steps, generator=torch.Generator().manual_seed(0), eta=0.5
    )
    assert times[0] == (1000 if config.kind == "flow" else 999)
    if config.prediction == "sample":
        torch.testing.assert_close(found, x0, rtol=0, atol=0 if sampler in ("euler", "heun") else 1e-5)
    else:
        # One step from T - 1 divides the rounding error of the prediction by √ᾱ = 0.006.
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-3 if num_steps == 1 else 1e-4)


@pytest.mark.parametrize(("config", "sampler"), SAMPLERS, ids=name)
def test_gaussian_data_are_sampled_with_their_mean_and_deviation(config, sampler):
    objective = build_objective(config)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, generator=generator)
    num_steps = {"ddpm": 1000, "ddim": 250, "dpm-solver++": 60, "euler": 250, "heun": 25}[sampler]
    found = objective.sample(
        gaussian_predict(objective), noise, sampler=sampler, num_steps=num_steps, generator=generator
    )
    assert abs(found.mean() - MEAN) < 0.015
    assert abs(found.std() - DEVIATION) < 0.015


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_keeps_the_marginals(eta):
    objective = build_objective(DDPMConfig())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, generator=generator)
    found = objective.sample(
        gaussian_predict(objective), noise, sampler="ddim", num_steps=500, generator=generator, eta=eta
    )
    assert abs(found.mean() - MEAN) < 0.015 and abs(found.std() - DEVIATION) < 0.015


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_orders_of_convergence(prediction):
    objective = build_objective(FlowConfig(prediction=prediction))
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = MEAN + DEVIATION * noise

    def error(sampler: str, num_steps: int) -> float:
        found = objective.sample(gaussian_predict(objective), noise, sampler=sampler, num_steps=num_steps)
        return float((found - exact).abs().max())

    for sampler, order in (("euler", 1), ("heun", 2)):
        observed = math.log2(error(sampler, 32) / error(sampler, 64))
        assert abs(observed - order) < 0.3, (sampler, observed)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "velocity"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_equals_diffusers_where_the_steps_divide(prediction, eta):
    from diffusers import DDIMScheduler

    objective = build_objective(DDPMConfig(prediction=prediction))
    predict, noise = gaussian_predict(objective), torch.randn(9, 4)
    found = objective.sample(
        predict, noise, sampler="ddim", num_steps=50, generator=torch.Generator().manual_seed(3), eta=eta
    )
    scheduler = DDIMScheduler(
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule="linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type={"velocity": "v_prediction"}.get(prediction, prediction),
    )
    scheduler.set_timesteps(50)
    generator, x = torch.Generator().manual_seed(3), noise
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t.float()), t, x, eta=eta, generator=generator).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_ancestral_ddim_is_ddpm():
    objective = build_objective(DDPMConfig(num_steps=100))
    predict, noise = gaussian_predict(objective), torch.randn(9, 4)
    found, expected = (
        objective.sample(
            predict, noise, sampler=sampler, num_steps=100, generator=torch.Generator().manual_seed(1), eta=1.0
        )
        for sampler in ("ddim", "ddpm")
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("config", "sampler"), SAMPLERS, ids=name)
def test_the_generator_decides_everything(config, sampler):
    objective = build_objective(config)
    noise = torch.randn(4, 3)

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(torch.randint(1000, ()).item())
        return objective.sample(
            gaussian_predict(objective), noise, sampler=sampler, num_steps=5, generator=generator, eta=1.0
        )

    assert torch.equal(sample(0), sample(0))
    assert torch.equal(sample(0), sample(1)) is (sampler not in ("ddpm", "ddim"))
    times = [objective.sample_time(10, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*times)


@pytest.mark.parametrize(("config", "sampler"), SAMPLERS, ids=name)
def test_callback_sees_every_step_and_predictions_may_be_bf16(config, sampler):
    objective = build_objective(config)
    predict, seen = gaussian_predict(objective), []
    found = objective.sample(
        lambda x_t, network_time: predict(x_t, network_time).bfloat16(),
        torch.randn(4, 3),
        sampler=sampler,
        num_steps=6,
        generator=torch.Generator().manual_seed(0),
        callback=lambda step, x: seen.append((step, x.dtype)),
    )
    assert found.dtype == torch.float32
    assert seen == [(step, torch.float32) for step in range(6)]


def test_users_mistakes_are_named():
    objective, noise = build_objective(DDPMConfig()), torch.randn(2, 3)
    with pytest.raises(InputError, match=r"no sampler heun; choose one of ddpm, ddim"):
        objective.sample(gaussian_predict(objective), noise, sampler="heun", num_steps=4)
    with pytest.raises(InputError, match="at most the objective's num_steps, 1000"):
        objective.sample(gaussian_predict(objective), noise, sampler="ddim", num_steps=1001)
    with pytest.raises(InputError, match="num_steps is 0"):
        objective.sample(gaussian_predict(objective), noise, sampler="ddim", num_steps=0)
