"""The diffusion over codes."""

from __future__ import annotations

import pytest
import torch

from rpg.models.code_prior import CodePrior, CodePriorConfig
from rpg.models.conditioning import ConditionConfig, ConditionEncoder
from rpg.models.states import even_noise


def test_the_untrained_prior_returns_its_noise():
    prior = CodePrior(CodePriorConfig(width=16, depth=1), 3).eval()
    noise = torch.randn(5, 3)
    assert torch.equal(prior.sample(noise), noise)


def test_the_true_velocity_of_a_gaussian_gives_that_gaussian():
    # Of x_t = (1 - t) z + t e with z ~ N(m, s²): E[e - z | x_t] in closed form.
    mean, spread = 2.0, 0.5
    prior = CodePrior(CodePriorConfig(width=16, depth=1, steps=200), 1).eval()

    def velocity(x, time, conditions=None):
        at = time[:, None]
        variance = (1 - at) ** 2 * spread**2 + at**2
        return ((at - (1 - at) * spread**2) / variance) * (x - (1 - at) * mean) - mean

    prior.forward = velocity  # type: ignore[method-assign, assignment]
    drawn = prior.sample(torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)))
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.05)
    assert float(drawn.std()) == pytest.approx(spread, rel=0.05)


def test_even_noise_is_normal_and_fills_every_cell_of_any_row_of_networks():
    for first in (0, 64, 192):
        noise = even_noise(7, range(first, first + 64), 2)
        cells = (torch.special.ndtr(noise.double()) * 8).long()  # 8 x 8 cells: one network in each
        assert len(cells.unique(dim=0)) == 64
    assert torch.equal(even_noise(7, [70, 69, 69], 3), even_noise(7, range(128), 3)[[70, 69, 69]])
    assert not torch.equal(even_noise(8, range(4), 3), even_noise(7, range(4), 3))


def test_it_learns_what_the_condition_says():
    torch.manual_seed(0)
    prior = CodePrior(
        CodePriorConfig(width=32, depth=2, dropout=0.0),
        2,
        lambda width: ConditionEncoder(ConditionConfig(kind="class"), 2, width),
    )
    centres = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    for _ in range(400):
        labels = torch.randint(2, (64, 1))
        codes = centres[labels[:, 0]] + 0.2 * torch.randn(64, 2)
        loss = prior.loss(codes, torch.randn(64, 2), torch.sigmoid(torch.randn(64)), labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for label in (0, 1):
        drawn = prior.eval().sample(torch.randn(200, 2), torch.full((200, 1), float(label))).detach()
        assert torch.allclose(drawn.mean(0), centres[label], atol=0.25)


@pytest.mark.parametrize("churn", [0.0, 15.0])
def test_the_true_denoiser_of_a_gaussian_gives_that_gaussian(churn):
    # z ~ N(0, s²), x = z + σ e: the best denoiser is s² x / (s² + σ²); F follows from EDM's preconditioning.
    spread = 0.5
    config = CodePriorConfig(objective="edm", whitened=False, width=16, depth=1, steps=60, churn=churn)
    prior = CodePrior(config, 1).eval()
    prior.spread.fill_(2.0)

    def output(noisy, level, conditions=None):
        variance = level[:, None].square()
        clean = spread**2 / (spread**2 + variance) * noisy
        return (clean - noisy / (1 + variance)) / (variance / (1 + variance)).sqrt()

    prior._denoiser_output = output  # type: ignore[method-assign, assignment]
    rngs = [torch.Generator().manual_seed(number) for number in range(4000)]
    drawn = prior.sample(torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)), rngs=rngs)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02)
    assert float(drawn.std()) == pytest.approx(spread / 2, rel=0.05)  # codes are divided by their spread


def test_the_best_denoiser_has_the_least_loss_of_edm():
    torch.manual_seed(0)
    prior = CodePrior(CodePriorConfig(objective="edm", whitened=False, width=16, depth=1), 1).eval()
    codes, noise, time = torch.randn(4000, 1), torch.randn(4000, 1), torch.sigmoid(torch.randn(4000))
    # Of unit normal codes the preconditioning's first part alone is the best denoiser, so that F = 0: untrained.
    untrained = prior.loss(codes, noise, time).detach()
    assert float(untrained) == pytest.approx(1.0, rel=0.1)
    torch.nn.init.constant_(prior.output.bias, 0.3)
    assert prior.loss(codes, noise, time) > untrained


def test_flow_matching_has_no_churn():
    with pytest.raises(ValueError, match="churn and start need objective: edm"):
        CodePriorConfig(churn=1)
