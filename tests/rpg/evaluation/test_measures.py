"""The one engine: what is kept of every network, and what is made of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rpg.config import EvaluateConfig
from rpg.devices import Partition
from rpg.evaluation import span as span_module
from rpg.evaluation.combinations import Conditions, nearest_rows
from rpg.evaluation.engine import Made, Workers
from rpg.evaluation.judges import OwnScorer, TaskScorer
from rpg.evaluation.matching import Distances
from rpg.evaluation.measures import Evaluation, Options
from rpg.evaluation.permutations import symmetries
from rpg.evaluation.span import ZooSpan
from rpg.tasks import DigitsConfig, build_task
from tests.conftest import make_zoo
from tests.golden_record import check_report
from tests.rpg.evaluation.test_span import slow_vectors, span_of
from tokenization.errors import InputError

SMALL = EvaluateConfig(num=4, num_baseline=3)
NONE = SMALL.model_copy(update={"baselines": ()})


def norm(state_dict):
    return {"norm": state_dict["3.weight"].norm(), "loss": 2.0}


def made(networks) -> Made:
    networks = list(networks)
    return Made.singly(len(networks), range(len(networks)), networks)


def judged(zoo, generated=None, score=norm, config=SMALL, **options):
    scorer = OwnScorer(score, "mine:score")
    return Evaluation(scorer, span_of(zoo), config, options=Options(**options)).run(generated)


def test_originals_baselines_and_generated_networks_are_judged(zoo):
    report = judged(zoo, made(zoo.state_dict(i) for i in (0, 2, 0)))
    own = [zoo.state_dict(i)["3.weight"].norm().item() for i in range(6)]
    assert report.kinds["original"].metrics["norm"] == pytest.approx(own)
    assert report.kinds["generated"].metrics["norm"] == pytest.approx([own[0], own[2], own[0]])
    assert report.kinds["generated"].distances["nearest"] == pytest.approx([0.0] * 3, abs=1e-4)
    assert report.better == {"norm": "more", "loss": "less"} and report.first == "norm"
    assert report.threshold == torch.tensor(own).median().item()
    assert {"average", "interpolation", "noise_0.05", "covariance_gaussian", "average_of_6"} <= report.kinds.keys()
    assert report.facts["seconds_per_network"] >= 0 and report.unit is not None and not report.matched
    assert report.extras["spread"]["diversity_ratio"] == pytest.approx(0, abs=1e-4)  # two of them are alike


def test_the_threshold_is_the_median_original_to_the_last_bit(zoo):
    """Rounded to 32 bits 0.3 is more than 0.3."""
    report = judged(zoo, score=lambda state_dict: {"score": 0.3}, config=NONE)
    assert report.threshold == 0.3 == report.kinds["original"].metrics["score"][0]


@pytest.mark.parametrize("held_values", [1 << 26, 0], ids=["plain_zoo", "streamed"])
def test_reports_of_small_and_of_streamed_zoos(zoo, monkeypatch, held_values, request):
    monkeypatch.setattr(span_module, "HELD_VALUES", held_values)
    check_report(request.node.callspec.id, judged(zoo, made(zoo.state_dict(i) for i in (0, 2, 3))))


def test_distances_are_those_of_the_values_to_the_nearest_other_original(zoo):
    report = judged(zoo)
    vectors, _ = slow_vectors(zoo, [zoo.state_dict(0)])
    far = torch.cdist(vectors, vectors).fill_diagonal_(float("inf")).amin(1)
    assert report.kinds["original"].distances["nearest"] == pytest.approx((far / far.median()).tolist(), rel=1e-4)
    assert report.kinds["generated"].count == 0 and not any(name.endswith("at_distance") for name in report.kinds)


def test_components_are_those_of_the_zoo(zoo):
    report = judged(zoo, made([zoo.state_dict(3)]))
    points = torch.tensor(report.kinds["original"].components)
    vectors, _ = slow_vectors(zoo, [zoo.state_dict(0)])
    values = torch.linalg.svdvals(vectors - vectors.mean(0))
    assert report.explained == pytest.approx(float(values[:2].square().sum() / values.square().sum()), rel=1e-4)
    assert torch.allclose(points.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(points.std(0), torch.ones(2), atol=1e-3)
    assert points[3].tolist() == pytest.approx(list(report.kinds["generated"].components[0]), abs=1e-4)


def test_good_is_as_good_as_the_median_original_and_goes_by_the_direction(zoo):
    far = [{n: v + 5 if v.is_floating_point() else v for n, v in zoo.state_dict(0).items()} for _ in range(4)]
    middle = sorted(zoo.state_dict(i)["3.weight"].norm().item() for i in range(6))
    values = iter([*middle, middle[0] - 1, middle[1], middle[2], middle[5]])  # originals, then those far away
    report = judged(zoo, made(far), lambda network: next(values, 0.0), NONE.model_copy(update={"taus": (1.0, 1e9)}))
    assert report.kinds["generated"].novel == (0.5, 0.0)  # of the median and the best alone, wherever they lie
    for lower, expected in ((), 0.0), (("norm",), 1.0):
        small = judged(zoo, made(far[:1]), lambda n: {"norm": -n["3.weight"].norm()}, NONE, lower=lower)
        assert small.kinds["generated"].novel[0] == expected


def test_metrics_that_are_not_finite_are_null_and_count_as_bad(zoo):
    large = [{name: 1000 + value for name, value in zoo.state_dict(0).items()}]
    broken = [{n: v * math.nan if v.is_floating_point() else v for n, v in zoo.state_dict(0).items()}]
    score = lambda network: math.nan if not network["3.weight"].norm() < 100 else 1.0  # noqa: E731
    for networks in (large, broken):
        report = judged(zoo, made(networks), score, NONE)
        each = report.kinds["generated"]
        assert list(each.metrics.values()) == [(None,)] and list(each.summaries.values()) == [None]
        assert each.novel[0] == 0.0 and "NaN" not in report.model_dump_json()


def test_the_same_metrics_for_every_network(zoo):
    names = iter("abcdefghijkl" * 9)
    with pytest.raises(InputError, match="same metrics"):
        judged(zoo, score=lambda network: {next(names): 1.0})


def test_networks_are_scored_by_what_they_were_made_for(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", condition_size=2)
    conditions = [entry.condition for entry in zoo.entries]
    score = OwnScorer(lambda state_dict, condition: condition[0] + 10 * condition[1], "n")
    given = Conditions(conditions, (), conditions[1:3])
    found = Evaluation(score, span_of(zoo), SMALL, given).run(made(zoo.state_dict(0) for _ in range(3))).kinds
    values = {name: next(iter(each.metrics.values())) for name, each in found.items()}
    assert values["original"] == (0, 1, 10, 11, 0, 1)
    assert values["generated"] == (1, 10, 1) == values["interpolation"]
    assert found["generated"].conditions == tuple(map(tuple, [conditions[i] for i in (1, 2, 1)]))


@pytest.mark.parametrize("num", [1, 3])
def test_zoos_without_a_spread_have_no_distances(tmp_path, num):
    """One checkpoint, and three that are the same."""
    first = make_zoo(tmp_path / "first", num=1)
    zoo = make_zoo(tmp_path / "zoo", num=1)
    for step in range(1, num):
        zoo.append(first.state_dict(0), run=0, step=step)
    report = judged(zoo, made([zoo.state_dict(0)] * 2))
    assert {name for name, each in report.kinds.items() if each.count} >= {"original", "generated", "average"}
    assert report.unit is None and report.verdict
    assert not any(name.endswith("at_distance") for name in report.kinds)


def test_no_more_than_one_generated_network_is_held(zoo):
    alive: list = []

    def one_by_one():
        for index in range(5):
            assert all(each.expired() for each in alive), "an earlier network is still held"
            network = zoo.state_dict(index)
            alive.append(StorageWeakRef(network["3.weight"].untyped_storage()))
            yield network
            del network

    judged(zoo, Made.singly(5, range(5), one_by_one()), config=NONE)
    assert len(alive) == 5


class PlantedTask:
    """Answers with the network's own ``answers`` tensor, rounded: what a network predicts is known beforehand."""

    def build(self):
        return torch.nn.Module()

    def collect(self, path, *, progress=None, limit=None):
        raise NotImplementedError

    def predict(self, state_dicts, split="test"):
        return torch.stack([state["answers"].round().long() for state in state_dicts])

    def labels(self, split="test"):
        return torch.zeros(4, dtype=torch.long)


