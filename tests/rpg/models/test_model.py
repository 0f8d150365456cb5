import dataclasses

import pytest
import torch

from rpg.models.conditioning import ConditionConfig
from rpg.models.recurrent_diffusion import Batch, RecurrentConfig, RecurrentDiffusion, StateConfig

L, D, C = 6, 8, 3
POSITIONS = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]])


def build(**changes) -> RecurrentDiffusion:
    torch.manual_seed(0)
    config = RecurrentConfig.model_validate(
        {
            "backbone": {"kind": "lstm", "d_model": 16, "num_layers": 1},
            "denoiser": {"kind": "mlp", "width": 16, "hidden": 16, "depth": 1},
            **changes,
        }
    )
    network = RecurrentDiffusion(config, POSITIONS, D, num_states=4, condition_size=C)
    for parameter in network.parameters():  # the zero-initialised output would hide everything
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def batch(num: int = 5, conditions: bool = True) -> Batch:
    rng = torch.Generator().manual_seed(1)
    mask = torch.ones(L, D)
    mask[1, 5:] = 0
    samples = torch.randn(num, L, D, generator=rng) * mask
    return Batch(
        samples=samples,
        mask=mask,
        token_ids=torch.arange(L),
        time=torch.rand(num, L, generator=rng),
        noise=torch.randn(num, L, D, generator=rng),
        group=torch.tensor([0, 1, 0, 2, 1])[:num],
        states=torch.tensor([1, 3, 1]),
        conditions=torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 1, 0]]) if conditions else None,
        dropped=torch.tensor([False, False, True]) if conditions else None,
    )


def test_examples_that_share_state_and_condition_share_one_backbone_pass():
    network = build(condition=ConditionConfig(kind="binary"))
    shared = batch()
    expanded = dataclasses.replace(
        shared,
        group=torch.arange(5),
        states=shared.states[shared.group],
        conditions=shared.conditions[shared.group],
        dropped=shared.dropped[shared.group],
    )
    first, second = network(shared), network(expanded)
    torch.testing.assert_close(first.mean, second.mean)
    torch.testing.assert_close(first.per_token, second.per_token)


def test_the_loss_is_the_masked_weighted_mean_written_as_a_loop():
    network = build(state=StateConfig(of="none"))
    one_group = {"group": torch.zeros(5, dtype=torch.long), "states": torch.zeros(1, dtype=torch.long)}
    data = dataclasses.replace(batch(conditions=False), **one_group)
    prototypes = network.prototypes(None)
    total = 0.0
    for example in range(5):
        for token in range(L):
            x0, noise = data.samples[example, token][None], data.noise[example, token][None]
            time = data.time[example, token][None]
            kept = data.mask[token].bool()
            noisy = network.objective.add_noise(x0, noise, time) * kept
            context = network.denoiser.precompute(prototypes[0, token][None])
            predicted = network.denoiser(noisy, network.objective.network_time(time), context)
            error = (predicted - network.objective.target(x0, noise, time))[0, kept]
            total += (error.square().sum() * network.objective.weight(time)).item()
    assert float(network(data).mean) == pytest.approx(total / 5 / float(data.mask.sum()), rel=1e-5)


def test_padding_reaches_neither_the_network_nor_the_loss():
    network = build(condition=ConditionConfig(kind="binary"))
    data = batch()
    noise = data.noise.clone()
    noise[:, 1, 5:] = 1e6
    torch.testing.assert_close(network(data).mean, network(dataclasses.replace(data, noise=noise)).mean)


def test_dropped_conditions_are_not_seen_and_kept_ones_are():
    network = build(condition=ConditionConfig(kind="binary"))
    data = batch()
    changed = dataclasses.replace(data, conditions=1 - data.conditions)
    before, after = (
        network.prototypes(network.state_vectors(d.states), d.conditions, d.dropped) for d in (data, changed)
    )
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[0], after[0])


def test_injection_on_the_last_tokens_leaves_the_first_alone():
    network = build(condition=ConditionConfig(kind="binary", inject="last_tokens", last_tokens=2))
    states = torch.zeros(1, network.config.state.width)
    a, b = (network.prototypes(states, torch.tensor([bits])) for bits in ([0.0, 0, 1], [1.0, 1, 0]))
    assert torch.equal(a[:, : L - 2], b[:, : L - 2])
    assert not torch.allclose(a[:, L - 2 :], b[:, L - 2 :])


@pytest.mark.parametrize("kind", ["binary", "class", "vector", "text"])
def test_every_condition_reaches_backbone_and_denoiser(kind):
    network = build(condition=ConditionConfig(kind=kind, dropout=0.1))
    data = batch()
    if kind == "class":
        data = dataclasses.replace(data, conditions=torch.tensor([[0.0], [1], [2]]))
    network(data).mean.backward()
    assert network.condition is not None and network.denoiser_condition is not None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.condition.parameters())


@pytest.mark.parametrize("position", ["2d", "1d", "learned", "none"])
def test_positions(position):
    network = build(position=position)
    prototypes = network.prototypes(torch.zeros(1, network.config.state.width))
    assert prototypes.shape == (1, L, 16)
    assert ("position_embedding" in dict(network.named_parameters())) == (position == "learned")
    assert len(network.position_embedding.unique(dim=0)) == (1 if position == "none" else L)
