import pytest
import torch

from rpg.models.conditioning import InitialConfig
from rpg.models.recurrent_diffusion import Batch, RecurrentConfig, RecurrentDiffusion
from rpg.section import validated
from rpg.training.batches import with_own_initial
from tokenization.errors import InputError

L, D = 5, 6
POSITIONS = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]])
MODEL = {
    "position": "layer", "state": {"of": "none"}, "initial": {}, "condition": {"kind": "metric", "name": "loss"},
    "diffusion": {"kind": "flow", "prediction": "sample"},
    "backbone": {"kind": "transformer", "d_model": 16, "num_layers": 2, "num_heads": 2, "causal": False},
    "denoiser": {"kind": "mlp", "width": 16, "hidden": 16, "depth": 1},
}  # fmt: skip


def build(**changes) -> RecurrentDiffusion:
    torch.manual_seed(0)
    return RecurrentDiffusion(RecurrentConfig.model_validate({**MODEL, **changes}), POSITIONS, D, condition_size=1)


def test_hidden_units_that_change_places_in_the_start_change_places_in_the_prototypes():
    network, starts, loss = build(), torch.randn(2, L, D), torch.tensor([[0.3], [-0.8]])
    order = torch.tensor([2, 0, 3, 1, 4])  # of the first layer's tokens
    there = network.prototypes(None, loss, initial=starts)
    torch.testing.assert_close(network.prototypes(None, loss, initial=starts[:, order]), there[:, order])
    causal = build(backbone={**MODEL["backbone"], "causal": True})
    moved = causal.prototypes(None, loss, initial=starts[:, order])
    assert not torch.allclose(moved, causal.prototypes(None, loss, initial=starts)[:, order], atol=1e-3)


def test_what_is_known_of_tokens_is_the_start_and_the_rest_has_the_size_of_differences():
    network, starts = build(), torch.randn(3, L, D)
    differences = torch.randn(200, L, D) * torch.tensor([1.0, 2, 3, 4, 5])[:, None]
    network.fit_initial(differences)
    tokens = torch.arange(L)
    known = network.known(None, torch.zeros(3, 1), tokens, starts)
    torch.testing.assert_close(known, starts)
    rest = network.centre.remainder(starts + differences[:3], known, tokens)
    torch.testing.assert_close(network.centre.complete(rest, known, tokens), starts + differences[:3])
    sizes = network.centre.remainder(differences, torch.zeros(1, L, D), tokens).square().mean((0, 2))
    torch.testing.assert_close(sizes, torch.ones(L))


def batch_of(starts: torch.Tensor, losses: torch.Tensor) -> Batch:
    num = len(starts)
    samples, ids = torch.zeros(num, L, D), torch.arange(L)
    return Batch(
        samples=samples, mask=torch.ones(L, D), token_ids=ids, time=torch.zeros(num, L), noise=samples,
        group=torch.arange(num), states=torch.zeros(num, dtype=torch.long), conditions=losses, dropped=None,
        initial=starts,
    )  # fmt: skip


def test_own_starts_are_what_one_step_makes_of_a_share_of_the_starts(monkeypatch):
    network, starts = build(initial={"own": 0.5}), torch.randn(6, L, D)
    losses = torch.linspace(-0.9, 0.6, 6)[:, None]
    network.fit_initial(torch.randn(50, L, D))
    for parameter in network.denoiser.parameters():
        torch.nn.init.normal_(parameter)  # untrained, it predicts no change
    asked = []
    plain = network.one_step

    def watched(noise, mask, states, conditions, initial):
        made = plain(noise, mask, states, conditions, initial)
        asked.append((conditions, initial, made))
        return made

    monkeypatch.setattr(network, "one_step", watched)
    batch = batch_of(starts, losses)
    rounds, lower = set(), []
    for seed in range(12):
        asked.clear()
        found = with_own_initial(network, batch, batch.mask, torch.Generator().manual_seed(seed))
        replaced = (found.initial != starts).flatten(1).any(1)
        assert int(replaced.sum()) == 3 and torch.equal(found.initial[~replaced], starts[~replaced])
        assert not found.initial.requires_grad and torch.equal(batch.initial, starts)
        rows = [int(row) for row in (starts[:, None] == asked[0][1][None]).flatten(2).all(2).float().argmax(0)]
        assert torch.equal(found.initial[rows], asked[-1][2])  # of the last round
        for (conditions, initial, _), before in zip(asked, [None, *asked], strict=False):
            assert before is None or torch.equal(initial, before[2])  # each goes on from the last
            assert bool((conditions >= losses[rows]).all()) and bool((conditions <= 1).all())
            lower += (conditions > losses[rows]).flatten().tolist()
        rounds.add(len(asked))
    assert rounds == {1, 2, 3} and 0.3 < sum(lower) / len(lower) < 0.7
    network.config = network.config.model_copy(update={"initial": InitialConfig()})
    assert torch.equal(with_own_initial(network, batch, batch.mask, torch.Generator()).initial, starts)


def test_one_step_from_a_start_is_the_start_and_the_predicted_difference():
    network, starts = build(), torch.randn(2, L, D)
    network.fit_initial(3 * torch.ones(4, L, D))
    with torch.no_grad():
        for parameter in network.denoiser.parameters():
            parameter.zero_()
    made = network.one_step(torch.randn(2, L, D), torch.ones(L, D), None, torch.zeros(2, 1), starts)
    # a denoiser that says 0 predicts a clean remainder of 0
    torch.testing.assert_close(made, starts)


def test_starts_take_the_place_of_states_and_metrics_have_names():
    refused = (
        ({"state": {"of": "run"}}, "state.of"), ({"condition": {"kind": "metric"}}, "needs a name"),
        ({"initial": {"own": 0.5}, "condition": {"kind": "vector"}}, "initial.own asks for a metric"),
    )  # fmt: skip
    for changes, words in refused:
        with pytest.raises(InputError, match=words):
            validated(RecurrentConfig, {**MODEL, **changes}, "test")
