from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

from rpg.tasks import DigitsConfig, build_task, task_of
from rpg.tasks.images.config import CollectionConfig
from rpg.tasks.images.digits import DigitsTask, load_splits
from rpg.tasks.images.networks import augment, predict_images
from rpg.tasks.images.training import train_run
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


def short_config(**changes) -> DigitsConfig:
    return DigitsConfig(**{"train_steps": 60, "steps": 4, "batch_size": 32, **changes})


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return build_task(short_config(runs=2)).collect(tmp_path_factory.mktemp("digits") / "zoo")


def test_split_is_fixed_stratified_and_disjoint():
    splits = load_splits()
    sizes = {split: len(labels) for split, labels in splits.labels.items()}
    assert sizes == {"train": 1047, "validation": 250, "test": 500}
    for labels in splits.labels.values():
        assert (labels.bincount(minlength=10) / len(labels) - 0.1).abs().max() < 0.01
    # every image of the data set is in exactly one split (the 1,797 images are all different)
    everything = torch.cat(list(splits.images.values())).flatten(1)
    assert len(everything.unique(dim=0)) == 1797


def test_images_are_standardised_with_training_statistics_only():
    train = load_splits().images["train"]
    assert train.mean().abs() < 1e-6 and (train.std() - 1).abs() < 1e-6
    assert load_splits().images["test"].mean().abs() > 1e-6


def test_enlarged_images_are_the_same_digits():
    small, large = load_splits(), load_splits(32)
    assert large.images["train"].mean().abs() < 1e-6 and (large.images["train"].std() - 1).abs() < 1e-6
    for split, images in large.images.items():
        assert images.shape[1:] == (1, 32, 32)
        assert torch.equal(large.labels[split], small.labels[split])
        shrunk = F.avg_pool2d(images, 4).flatten(1)
        distances = torch.cdist(shrunk, small.images[split].flatten(1))
        assert torch.equal(distances.argmin(1), torch.arange(len(images)))


def test_collect_records_runs_steps_metrics_and_task(zoo):
    assert [(entry.run, entry.step) for entry in zoo.entries] == [
        (run, step) for run in (0, 1) for step in (1, 2, 3, 4)
    ]
    assert all(0.5 < entry.metrics["validation_accuracy"] <= 1 for entry in zoo.entries)
    assert json.loads((zoo.path / "zoo.json").read_text())["task"]["name"] == "digits"
    task = task_of(Zoo.open(zoo.path))
    assert isinstance(task, DigitsTask) and task.config == short_config(runs=2)


def test_every_so_manieth_checkpoint_can_be_held_out(tmp_path):
    config = DigitsConfig(network="mlp-mini", train_steps=1, steps=5, runs=2, hold_out=2)
    zoo = DigitsTask(config).collect(tmp_path / "zoo")
    assert [(entry.run, entry.step) for entry in zoo.entries if entry.split == "held_out"] == [
        (0, 2), (0, 4), (1, 2), (1, 4),
    ]  # fmt: skip
    assert len(zoo.subset("train")) == 6


def test_every_step_is_a_different_checkpoint_and_runs_are_independent(zoo):
    weights = torch.stack([zoo.state_dict(index)["conv1.weight"].flatten() for index in range(len(zoo))])
    distances = torch.cdist(weights, weights)
    assert distances[~torch.eye(8, dtype=torch.bool)].min() > 0
    assert distances[:4, 4:].min() > 5 * distances[:4, :4].max()


def test_checkpoints_are_stored_in_the_dtype_that_is_asked_for(zoo, tmp_path):
    half = build_task(short_config(dtype="bf16")).collect(tmp_path / "zoo")
    for index in range(len(half)):
        ours, full = half.state_dict(index), zoo.state_dict(index)
        assert all(torch.equal(ours[name], value.bfloat16()) for name, value in full.items())
    check_metrics(half)


def test_metrics_are_those_of_the_saved_weights(zoo):
    check_metrics(zoo)


def check_metrics(zoo):
    task = task_of(zoo)
    predictions = task.predict([zoo.state_dict(index) for index in range(len(zoo))], "validation")
    measured = (predictions == task.labels("validation")).double().mean(1)
    assert measured.tolist() == pytest.approx([entry.metrics["validation_accuracy"] for entry in zoo.entries])


class Killed(Exception):
    pass


def test_a_killed_collection_resumes_to_the_same_zoo(zoo, tmp_path):
    task = build_task(short_config(runs=2))

    def kill(done: int, total: int) -> None:
        if done == 60 + 4 + 60 + 3:
            raise Killed

    with pytest.raises(Killed):
        task.collect(tmp_path / "zoo", progress=kill)
    assert 4 < len(Zoo.open(tmp_path / "zoo")) < 8
    resumed = task.collect(tmp_path / "zoo")
    assert [(entry.run, entry.step) for entry in resumed.entries] == [(entry.run, entry.step) for entry in zoo.entries]
    assert resumed.digest() == zoo.digest()


def test_collect_again_changes_nothing_and_trains_nothing(zoo):
    before, calls = zoo.digest(), []
    again = task_of(zoo).collect(zoo.path, progress=lambda done, total: calls.append((done, total)))
    assert again.digest() == before and len(again) == 8
    assert calls == [(128, 128)]


def test_limit_stops_early_and_a_later_call_continues(zoo, tmp_path):
    task = build_task(short_config(runs=2))
    assert len(task.collect(tmp_path / "zoo", limit=3)) == 3
    assert len(task.collect(tmp_path / "zoo", limit=3)) == 3
    assert task.collect(tmp_path / "zoo").digest() == zoo.digest()


