from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.verify import RoundTrip, verify_round_trip
from tokenization.zoo.zoo import Zoo


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    zoo = Zoo.create(tmp_path / "zoo")
    for seed in range(3):
        torch.manual_seed(seed)
        state = {"w": torch.randn(4, 5), "half": torch.randn(7).bfloat16(), "count": torch.tensor(seed)}
        zoo.append(state, run=0, step=seed)
    return zoo


@pytest.mark.parametrize("normalization", ["residual", "layer", "none"])
def test_every_value_comes_back(zoo: Zoo, normalization: str) -> None:
    layout = TokenLayout.fit(zoo, TokenOptions(size=8, normalization=normalization))  # type: ignore[arg-type]
    trip = verify_round_trip(zoo, layout)
    assert trip == RoundTrip(3, 3 * 27, 3 * 27, 1)


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_value_that_does_not_is_named(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    layout = TokenLayout.fit(zoo, TokenOptions(size=8))
    decode = layout.decode

    def wrong(tokens: Tensor) -> dict[str, Tensor]:
        state = decode(tokens)
        state["half"][3] += error * 100
        return state

    monkeypatch.setattr(layout, "decode", wrong)
    with pytest.raises(InputError, match=r"000000\.safetensors: tensor 'half'.*after tokens and back"):
        verify_round_trip(zoo, layout)
