from __future__ import annotations

import json
import weakref

import pytest
import torch

from rpg.config import Config
from rpg.evaluation import combinations
from rpg.evaluation.asking import Made
from rpg.evaluation.combinations import NAMES, Recipe, cook, recipes
from rpg.evaluation.config import EvaluateConfig
from rpg.evaluation.evaluate import evaluate
from rpg.evaluation.results import EvaluationResult
from rpg.evaluation.span import ZooSpan
from rpg.evaluation.streamed import evaluate_streamed
from rpg.experiments import single
from rpg.tasks import DigitsConfig, build_task
from rpg.training.loop import train
from tests.rpg.evaluation.test_span import noisy, slow_vectors, span_of
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

SMALL = EvaluateConfig(num=6, num_baseline=5)


@pytest.fixture(scope="module")
def digits():
    return build_task(DigitsConfig(train_steps=150, steps=10, batch_size=64))


@pytest.fixture(scope="module")
def digits_zoo(digits, tmp_path_factory) -> Zoo:
    return digits.collect(tmp_path_factory.mktemp("streamed") / "zoo")


def test_a_recipe_is_the_sum_that_it_says(zoo):
    weights = torch.tensor([0.5, -0.2, 0.0, 0.7, 0.1, 0.3], dtype=torch.float64)
    made = cook(span_of(zoo), Recipe(weights))
    originals = [zoo.state_dict(index) for index in range(len(zoo))]
    assert list(made) == list(originals[0])
    for name, value in made.items():
        stacked = torch.stack([each[name] for each in originals])
        if not value.is_floating_point():
            assert torch.equal(value, originals[0][name])
            continue
        mean = stacked.double().mean(0)
        expected = mean + torch.einsum("n,n...->...", weights, stacked.double() - mean)
        expected = expected.clamp(min=float(stacked.min())) if name.endswith("running_var") else expected
        torch.testing.assert_close(value, expected.float())
        assert value.dtype == originals[0][name].dtype


