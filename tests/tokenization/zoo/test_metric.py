import pytest
import torch

from tests.conftest import make_zoo, small_network
from tokenization.errors import InputError
from tokenization.zoo.condition import MetricScale
from tokenization.zoo.zoo import Zoo


def with_losses(path, losses) -> Zoo:
    zoo = Zoo.create(path)
    for step, loss in enumerate(losses):
        zoo.append(small_network().state_dict(), run=0, step=step, metrics={"loss": loss})
    return zoo


def test_a_zoo_reaches_from_minus_1_to_1_and_the_middle_is_that_of_the_logarithms(tmp_path):
    zoo = with_losses(tmp_path / "zoo", [4.0, 0.2, 0.01])
    values = zoo.metric_values(range(3), "loss")
    scale = MetricScale.of_values("loss", values, True, zoo.path)
    torch.testing.assert_close(scale.scaled(torch.tensor(values)), torch.tensor([1.0, 0.0, -1.0]))
    linear = MetricScale.of_values("loss", values, False, zoo.path)
    torch.testing.assert_close(linear.scaled(torch.tensor([4.0, 2.005, 0.01])), torch.tensor([1.0, 0.0, -1.0]))


def test_what_cannot_be_conditioned_on_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no metric 'loss' \\(it has none\\)"):
        make_zoo(tmp_path / "plain").metric_values([0], "loss")
    with pytest.raises(InputError, match="linear"):
        MetricScale.of_values("loss", [1.0, 0.0], True, tmp_path)
    with pytest.raises(InputError, match="the same loss"):
        MetricScale.of_values("loss", [1.0, 1.0], True, tmp_path)


def test_what_lies_outside_the_zoo_is_warned_of_and_what_has_no_logarithm_refused():
    scale = MetricScale("loss", 0.01, 4.0, log=True)
    assert scale.warning(torch.tensor([[0.01], [0.1], [4.0]])) is None
    assert "loss 5 lies outside what was learned, 0.01 to 4" in (scale.warning(torch.tensor([5.0])) or "")
    with pytest.raises(InputError, match="logarithm"):
        scale.asked(torch.tensor([[0.0]]))
