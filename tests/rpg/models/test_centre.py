"""The closed-form part of tokens: exact where it explains all, orthogonal to what remains elsewhere."""

from __future__ import annotations

import torch

from rpg.models.centre import Centre, _leading_eigenvectors, _whitened, fit_centre
from rpg.models.states import CodeTable


def tokens_of(num: int = 12, rank: int = 3, noise: float = 0.0) -> torch.Tensor:
    """Tokens ``[num, 5, 4]`` of zero mean, of a low rank, and noise."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(num, rank, generator=rng) @ torch.randn(rank, 20, generator=rng)
    values = values + noise * torch.randn(num, 20, generator=rng)
    return (values - values.mean(0)).view(num, 5, 4)


def test_codes_of_the_zoos_rank_leave_nothing():
    tokens, centre = tokens_of(), Centre(5, 4)
    fitted = fit_centre(centre, tokens, None, 3, torch.ones(5))
    assert torch.allclose(centre(None, fitted.codes, torch.arange(5)), tokens, atol=1e-5)
    assert not centre.scale.any()
    # Noise of a denoiser does not reach tokens of which nothing remains.
    assert torch.equal(centre.complete(torch.randn(12, 5, 4), tokens, torch.arange(5)), tokens)


def test_codes_are_white_and_the_rest_is_orthogonal_to_them():
    tokens, centre = tokens_of(noise=0.5), Centre(5, 4)
    codes = fit_centre(centre, tokens, None, 3, torch.ones(5)).codes
    assert torch.allclose(codes.T @ codes / 12, torch.eye(3), atol=1e-5)
    assert torch.allclose(codes.mean(0), torch.zeros(3), atol=1e-5)
    ids = torch.tensor([3, 0])
    known = centre(None, codes, ids)
    rest = centre.remainder(tokens[:, ids], known, ids)
    assert torch.allclose(rest.square().mean((0, 2)), torch.ones(2), atol=1e-4)
    assert torch.allclose(codes.T @ rest.flatten(1), torch.zeros(3, 8), atol=1e-3)
    assert torch.allclose(centre.complete(rest, known, ids), tokens[:, ids], atol=1e-5)


def test_the_weight_decides_which_tokens_codes_describe():
    tokens = tokens_of(rank=8)
    errors = []
    for weight in (torch.ones(5), torch.tensor([1.0, 1e-4, 1e-4, 1e-4, 1e-4])):
        centre = Centre(5, 4)
        codes = fit_centre(centre, tokens, None, 3, weight).codes
        errors.append(float((centre(None, codes, torch.tensor([0])) - tokens[:, :1]).square().mean()))
    assert errors[1] < errors[0] / 2


def test_regression_takes_off_what_the_condition_explains_and_leaves_left_out_errors():
    conditions = torch.tensor([[float(i >> b & 1) for b in range(4)] for i in range(16)])
    rng = torch.Generator().manual_seed(1)
    explained = ((conditions * 2 - 1) @ torch.randn(4, 20, generator=rng)).view(16, 5, 4)
    tokens = explained + 0.05 * torch.randn(16, 5, 4, generator=rng)
    tokens = tokens - tokens.mean(0)
    centre = Centre(5, 4, ("binary", 4))
    fitted = fit_centre(centre, tokens, conditions, 0, torch.ones(5))
    assert fitted.regression is not None and fitted.regression.error < 0.1
    trained = centre(conditions, None, torch.arange(5))
    assert torch.allclose(tokens - trained, fitted.left_out, atol=1e-5)  # training sees what generation will
    known = centre.eval()(conditions, None, torch.arange(5))
    assert float((tokens - known).square().mean()) < float(fitted.left_out.square().mean())
    assert torch.allclose(centre.scale, fitted.left_out.square().mean((0, 2)).sqrt(), atol=1e-5)


def test_what_was_fitted_is_loaded_whatever_its_size():
    centre, table = Centre(5, 4, ("binary", 4)), CodeTable(12, 3)
    fitted = fit_centre(centre, tokens_of(noise=0.1), torch.eye(12)[:, :4], 3, torch.ones(5))
    table.fill(weight=fitted.codes)
    again, other = Centre(5, 4, ("binary", 4)), CodeTable(2, 3)
    again.load_state_dict(centre.eval().state_dict())
    again.eval()
    other.load_state_dict(table.state_dict())
    ids = torch.arange(5)
    condition = torch.eye(12)[:2, :4]
    assert torch.equal(again(condition, fitted.codes[:2], ids), centre(condition, fitted.codes[:2], ids))
    assert torch.equal(other(torch.tensor([11])), fitted.codes[11:])


def test_several_checkpoints_of_a_condition_are_left_out_together_unless_it_is_a_class():
    bits = torch.tensor([[float(i >> b & 1) for b in range(3)] for i in range(8)]).repeat_interleave(3, 0)
    rng = torch.Generator().manual_seed(2)
    of_task = torch.randn(8, 5, 4, generator=rng).repeat_interleave(3, 0)  # no rule: a new task cannot be known
    tokens = of_task + 0.1 * torch.randn(24, 5, 4, generator=rng)
    tokens = tokens - tokens.mean(0)
    new = fit_centre(Centre(5, 4, ("binary", 3)), tokens, bits, 0, torch.ones(5))
    classes = torch.arange(8.0).repeat_interleave(3)[:, None]
    known = fit_centre(Centre(5, 4, ("class", 8)), tokens, classes, 0, torch.ones(5))
    assert new.regression is not None and new.regression.error > 0.9
    assert known.regression is not None and known.regression.error < 0.1


def test_many_checkpoints_have_the_codes_of_the_problem_that_is_larger() -> None:
    torch.manual_seed(0)
    values = torch.randn(40, 6, dtype=torch.float64) * torch.arange(1, 7)
    few = _leading_eigenvectors(values, 3)
    assert torch.allclose((_whitened(values, 3) / 40**0.5).abs(), few.abs(), atol=1e-9)


def test_where_conditions_have_several_checkpoints_codes_say_how_these_differ() -> None:
    """Not what a regression gets wrong of a condition, which is larger and the same for all its checkpoints."""
    rng = torch.Generator().manual_seed(3)
    groups = torch.arange(8).repeat_interleave(3)
    of_task = 4 * torch.randn(8, 20, generator=rng)[groups]
    within = torch.randn(24, 2, generator=rng) @ torch.randn(2, 20, generator=rng)
    within = within - torch.stack([within[groups == each].mean(0) for each in range(8)])[groups]
    tokens = (of_task + within).view(24, 5, 4)
    centre = Centre(5, 4)
    codes = fit_centre(centre, tokens - tokens.mean(0), None, 2, torch.ones(5), groups).codes
    assert torch.allclose(centre(None, codes, torch.arange(5)).flatten(1), within, atol=1e-4)
    plain = fit_centre(Centre(5, 4), tokens - tokens.mean(0), None, 2, torch.ones(5)).codes
    means = torch.stack([plain[groups == each].mean(0) for each in range(8)])
    assert means.square().mean() > 0.3  # of 1: without groups they name the task


def test_codes_of_what_is_shown_make_tokens_and_leave_what_is_not():
    shown = torch.randn(12, 2, generator=torch.Generator().manual_seed(2))
    shown = shown - shown.mean(0)
    tokens = tokens_of(noise=1.0)
    tokens[:, 0, :2] = shown
    centre = Centre(5, 4)
    fitted = fit_centre(centre, tokens, None, 2, torch.ones(5), shown=shown)
    known = centre(None, fitted.codes, torch.arange(5))
    assert torch.allclose(known[:, 0, :2], shown, atol=1e-5)
    axes = torch.linalg.svdvals(shown)
    assert torch.allclose(fitted.spread, axes / axes.square().mean().sqrt(), atol=1e-5)
