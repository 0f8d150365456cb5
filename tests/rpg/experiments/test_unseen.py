import math
import re
from pathlib import Path

import pytest
import torch

from rpg.config import Config
from rpg.evaluation import conditional, task_networks
from rpg.evaluation.combinations import nearest_rows
from rpg.evaluation.conditional import regression_grid
from rpg.evaluation.span import FlatSpace
from rpg.experiments.driver import experiment_of, run_experiment
from rpg.experiments.single import for_choices, generate_for, train_or_continue
from rpg.experiments.unseen_tasks import (
    base_summed,
    evaluate_unseen,
    measure_diversity,
    networks_of,
    task_family,
)
from rpg.generation.conditions import choose_condition
from rpg.generation.generator import Generator
from rpg.merging.methods import MERGES
from rpg.tasks.images.config import ClassPairSplit
from rpg.tasks.images.digits import DigitsSubsetsTask
from rpg.tasks.images.subsets import resplit
from tests.reports import checked_report
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

METHODS = {
    "original", "generated", "nearest_seen", "ridge", "kernel_ridge", "base_summed", "average", "no_condition", "start",
    "ridge_degree_1", "ridge_degree_2", "ridge_degree_3", *MERGES,
}  # fmt: skip


def test_the_report_has_what_was_promised(unseen):
    config, report = unseen
    folder = Path(config.run)
    assert checked_report(folder, "tasks", "unseen") == report and report.first == "accuracy"
    for kinds, num in ((report.kinds, 5), (report.parts["seen"], 5)):
        assert set(kinds) == METHODS
        for each in kinds.values():
            accuracies, summary = each.metrics["accuracy"], each.summaries["accuracy"]
            assert len(accuracies) == num == len(each.conditions) == len(each.distances["hamming"])
            assert summary.mean == pytest.approx(sum(accuracies) / num) and summary.min == min(accuracies)
            assert summary.ci95[0] <= summary.mean <= summary.ci95[1]
    assert set(report.parts["seen"]["generated"].distances["hamming"]) == {0}
    assert min(report.kinds["generated"].distances["hamming"]) > 0
    assert report.facts["training_seconds"] > 0 and [each["seed"] for each in report.facts["seeds"]] == [0, 1]
    own, ridge = (report.kinds[name].metrics["accuracy"] for name in ("generated", "kernel_ridge"))
    assert (
        report.kinds["kernel_ridge"].extras["generated_better"]
        == sum(a > b for a, b in zip(own, ridge, strict=True)) / 5
    )
    assert (folder / "scatter.png").exists() and "rpg unseen" in (folder / "report.html").read_text()


def test_figures_are_those_of_the_networks(unseen):
    config, report = unseen
    zoo, task = Zoo.open(config.zoo), task_family(config)
    index = zoo.subset("unseen")[2]
    condition = torch.tensor([zoo.entries[index].condition])
    answers = task.predict([zoo.state_dict(index)])
    expected = (answers == task.targets(condition)).double().mean().item()
    assert report.kinds["original"].metrics["accuracy"][2] == pytest.approx(expected, abs=0.003)
    worst = report.extras["worst"][0]
    assert worst["accuracy"] == min(report.kinds["generated"].metrics["accuracy"])
    shares = torch.tensor(worst["accuracy_of_class"])
    counts = torch.bincount(task.classes("test"), minlength=10)
    assert (shares * counts).sum().item() / 500 == pytest.approx(worst["accuracy"])


@pytest.fixture(scope="module")
def choices(unseen):
    """The run that choices are made by: it has not learned from the validation tasks."""
    config = for_choices(unseen[0])
    train_or_continue(config)
    return config


def test_no_choice_is_made_by_a_run_that_has_learned_from_the_validation_tasks(unseen, choices, rpg, tmp_path):
    config, _ = unseen
    with pytest.raises(InputError, match="no choice can be made") as caught:
        evaluate_unseen(config.run, split="validation")
    cure = re.findall(r"--set '?([^ ']+)", str(caught.value))
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml", cure) == choices == for_choices(choices)
    zoo, generator = Zoo.open(config.zoo), Generator.from_pretrained(choices.run)
    assert generator.facts["training checkpoints"] == 11 == len(zoo.subset("train"))
    code, out, err = rpg("unseen", tmp_path / "config.yaml", "--split", "validation")
    assert code == 0 and f"choices are made by {choices.run}" in out, err


