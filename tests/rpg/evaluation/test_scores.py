"""Scorers of the user's own, and the evaluation that goes by their figures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rpg.evaluation.asking import Made
from rpg.evaluation.config import EvaluateConfig
from rpg.evaluation.scores.made_for import nearest_rows
from rpg.evaluation.scores.measure import Conditions, Options, evaluate_scores
from rpg.evaluation.scores.scorer import OwnScorer, less_is_better, load_scorer
from rpg.evaluation.scores.show import print_scores, verdict_of
from rpg.evaluation.workers import Workers
from rpg.generation.sampler import Partition
from tests.conftest import make_zoo
from tests.rpg.evaluation.test_span import slow_vectors, span_of
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError

SMALL = EvaluateConfig(num=4, num_baseline=3)


def norm(state_dict):
    return {"norm": state_dict["3.weight"].norm(), "loss": 2.0}


def made(zoo, rows) -> Made:
    return Made(len(rows), range(len(rows)), (zoo.state_dict(row) for row in rows))


# --- the function -------------------------------------------------------------------------------------------------


def test_a_function_takes_a_state_dict_or_a_path(zoo):
    network = zoo.state_dict(1)
    seen = []

    def by_annotation(given: Path):
        seen.append(given)
        return float(Checkpoint.open(given).tensor("3.weight").norm())

    def file_score(file, condition=None):
        assert condition == (1.0,)
        return len(Checkpoint.open(file).tensors)

    expected = {"norm": network["3.weight"].norm().item(), "loss": 2.0}
    assert OwnScorer(norm, "norm")(network, None, "x") == pytest.approx(expected)
    assert OwnScorer(by_annotation, "n")(network, None, "x") == {"by_annotation": pytest.approx(expected["norm"])}
    assert OwnScorer(file_score, "n")(network, (1.0,), "x") == {"file_score": len(network)}
    assert not seen[0].exists()


@pytest.mark.parametrize(
    ("returned", "part"), [(None, "NoneType"), ({}, "dict"), ("good", "str"), ({"a": "b"}, "dict"), ([1.0], "list")]
)
def test_what_is_no_number_is_refused(returned, part):
    with pytest.raises(InputError, match=part):
        OwnScorer(lambda state_dict: returned, "mine:score")({}, None, "network 3")


def test_a_function_that_fails_is_one_line_with_its_place():
    def fails(state_dict):
        return state_dict["missing"]

    with pytest.raises(InputError, match=r"failed on network 3 \(test_scores.py, line \d+\): KeyError: 'missing'"):
        OwnScorer(fails, "mine:fails")({}, None, "network 3")


def test_functions_are_found_in_modules_and_files(tmp_path, monkeypatch):
    (tmp_path / "helper_of_mine.py").write_text("BASE = 3\n")
    text = "import helper_of_mine\ndef score(state_dict):\n    return helper_of_mine.BASE\nclass Of:\n    f = score\n"
    (tmp_path / "scores_of_mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for reference in ("scores_of_mine:score", "scores_of_mine.py:score", f"{tmp_path}/scores_of_mine.py:Of.f"):
        assert list(load_scorer(reference)({}, None, "x").values()) == [3.0]
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for reference, part in {
        "scores_of_mine": "names no function",
        "nothing_there:score": "nothing_there",
        "nothing.py:score": "no file",
        "broken.py:score": "ZeroDivisionError",
        "scores_of_mine:other": "other",
        "scores_of_mine:__name__": "__name__",
    }.items():
        with pytest.raises(InputError, match=part):
            load_scorer(reference)
    with pytest.raises(InputError, match="takes no argument"):
        OwnScorer(lambda: 3, "mine:score")


def test_names_say_what_is_better_unless_the_user_does():
    names = ["accuracy", "val_loss", "glossary", "MSE", "error_rate", "perplexity"]
    assert less_is_better(names) == {"val_loss", "MSE", "error_rate", "perplexity"}
    assert less_is_better(names, lower=["accuracy"], higher=["MSE"]) == {
        "accuracy",
        "val_loss",
        "error_rate",
        "perplexity",
    }
    with pytest.raises(InputError, match="losss"):
        less_is_better(names, lower=["losss"])
    with pytest.raises(InputError, match="both"):
        less_is_better(names, lower=["MSE"], higher=["MSE"])


# --- the evaluation -----------------------------------------------------------------------------------------------


def test_originals_baselines_and_generated_networks_are_scored(zoo):
    result = evaluate_scores(OwnScorer(norm, "mine:norm"), span_of(zoo), made(zoo, [0, 2, 0]), SMALL)
    own = [zoo.state_dict(i)["3.weight"].norm().item() for i in range(6)]
    assert result.sets["original"].figures["norm"] == pytest.approx(own)
    assert result.sets["generated"].figures["norm"] == pytest.approx([own[0], own[2], own[0]])
    assert result.sets["generated"].distances == pytest.approx([0.0] * 3, abs=1e-4)
    assert result.better == {"norm": "more", "loss": "less"} and result.first == "norm"
    assert result.threshold == torch.tensor(own).median().item()
    assert {"average", "interpolation", "noise_0.05", "covariance_gaussian", "average_of_6"} <= result.sets.keys()
    assert result.seconds_per_network is not None and result.unit is not None and not result.matched


def test_distances_are_those_of_the_values_to_the_nearest_other_original(zoo):
    result = evaluate_scores(OwnScorer(norm, "n"), span_of(zoo), None, SMALL)
    vectors, _ = slow_vectors(zoo, [zoo.state_dict(0)])
    far = torch.cdist(vectors, vectors).fill_diagonal_(float("inf")).amin(1)
    assert result.sets["original"].distances == pytest.approx((far / far.median()).tolist(), rel=1e-4)
    assert "generated" not in result.sets and not any(name.endswith("at_distance") for name in result.sets)


def test_components_are_those_of_the_zoo(zoo):
    result = evaluate_scores(OwnScorer(norm, "n"), span_of(zoo), made(zoo, [3]), SMALL)
    points = torch.tensor(result.components["original"])
    vectors, _ = slow_vectors(zoo, [zoo.state_dict(0)])
    values = torch.linalg.svdvals(vectors - vectors.mean(0))
    assert result.explained == pytest.approx(float(values[:2].square().sum() / values.square().sum()), rel=1e-4)
    assert torch.allclose(points.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(points.std(0), torch.ones(2), atol=1e-3)
    assert points[3].tolist() == pytest.approx(list(result.components["generated"][0]), abs=1e-4)


def test_new_and_good_goes_by_the_direction(zoo):
    for lower, expected in ((), 0.0), (("norm",), 1.0):
        large = [{n: v + 5 if v.is_floating_point() else v for n, v in zoo.state_dict(0).items()}]
        generated = Made(1, [0], large)
        score = OwnScorer(lambda state_dict: {"norm": -state_dict["3.weight"].norm()}, "n")
        result = evaluate_scores(score, span_of(zoo), generated, SMALL, options=Options(lower=lower))
        assert result.sets["generated"].novel_and_performant[0] == expected
        assert any("new" in line for line in verdict_of(result))


def test_figures_that_are_not_finite_are_none_and_count_as_bad(zoo, capsys):
    result = evaluate_scores(
        OwnScorer(lambda s: math.nan if s["3.weight"].norm() > 100 else 1.0, "n"),
        span_of(zoo),
        Made(1, [0], [{name: 1000 + value for name, value in zoo.state_dict(0).items()}]),
        SMALL,
    )
    each = result.sets["generated"]
    assert list(each.figures.values()) == [(None,)] and list(each.summaries.values()) == [None]
    assert each.novel_and_performant[0] == 0.0
    print_scores(result)
    assert "nan" not in capsys.readouterr().out.lower() and "NaN" not in result.model_dump_json()


def test_the_same_figures_for_every_network(zoo):
    names = iter("abcdefghijkl" * 9)
    with pytest.raises(InputError, match="same figures"):
        evaluate_scores(OwnScorer(lambda s: {next(names): 1.0}, "n"), span_of(zoo), None, SMALL)


def test_networks_are_scored_by_what_they_were_made_for(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", condition_size=2)
    conditions = [entry.condition for entry in zoo.entries]
    score = OwnScorer(lambda state_dict, condition: condition[0] + 10 * condition[1], "n")
    given = Conditions(conditions, (), conditions[1:3])
    result = evaluate_scores(score, span_of(zoo), made(zoo, [0, 0, 0]), SMALL, conditions=given)
    assert next(iter(result.sets["original"].figures.values())) == (0, 1, 10, 11, 0, 1)
    assert next(iter(result.sets["generated"].figures.values())) == (1, 10, 1)
    assert next(iter(result.sets["interpolation"].figures.values())) == (1, 10, 1)


def test_a_zoo_of_one_checkpoint_has_no_distances(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", num=1)
    result = evaluate_scores(OwnScorer(norm, "n"), span_of(zoo), None, SMALL)
    assert set(result.sets) == {"original", "average"} and result.unit is None
    print_scores(result)


# --- several processes --------------------------------------------------------------------------------------------


def test_each_process_computes_its_places_and_progress_counts_all(monkeypatch):
    told = []
    workers = Workers(Partition(0, 2), lambda done, total, note: told.append((done, total, note)))
    workers.expect(4, images=10)
    found = {}
    monkeypatch.setattr(workers, "collect", lambda places, own, num: found.update(zip(places, own, strict=True)))
    workers.map(lambda place, item: item * 2, [1, 2, 3, 4])
    assert found == {0: 2, 2: 6} and [each[:2] for each in told][-1] == (4, 4) and "images/s" in told[0][2]
    assert Workers().map(lambda place, item: (place, item), "ab") == [(0, "a"), (1, "b")]
    assert Workers().map_some(lambda some: [each.upper() for each in some], list("abc" * 9)) == list("ABC" * 9)


def test_the_nearest_of_many_conditions_is_never_the_same_one():
    conditions = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    slow = torch.tensor([[(a - b).norm() if i != j else torch.inf for j, b in enumerate(conditions)]
                         for i, a in enumerate(conditions)])  # fmt: skip
    assert torch.equal(nearest_rows(conditions, conditions, own=True), slow.argmin(1))
    assert torch.equal(nearest_rows(conditions, conditions, own=False), torch.arange(40))
