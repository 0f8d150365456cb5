import pytest
import torch

from rpg.models.recurrent_diffusion import RecurrentConfig, RecurrentDiffusion
from rpg.section import validated
from tokenization.errors import InputError

L, D = 5, 6
POSITIONS = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]])
MODEL = {
    "position": "layer", "state": {"of": "none"}, "initial": {}, "condition": {"kind": "metric", "name": "loss"},
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


def test_starts_take_the_place_of_states_and_metrics_have_names():
    for changes, words in (({"state": {"of": "run"}}, "state.of"), ({"condition": {"kind": "metric"}}, "needs a name")):
        with pytest.raises(InputError, match=words):
            validated(RecurrentConfig, {**MODEL, **changes}, "test")