def test_scoring_on_validation_never_touches_unseen_tasks_or_test_images(unseen, choices, monkeypatch):
    config, _ = unseen
    asked = set()
    real = DigitsSubsetsTask.images
    monkeypatch.setattr(DigitsSubsetsTask, "images", lambda self, split="test": asked.add(split) or real(self, split))
    path = Path(config.run) / "evaluation.json"
    before = path.read_text()
    report = evaluate_unseen(choices.run, split="validation")
    validation = networks_of(Zoo.open(config.zoo), "validation").bits.tolist()
    assert [list(map(int, bits)) for bits in report.kinds["generated"].conditions] == validation
    assert asked == {"validation"} and path.read_text() == before


def test_a_family_without_tasks_to_choose_by_is_refused_before_anything_is_trained(unseen, tmp_path):
    tree = unseen[0].plain()
    tree["task"]["validation"] = 0
    config = Config.parse({**tree, "run": str(tmp_path / "run"), "zoo": str(tmp_path / "zoo")}, "test")
    with pytest.raises(InputError, match="'validation', which the comparison needs; set task.validation"):
        run_experiment(config, experiment_of(config))
    assert not (tmp_path / "zoo").exists() and not (tmp_path / "run" / "config.yaml").exists()


def test_figures_do_not_depend_on_how_many_networks_are_held(unseen, monkeypatch):
    config, report = unseen
    monkeypatch.setattr(task_networks, "PART_BYTES", 1)
    again = evaluate_unseen(config.run)
    for ours, theirs in ((report.kinds, again.kinds), (report.parts["seen"], again.parts["seen"])):
        for name, each in ours.items():
            assert theirs[name].metrics["accuracy"] == pytest.approx(each.metrics["accuracy"], abs=0.003), name
    assert again.extras["worst"][0]["accuracy"] == report.extras["worst"][0]["accuracy"]
    assert again.extras["diversity"] == pytest.approx(report.extras["diversity"], rel=1e-2)


def test_as_many_seen_tasks_as_unseen_ones_are_scored_evenly_chosen(unseen, monkeypatch):
    config, report = unseen
    zoo = Zoo.open(config.zoo)
    every = [each.condition for split in ("train", "validation") for each in zoo.entries if each.split == split]
    kept = report.parts["seen"]["original"]
    assert kept.count == report.kinds["original"].count == 5 and len(every) == 15
    assert [every.index(each) for each in kept.conditions] == [0, 4, 7, 10, 14]
    monkeypatch.setattr(task_networks, "LARGE", 1)
    large = evaluate_unseen(config.run)
    assert large.notes[0].startswith("networks are large: 2 of 15 seen tasks are scored") and not report.notes
    fewer = large.parts["seen"]["original"]  # a quarter as many, rounded up
    assert [every.index(each) for each in fewer.conditions] == [0, 14]
    assert fewer.metrics["accuracy"] == pytest.approx([kept.metrics["accuracy"][i] for i in (0, -1)], abs=0.003)
    assert {name for name in report.kinds if name.startswith("ridge_")} - set(large.kinds)
    best = max((1, 2, 3), key=lambda each: large.extras["regressions"][f"ridge_degree_{each}"]["validation_accuracy"])
    assert large.extras["regressions"]["ridge"] == large.extras["regressions"][f"ridge_degree_{best}"]


@pytest.mark.parametrize("large", [False, True])
def test_the_linear_head_learns_from_all_seen_tasks_and_from_no_other(unseen, monkeypatch, large):
    config, _ = unseen
    zoo, learned = Zoo.open(config.zoo), []
    with_head = config.evaluate.model_copy(update={"linear_head": True})
    generator = Generator.from_pretrained(config.run)
    generator.config = generator.config.model_copy(update={"evaluate": with_head})
    monkeypatch.setattr(Generator, "from_pretrained", lambda *args, **kwargs: generator)
    monkeypatch.setattr(task_networks, "LEARNING_RATES", (1e-2,))
    fit = task_networks.fit_linear_head
    monkeypatch.setattr(
        task_networks, "fit_linear_head", lambda *given: learned.append(given[2].tolist()) or fit(*given)
    )
    if large:
        monkeypatch.setattr(task_networks, "LARGE", 1)
    report = evaluate_unseen(config.run)
    train, validation = (networks_of(zoo, split).bits.tolist() for split in ("train", "validation"))
    assert learned == [train, [*train, *validation]]
    assert report.mean("linear_head") > 0.5