def test_progress_counts_every_optimizer_step(tmp_path):
    calls: list[tuple[int, int]] = []
    config = short_config(runs=2, train_steps=5, steps=2)
    build_task(config).collect(tmp_path / "zoo", progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == [*range(1, 15), 14]
    assert {total for _, total in calls} == {14}


def test_another_configuration_is_not_mixed_in(zoo):
    with pytest.raises(InputError, match=r"task\.seed 0, but 1 is configured; choose another folder"):
        build_task(short_config(runs=2, seed=1)).collect(zoo.path)


def test_a_foreign_zoo_is_not_mixed_in(tmp_path):
    Zoo.create(tmp_path / "zoo")
    with pytest.raises(InputError, match="task"):
        build_task(short_config()).collect(tmp_path / "zoo")
    with pytest.raises(InputError, match="task"):
        task_of(Zoo.open(tmp_path / "zoo"))


def test_training_leaves_the_global_random_state_alone():
    task = build_task(short_config())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    next(iter(train_run(task.build, task.splits, short_config(train_steps=1), 0)))
    task.predict([])
    assert torch.equal(torch.rand(4), expected)


def test_bf16_training_stays_close_to_fp32_and_saves_fp32():
    def trained(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
        config = short_config(train_steps=20, steps=1, precision=precision)
        task, before = build_task(config), []

        def build() -> torch.nn.Module:
            network = task.build()
            before.append(parameters_to_vector(network.parameters()).detach().clone())
            return network

        _, network = next(iter(train_run(build, load_splits(), config, 0)))
        assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
        return before[0], parameters_to_vector(network.parameters()).detach()

    start, exact = trained("fp32")
    same_start, rounded = trained("bf16")
    assert torch.equal(start, same_start)
    assert 0 < (rounded - exact).norm() < 0.2 * (exact - start).norm()


def test_fine_tuning_starts_from_a_converged_network():
    config = CollectionConfig(train_steps=400, steps=1, batch_size=64)
    task = build_task(DigitsConfig())
    _, network = next(iter(train_run(task.build, task.splits, config, 0)))
    correct = task.predict([network.state_dict()], "validation") == task.labels("validation")
    assert correct.double().mean() > 0.93


@pytest.mark.parametrize("network", ["cnn", "vit", "resnet-mini"])
def test_predict_equals_loading_the_weights(network):
    task = build_task(DigitsConfig(network=network))
    networks = [task.build() for _ in range(3)]
    for module in networks:
        module.train()(task.images("train")[:64])  # gives batch norms statistics of their own
    predictions = task.predict([module.state_dict() for module in networks])
    assert predictions.shape == (3, 500) and predictions.dtype == torch.long
    for module, row in zip(networks, predictions, strict=True):
        assert torch.equal(row, module.eval()(task.images()).argmax(1))


def test_predict_accepts_half_precision_and_no_networks():
    task = build_task(DigitsConfig())
    weights = task.build().state_dict()
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    rounded = {name: tensor.float() for name, tensor in half.items()}
    assert torch.equal(task.predict([half]), task.predict([rounded]))
    assert task.predict([]).shape == (0, 500)


def test_a_broken_network_answers_class_0():
    task = build_task(DigitsConfig())
    weights = task.build().state_dict()
    weights["linear2.bias"] = torch.full((10,), float("nan"))
    assert task.predict([weights]).eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("conv1.bias"), "network 1 has no tensor 'conv1.bias' of shape"),
        (lambda weights: weights.update(more=torch.zeros(1)), "network 1 has a tensor 'more', which"),
        (
            lambda weights: weights.update({"conv1.bias": torch.zeros(3)}),
            r"network 1: tensor 'conv1.bias' has the shape \(3,\) where .* has \(8,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    network = build_task(DigitsConfig()).build()
    good, bad = network.state_dict(), dict(network.state_dict())
    change(bad)
    with pytest.raises(InputError, match=message):
        predict_images(network, [good, bad], torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "digit"}, "task.name 'digit' is not a task; choose one of digits"),
        ({}, "task.name None is not a task"),
        ({"name": "digits", "network": "cnnn"}, "task.network cannot be 'cnnn'"),
        ({"name": "digits", "runs": 0}, "task.runs cannot be 0"),
        ({"name": "digits", "epochs": 3}, "task.epochs is an unknown key"),
    ],
)
def test_impossible_tasks_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        build_task(config)


def test_unknown_split_is_refused():
    with pytest.raises(InputError, match="no split 'valid'; choose one of train, validation, test"):
        build_task(DigitsConfig()).labels("valid")


def test_a_network_has_its_own_recipe_unless_told_otherwise():
    assert DigitsConfig(network="vit").train_steps == 1500
    given = DigitsConfig(network="vit", train_steps=3)
    assert (given.train_steps, given.batch_size) == (3, 64)
    assert DigitsConfig.model_validate(given.model_dump()) == given
    assert DigitsConfig().train_steps == DigitsConfig(network="mlp-mini").train_steps == 800


def test_training_on_moved_images_makes_networks_that_read_moved_images():
    task = build_task(DigitsConfig(network="mlp-mini"))
    images = task.images("validation")
    moved = augment(images, torch.Generator().manual_seed(0), fill=float(images.min()))

    def reads(**changes: bool) -> float:
        config = CollectionConfig(train_steps=300, steps=1, batch_size=64, **changes)
        _, network = next(iter(train_run(task.build, task.splits, config, 0)))
        return (network.eval()(moved).argmax(1) == task.labels("validation")).double().mean().item()

    assert reads(augment=True) > reads() + 0.03