def test_scores_of_planted_answers(tmp_path):
    from tokenization.zoo.zoo import Zoo

    zoo = Zoo.create(tmp_path / "zoo")
    for step, row in enumerate(([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0])):
        zoo.append({"answers": torch.tensor(row)}, run=0, step=step)
    generated = [[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    config = SMALL.model_copy(update={"noise": (0.0,)})
    evaluation = Evaluation(TaskScorer(PlantedTask(), "test"), span_of(zoo), config, options=Options(split="test"))
    kinds = evaluation.run(made({"answers": torch.tensor(row)} for row in generated)).kinds
    assert kinds["original"].metrics == {"accuracy": (0.75, 0.5), "similarity": (0.5, 0.5)}
    assert kinds["generated"].metrics == {"accuracy": (0.75, 0.75, 1.0), "similarity": (1.0, 0.0, 0.0)}
    # the average of the originals is [0, 0, 0.5, 1], of which the last alone is rounded to a wrong answer
    assert kinds["average"].metrics == {"accuracy": (0.75,), "similarity": (1.0,)}
    # originals with noise of no strength are the originals, and each resembles itself
    assert set(kinds["noise_0"].metrics["similarity"]) == {1.0}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    task = build_task(DigitsConfig(network="mlp-mini", train_steps=150, steps=10, batch_size=64))
    return task, task.collect(tmp_path_factory.mktemp("measures") / "zoo")


def test_hidden_units_are_matched_and_kinds_are_compared_with_held_out_originals(digits):
    task, zoo = digits
    names = list(zoo.state_dict(0))
    trained, others = ([zoo.checkpoint(i) for i in range(first, 10, 2)] for first in range(2))
    span = ZooSpan(trained, names, by="spread")
    matching = Distances(span, symmetries(task))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    copies = []
    for each in trained:  # copies with their first units in another order
        network = each.state_dict()
        network |= {"linear1.weight": network["linear1.weight"][order], "linear1.bias": network["linear1.bias"][order]}
        copies.append(network | {"linear2.weight": network["linear2.weight"][:, order]})
    evaluation = Evaluation(TaskScorer(task, "test"), span, NONE, options=Options(split="test", matching=matching))
    report = evaluation.run(made(copies), others)
    generated = report.kinds["generated"]
    assert report.matched and max(generated.distances["nearest"]) < 1e-3 < min(generated.distances["plain"])
    assert generated.novel[0] == 0.0 and generated.extras["disagreement"] == 0.0
    right = (task.predict(copies) == task.labels()).double().mean(1)
    assert list(generated.metrics["accuracy"]) == right.tolist()
    assert generated.metrics["similarity"] == (1.0,) * 5 and generated.extras["nearest_training"] < 1e-5
    assert {"one_nna", "coverage", "matching_distance"} <= report.kinds["average"].extras.keys()
    assert report.kinds["held_out"].count == 5 and report.kinds["held_out"].extras["nearest_training"] > 0


def test_each_process_computes_its_places_and_progress_counts_all(monkeypatch):
    told = []
    workers = Workers(Partition(0, 2), lambda done, total, note: told.append((done, total, note)))
    workers.expect(4, images=10)
    found = {}
    monkeypatch.setattr(workers, "collect", lambda places, own, num: found.update(zip(places, own, strict=True)))
    workers.map(lambda place, item: item * 2, [1, 2, 3, 4])
    assert found == {0: 2, 2: 6} and [each[:2] for each in told][-1] == (4, 4) and "images/s" in told[0][2]
    assert Workers().map(lambda place, item: (place, item), "ab") == [(0, "a"), (1, "b")]


def test_nothing_is_told_of_what_is_computed_after_the_end():
    told = []
    workers = Workers(report=lambda done, total, note: told.append((done, total)))
    workers.expect(4)
    workers.map(lambda place, item: item, [1, 2])
    workers.finish()
    workers.map(lambda place, item: item, [1, 2])
    assert told == [(1, 4), (2, 4), (4, 4)]


def test_the_nearest_of_many_conditions_is_never_the_same_one():
    conditions = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    slow = torch.tensor([[(a - b).norm() if i != j else torch.inf for j, b in enumerate(conditions)]
                         for i, a in enumerate(conditions)])  # fmt: skip
    assert torch.equal(nearest_rows(conditions, conditions, own=True), slow.argmin(1))
    assert torch.equal(nearest_rows(conditions, conditions, own=False), torch.arange(40))