def test_large_networks_try_the_regressions_that_come_nearest(unseen, monkeypatch):
    config, _ = unseen
    zoo, task = Zoo.open(config.zoo), task_family(config)
    train, validation = networks_of(zoo, "train"), networks_of(zoo, "validation")
    monkeypatch.setattr(task_networks, "LARGE", 1)
    tried = []
    monkeypatch.setattr(conditional, "tune", lambda given, score: (tried.append(given), (given[0], 0.0))[1])
    conditional.choose_regressions(task, train, validation)
    vectors, wanted = train.weights(), validation.weights()
    space = FlatSpace(vectors)
    errors = {
        each: (each.mixture(train.bits, validation.bits) @ space.flatten(vectors).double() - space.flatten(wanted))
        .norm()
        .item()
        for each in regression_grid()["kernel_ridge"]
    }
    assert set(tried[-1]) == set(sorted(errors, key=errors.__getitem__)[: conditional.NUM_TRIED])


def test_nearest_other_and_summed_probabilities():
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert nearest_rows(seen, seen, own=False).tolist() == [0, 1, 2]
    assert nearest_rows(seen, seen, own=True).tolist() == [1, 0, 0]

    class Task:
        def targets(self, bits, split):
            return bits[:, torch.tensor([0, 2])]

    probabilities = torch.tensor([[0.3, 0.3, 0.4], [0.3, 0.1, 0.6]])  # images of classes 0 and 2
    assert base_summed(Task(), probabilities, torch.tensor([[1, 1, 0], [1, 0, 0]]), "test").tolist() == [1.0, 0.5]


def test_equal_draws_have_no_diversity(unseen):
    config, _ = unseen
    generator, task = Generator.from_pretrained(config.run), task_family(config)
    bits = task.bits()[:3]
    draw = generate_for(generator, bits, 0)
    diversity = measure_diversity(task, [[draw], [draw], [draw]], bits, 1.0)
    assert diversity["disagreement"] == 0 and diversity["weight_spread"] == 0
    assert math.isclose(diversity["mean_accuracy"], diversity["ensemble_accuracy"])
    space = FlatSpace(draw)
    again = space.unflatten(space.flatten(draw))
    assert all(torch.equal(again[name], value) for name, value in draw.items())


def test_another_split_of_the_same_networks(unseen, tmp_path):
    config, _ = unseen
    other = config.task.model_copy(update={"unseen": ClassPairSplit(pair=(1, 2)), "validation": 2})
    task = DigitsSubsetsTask(type(other).model_validate(other.model_dump()))
    zoo = resplit(config.zoo, tmp_path / "zoo", task)
    assert all((entry.condition[1] == entry.condition[2]) == (entry.split == "unseen") for entry in zoo.entries)
    assert zoo.digest() == Zoo.open(config.zoo).digest()
    changed = DigitsSubsetsTask(other.model_validate({**other.model_dump(), "seed": 3}))
    with pytest.raises(InputError, match="task.seed"):
        resplit(config.zoo, tmp_path / "other", changed)


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"condition": "1,0"}, "2 values"),
        ({"condition": "1,0,0,0,0,0,0,0,0,0.5"}, "zeros and ones"),
        ({"condition": "0,0,0,0,0,0,0,0,0,0"}, "no positive class"),
        ({"condition": "1,1,1,1,1,1,1,1,1,1"}, "every class positive"),
        ({"classes": "one,eleven"}, "'eleven'"),
        ({"prompt": "all odd digits"}, "--prompt-model"),
        ({"classes": "one", "prompt": "one"}, "one of them"),
    ],
)
def test_bad_requests_are_one_line(unseen, asked, words):
    generator = Generator.from_pretrained(unseen[0].run)
    request = {"condition": None, "classes": None, "prompt": None, "prompt_model": None, **asked}
    with pytest.raises(InputError, match=words) as caught:
        choose_condition(generator, **request)
    assert "\n" not in str(caught.value)


def test_classes_become_the_vector(unseen, capsys):
    generator = Generator.from_pretrained(unseen[0].run)
    vector = choose_condition(generator, None, "1,3,five", None, None)
    assert vector == [0, 1, 0, 1, 0, 1, 0, 0, 0, 0]


def test_other_tasks_are_refused():
    with pytest.raises(InputError, match="family of binary tasks"):
        task_family(Config.load("configs/digits.yaml"))
