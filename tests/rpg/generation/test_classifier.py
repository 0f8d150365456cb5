"""A scikit-learn classifier that is fitted by one generation; how networks are asked for by files of examples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from rpg.generation.classifier import GeneratedClassifier
from tokenization.errors import InputError


def images(num: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(num)
    return rng.random((num, 64), dtype=np.float32), rng.integers(0, 10, num)


class AnyTable(GeneratedClassifier):
    """Fills images with whatever table a check brings, and takes its labels in turn: the rest is checked."""

    def fit(self, X, y):
        X, y = self._checked(X, y, fitting=True)
        self.labels_, numbers = np.unique(y, return_inverse=True)
        self._fit(self._fill(X), numbers)
        self.classes_ = self.labels_
        return self

    def predict_proba(self, X):
        probabilities = self._probabilities(self._fill(self._checked(X)))[:, : len(self.labels_)]
        return probabilities / probabilities.sum(1, keepdims=True)

    @staticmethod
    def _fill(X):
        return np.pad(X[:, :64], ((0, 0), (0, max(0, 64 - X.shape[1]))))


NEEDS_TRAINING = "hardly trained networks do not separate anything"


@pytest.mark.slow
def test_it_is_an_estimator(example_runs: Path) -> None:
    failing = {"check_classifiers_train": NEEDS_TRAINING}
    results = check_estimator(AnyTable(str(example_runs / "examples")), expected_failed_checks=failing, on_fail=None)
    failed = {each["check_name"]: each["exception"] for each in results if each["status"] == "failed"}
    assert not failed, failed
    assert len(results) > 40


def test_fitting_generates_and_predicting_runs_the_network(example_runs: Path) -> None:
    X, y = images(10)
    fitted = GeneratedClassifier(str(example_runs / "examples")).fit(X, y)
    logits = fitted.module()(torch.from_numpy(X))
    assert np.allclose(fitted.predict_proba(X), logits.softmax(-1).detach().numpy(), atol=1e-5)
    assert fitted.predict(X).dtype == y.dtype and list(fitted.classes_) == list(range(10))
    texts = GeneratedClassifier(str(example_runs / "examples")).fit(X, y.astype(str))
    assert np.allclose(texts.predict_proba(X), fitted.predict_proba(X))
    assert list(texts.classes_) == [str(each) for each in range(10)]
    again = clone(fitted).fit(X[::-1], y[::-1])
    assert np.allclose(again.predict_proba(X), fitted.predict_proba(X), atol=1e-5)  # in any order


def test_several_draws_answer_together(example_runs: Path) -> None:
    X, y = images(3)
    fitted = GeneratedClassifier(str(example_runs / "draws"), num=4).fit(X, y)
    one = [fitted.module(i)(torch.from_numpy(X)) for i in range(4)]
    together = fitted.predict_proba(X)
    assert np.allclose(together, torch.stack(one).softmax(-1).mean(0).detach().numpy(), atol=1e-5)


def test_exports(example_runs: Path, tmp_path: Path) -> None:
    X, y = images(10)
    fitted = GeneratedClassifier(str(example_runs / "examples")).fit(X, y)
    weights = load_file(fitted.export(tmp_path / "one.safetensors"))
    assert all(torch.equal(weights[name], value[0]) for name, value in fitted.networks_.items())
    onnx = pytest.importorskip("onnxruntime")
    session = onnx.InferenceSession(str(fitted.export(tmp_path / "one.onnx")))
    logits = fitted.module()(torch.from_numpy(X)).detach().numpy()
    assert np.allclose(session.run(None, {session.get_inputs()[0].name: X})[0], logits, atol=1e-4)


def test_what_does_not_fit_is_said(example_runs: Path, tmp_path: Path) -> None:
    X, y = images(4)
    model = GeneratedClassifier(str(example_runs / "examples"))
    with pytest.raises(NotFittedError):
        model.predict(X)
    with pytest.raises(InputError, match="63 values; this generator takes 64"):
        model.fit(X[:, 1:], y)
    with pytest.raises(InputError, match="class '1"):
        model.fit(X, y + 11)
    with pytest.raises(InputError, match=r"\.safetensors or \.onnx"):
        model.fit(X, y).export(tmp_path / "one.pt")


def test_draws_are_chosen_by_labelled_examples_and_saved_together(example_runs: Path, tmp_path: Path, rpg) -> None:
    X, y = images(10)
    np.savez(tmp_path / "shown.npz", X=X[:2])
    np.savez(tmp_path / "labelled.npz", X=X, y=y)
    given = ("--examples", tmp_path / "shown.npz", "--choose-by", tmp_path / "labelled.npz", "--ensemble")
    code, out, _ = rpg("generate", example_runs / "draws", "--num", 4, *given, "--output", tmp_path / "made", "--json")
    assert code == 0
    told = json.loads(out)
    assert Path(told["best"]) == Path(told["networks"][told["order"][0]])
    scores = [told["log_likelihoods"][place] for place in told["order"]]
    assert scores == sorted(scores, reverse=True)
    ensemble, first = load_file(told["ensemble"]), load_file(told["networks"][0])
    assert all(torch.equal(ensemble[name][0], value) for name, value in first.items())
