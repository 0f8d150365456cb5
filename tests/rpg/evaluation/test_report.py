from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from rpg.evaluation.baselines import covariance_gaussian
from rpg.evaluation.config import EvaluateConfig
from rpg.evaluation.evaluate import evaluate, save_evaluation
from rpg.evaluation.results import EvaluationResult
from rpg.evaluation.tables import print_table
from rpg.tasks import DigitsConfig, build_task
from tokenization.errors import InputError


class PlantedTask:
    """Answers with the network's own ``answers`` tensor, rounded: what a network predicts is known beforehand."""

    def predict(self, state_dicts, split="test"):
        return torch.stack([state["answers"].round().long() for state in state_dicts])

    def labels(self, split="test"):
        return torch.zeros(4, dtype=torch.long)


def planted(*answers: list[float]) -> list[dict[str, torch.Tensor]]:
    return [{"answers": torch.tensor(row)} for row in answers]


ORIGINALS = planted([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0])
GENERATED = planted([0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0])

FIVE = EvaluateConfig(num_baseline=5)


@pytest.fixture(scope="module")
def digits():
    task = build_task(DigitsConfig(train_steps=150, steps=8, batch_size=64))
    return task


@pytest.fixture(scope="module")
def real(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    zoo = digits.collect(folder / "zoo")
    originals = [zoo.state_dict(index) for index in range(len(zoo))]
    generated = covariance_gaussian(originals, 6, torch.Generator().manual_seed(0))
    result = evaluate(digits, originals, generated, FIVE, seconds_per_network=0.25)
    save_evaluation(result, folder)
    return folder, originals, generated, result


def test_scores_of_planted_answers():
    result = evaluate(PlantedTask(), ORIGINALS, GENERATED, EvaluateConfig(noise=(0.0,)), seconds_per_network=0.5)
    assert result.original.accuracies == (0.75, 0.5) and result.original.similarities == (0.5, 0.5)
    assert result.generated.accuracies == (0.75, 0.75, 1.0)
    assert result.generated.similarities == (1.0, 0.0, 0.0)
    assert result.generated.accuracy.mean == pytest.approx(2.5 / 3) and result.generated.seconds_per_network == 0.5
    # the average of the originals is [0, 0, 0.5, 1], of which the last alone is rounded to a wrong answer
    assert (result.ensemble.accuracy, result.ensemble.similarity) == (0.75, 1.0)
    # originals with noise of no strength are the originals, and each resembles itself
    assert set(result.noise[0].accuracies) == {0.75, 0.5} and result.noise[0].similarity.mean == 1.0


def test_json_holds_what_others_read(real):
    folder, _, _, result = real
    content = json.loads((folder / "evaluation.json").read_text())
    for kind, count in (("original", 8), ("generated", 6)):
        assert {"mean", "max", "min", "ci95"} <= content[kind]["accuracy"].keys()
        assert {"mean", "max"} <= content[kind]["similarity"].keys()
        assert content[kind]["count"] == count == len(content[kind]["accuracies"]) == len(content[kind]["similarities"])
    assert content["generated"]["seconds_per_network"] == 0.25
    assert 0.5 < content["ensemble"]["accuracy"] <= 1
    assert [noise["sigma"] for noise in content["noise"]] == [0.01, 0.05, 0.15]
    assert content["baselines"]["covariance_gaussian"]["count"] == 5
    assert EvaluationResult.model_validate(content) == result


def test_scores_are_those_of_the_test_images(real, digits):
    _, originals, generated, result = real
    for networks, scores in ((originals, result.original), (generated, result.generated)):
        measured = (digits.predict(networks) == digits.labels()).double().mean(1)
        assert list(scores.accuracies) == measured.tolist()


def test_strong_noise_is_less_accurate_and_less_similar(real):
    weak, _, strong = real[3].noise
    assert strong.accuracy.mean < weak.accuracy.mean and strong.similarity.mean < weak.similarity.mean


def test_same_seed_same_result(real, digits):
    _, originals, generated, result = real
    again = evaluate(digits, originals, generated, FIVE, seconds_per_network=0.25)
    assert again == result
    assert evaluate(digits, originals, generated, FIVE, seed=1).noise[2] != result.noise[2]


def test_evaluation_leaves_the_networks_as_they_were(digits, real):
    _, originals, generated, _ = real
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in (*originals, *generated)]
    evaluate(digits, originals, generated, EvaluateConfig(num_baseline=2, noise=(0.1,)))
    for state, copy in zip((*originals, *generated), before, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in copy)


def test_the_picture_is_a_png_of_a_readable_size(real):
    picture = (real[0] / "scatter.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
    assert width >= 1000 and height >= 700


def test_nothing_temporary_is_left_behind(real):
    assert sorted(path.name for path in real[0].iterdir()) == ["evaluation.json", "scatter.png", "zoo"]


def test_table_shows_every_kind_and_fits_a_terminal(real):
    console = Console(file=io.StringIO(), width=80)
    print_table(real[3], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("original", "weight average", "ensemble", "σ 0.01", "σ 0.15", "generated", "0.2500"):
        assert word in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_a_lone_original_and_a_lone_broken_network_can_be_scored(digits):
    original = digits.build().state_dict()
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in original.items()}
    result = evaluate(digits, [original], [broken], EvaluateConfig(num_baseline=2))
    assert result.baselines == {} and result.spread is None
    assert EvaluationResult.model_validate_json(result.model_dump_json()) == result
    print_table(result, Console(file=io.StringIO()))


def test_nothing_to_score_is_refused(digits):
    with pytest.raises(InputError, match="no generated networks"):
        evaluate(digits, [digits.build().state_dict()], [])
    with pytest.raises(InputError, match="no originals"):
        evaluate(digits, [], [digits.build().state_dict()])


def test_a_folder_that_cannot_be_written_is_named(digits, tmp_path):
    (tmp_path / "file").write_text("")
    weights = digits.build().state_dict()
    result = evaluate(digits, [weights], [weights], EvaluateConfig(num_baseline=2, noise=()))
    with pytest.raises(InputError, match=r"evaluation\.json"):
        save_evaluation(result, tmp_path / "file")
