"""Judges of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpg.evaluation.judges import OwnScorer, less_is_better, load_scorer
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError


def norm(state_dict):
    return {"norm": state_dict["3.weight"].norm(), "loss": 2.0}


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

    with pytest.raises(InputError, match=r"failed on network 3 \(test_judges.py, line \d+\): KeyError: 'missing'"):
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
