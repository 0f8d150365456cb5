"""Masks cut from scores."""

import pytest
import torch

from tokenization.compressed.parts import cut_mask
from tokenization.errors import InputError


def test_the_highest_scores_live_and_their_number_is_the_wished_one():
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 0.0]])
    assert cut_mask(scores, 0.5).tolist() == [[True, False, False], [True, True, False]]
    for share in (0.0, 0.8, 0.95, 1.0):
        assert cut_mask(torch.randn(20, 50), share).sum() == 1000 - round(1000 * share)


def test_ties_go_to_the_earlier_place_and_an_impossible_share_is_refused():
    assert cut_mask(torch.zeros(4), 0.5).tolist() == [True, True, False, False]
    with pytest.raises(InputError, match="share of zeros"):
        cut_mask(torch.zeros(4), 1.5)