def test_ties_and_low_precision_stay(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    for step in range(3):
        shared = torch.randn(4, 3).bfloat16()
        zoo.append({"a": shared, "b": shared, "fixed": torch.ones(2)}, run=0, step=step)
    made = cook(ZooSpan([zoo.checkpoint(i) for i in range(3)], ["a", "fixed"]), Recipe(torch.ones(3).double()))
    assert made["a"] is made["b"] and made["a"].dtype == torch.bfloat16 and torch.equal(made["fixed"], torch.ones(2))


def test_the_zoo_comes_back_from_its_own_weights(zoo):
    span = span_of(zoo)
    for index in (0, 4):
        made = cook(
            span, combinations.recipes(span, "noise", 1, 0, sigma=0.0)[0].__class__(torch.eye(6).double()[index])
        )
        assert all(torch.allclose(made[n], v) for n, v in zoo.state_dict(index).items() if v.is_floating_point())


def test_gaussians_have_the_covariance_of_the_zoo(zoo):
    span = span_of(zoo)
    weights = torch.stack([each.weights for each in recipes(span, "covariance_gaussian", 20000, 0)])
    deviations = slow_vectors(zoo, noisy(zoo, 1))[0]
    found = deviations.T @ torch.cov(weights.T) @ deviations
    expected = deviations.T @ deviations / (len(zoo) - 1)
    assert (found - expected).norm() < 0.05 * expected.norm()
    low = torch.stack([each.weights for each in recipes(span, "low_rank_gaussian", 50, 0)])
    assert torch.linalg.matrix_rank(low) <= 5
    squares = span.place_combinations(weights).squares
    assert squares.mean().item() == pytest.approx(span.gram.trace().item() / 5, rel=0.05)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_at_distance")])
def test_baselines_lie_at_the_distance_that_is_asked_for(digits_zoo, name):
    span = span_of(digits_zoo)
    distance = 3 * span.gram.diagonal().max().item() ** 0.5
    made = [cook(span, each) for each in recipes(span, name, 9, 0, distance=distance)]
    found = span.distances(span.place(made)).amin(1).median().item()
    assert found == pytest.approx(distance, rel=0.05)


def test_it_measures_what_the_evaluation_in_memory_measures(digits, digits_zoo):
    originals = [digits_zoo.state_dict(index) for index in range(len(digits_zoo))]
    span = span_of(digits_zoo)
    generated = [cook(span, each) for each in recipes(span, "covariance_gaussian", 6, 1)]
    held = evaluate(digits, originals, generated, SMALL)
    streamed = evaluate_streamed(digits, span, Made(6, range(6), iter(generated), [0] * 6), SMALL, seed=0)
    for field in ("split", "num_images", "original", "ensemble"):
        assert getattr(streamed, field) == getattr(held, field)
    assert streamed.generated.accuracies == held.generated.accuracies
    assert streamed.generated.seconds_per_network is not None
    assert streamed.generated.similarities == held.generated.similarities
    assert streamed.novelty_details.accuracy_threshold == held.novelty_details.accuracy_threshold
    assert [each.sigma for each in streamed.noise] == [each.sigma for each in held.noise]
    shared = streamed.baselines.keys() & held.baselines.keys()
    assert {"average_of_10", "interpolation", "low_rank_gaussian_at_distance", "covariance_gaussian"} <= shared
    assert set(streamed.novelty) == {
        "tau",
        "generated",
        "average",
        *streamed.baselines,
        *(f"noise_{s:g}" for s in SMALL.noise),
    }
    assert streamed.span.num == 6 and streamed.spread.disagreement == pytest.approx(held.spread.disagreement, abs=0.05)
    ratio = streamed.spread.mean_squared_deviation_ratio / held.spread.mean_squared_deviation_ratio
    assert ratio == pytest.approx(1, rel=0.5)  # layers count by their deviation here, by their values there


def test_held_out_checkpoints_are_compared_with(digits, digits_zoo):
    names = [name for name in digits_zoo.state_dict(0)]
    trained, others = ([digits_zoo.checkpoint(i) for i in range(first, 10, 2)] for first in range(2))
    span = ZooSpan(trained, names)
    generated = Made(5, range(5), (each.state_dict() for each in others))
    result = evaluate_streamed(digits, span, generated, SMALL, held_out=others)
    assert result.two_sample.num == 5 and result.two_sample.sets["generated"].coverage == 1.0
    assert result.two_sample.sets["generated"].minimum_matching_distance == 0.0
    assert {"originals", "average", "low_rank_gaussian"} <= result.two_sample.sets.keys()


class Network(dict):
    """A state dict that can be watched."""


def test_no_more_than_one_network_is_held(digits, digits_zoo):
    span, alive = span_of(digits_zoo), []

    def made():
        for index in range(6):
            assert sum(each() is not None for each in alive) == 0, "an earlier network is still held"
            network = Network(digits_zoo.state_dict(index))
            alive.append(weakref.ref(network))
            yield network
            del network

    evaluate_streamed(digits, span, Made(6, range(6), made()), SMALL.model_copy(update={"baselines": ()}))
    assert len(alive) == 6


def test_baselines_are_those_that_are_asked_for(digits, digits_zoo):
    span = span_of(digits_zoo)
    config = SMALL.model_copy(update={"baselines": ("average_of_k", "low_rank_gaussian")})
    streamed = evaluate_streamed(digits, span, Made(2, range(2), [digits_zoo.state_dict(0)] * 2), config)
    assert set(streamed.baselines) == {"average_of_10", "low_rank_gaussian"} and streamed.noise == ()
    originals = [digits_zoo.state_dict(index) for index in range(10)]
    held = evaluate(digits, originals, originals[:2], config)
    assert set(held.baselines) == {"average_of_10", "low_rank_gaussian"} and held.noise == ()
    with pytest.raises(InputError, match="rule out"):
        asked = config.model_copy(update={"baselines": ("extrapolation_at_distance",)})
        evaluate_streamed(digits, span, Made(1, range(1), [digits_zoo.state_dict(0)]), asked)
    with pytest.raises(InputError, match="control"):
        evaluate_streamed(
            digits,
            span,
            Made(0, (), ()),
            Config.parse({"run": "r", "zoo": "z", "evaluate": {"control": {}}}, "t").evaluate,
        )


def test_large_networks_get_what_is_affordable(digits, digits_zoo, monkeypatch):
    monkeypatch.setattr("rpg.evaluation.streamed.MANY_VALUES", 100)
    result = evaluate_streamed(digits, span_of(digits_zoo), Made(2, range(2), [digits_zoo.state_dict(0)] * 2), SMALL)
    assert set(result.baselines) == {"interpolation", "low_rank_gaussian", "low_rank_gaussian_at_distance"}


def test_a_run_is_evaluated_one_network_at_a_time_where_networks_are_large(digits, digits_zoo, tmp_path, monkeypatch):
    tree = {
        "run": str(tmp_path / "run"),
        "zoo": str(digits_zoo.path),
        "model": {
            "state": {"of": "checkpoint", "width": 8},
            "backbone": {"kind": "lstm", "d_model": 16, "num_layers": 1},
        },
        "train": {"steps": 2, "batch_size": 2},
        "evaluate": {"num": 3, "num_baseline": 2},
    }
    train(Config.parse(tree, "t"), say=lambda _: None)
    results = []
    for most in (1 << 40, 0):
        monkeypatch.setattr(single, "MOST_VALUES", most)
        results.append(single.evaluate_run(tmp_path / "run"))
        content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert list(content["span"]) == ["cosine", "spread", "accuracy", "num"] and content["two_sample"] is None
        assert EvaluationResult.model_validate(content) == results[-1]
        assert (tmp_path / "run" / "report.html").is_file()
    held, streamed = results
    assert held.generated.accuracies == streamed.generated.accuracies
    assert held.span.num == streamed.span.num == 3 and held.span.cosine == pytest.approx(streamed.span.cosine, abs=1e-5)
