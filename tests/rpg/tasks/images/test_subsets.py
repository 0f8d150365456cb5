import contextlib
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rpg.tasks import build_task
from rpg.tasks.class_splits import all_tasks
from rpg.tasks.images.config import BaseConfig, DigitsSubsetsConfig, FinetuneConfig, Stage
from rpg.tasks.images.digits import DigitsSubsetsTask, load_splits
from tokenization.errors import InputError
from tokenization.zoo.condition import WITHHELD

CONFIG = DigitsSubsetsConfig(
    base=BaseConfig(steps=30),
    finetune=FinetuneConfig(stages=(Stage(steps=4),), batch_size=16, checkpoints=2),
    group=6,
    unseen={"kind": "random", "num": 5},
    validation=4,
)
NUM_TASKS = 20
ALL_BITS = DigitsSubsetsTask.bits


@pytest.fixture(scope="module", autouse=True)
def few_tasks():
    """The first twenty tasks stand for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitsSubsetsTask, "bits", lambda self: all_tasks(10)[:NUM_TASKS])
        yield


@pytest.fixture(scope="module")
def task(few_tasks):
    return DigitsSubsetsTask(CONFIG)


@pytest.fixture(scope="module")
def zoo(task, tmp_path_factory):
    return task.collect(tmp_path_factory.mktemp("zoo") / "zoo", processes=1)


def test_a_zoo_holds_every_task_with_its_split_and_condition(task, zoo):
    assert len(zoo) == 2 * NUM_TASKS and zoo.num_runs == NUM_TASKS
    assert zoo.condition == task.condition
    assert len(zoo.subset("unseen")) == 10 and len(zoo.subset("validation")) == 8
    for entry in zoo.entries[:: len(zoo) // 7]:
        assert list(entry.condition) == task.bits()[entry.run].tolist()
    assert not (zoo.path / "parts").exists()
    zoo.verify()


def test_what_the_zoo_records_is_what_the_networks_score(task, zoo):
    index = zoo.subset("unseen")[3]
    entry = zoo.entries[index]
    bits = torch.tensor([entry.condition])
    answers = task.predict([zoo.state_dict(index)], "validation")
    accuracy = (answers == task.targets(bits, "validation")).double().mean().item()
    assert accuracy == pytest.approx(entry.metrics["validation_accuracy"], abs=0.005)


def test_a_killed_collection_goes_on_where_it_stood(task, zoo, tmp_path, monkeypatch):
    trained = []
    real = DigitsSubsetsTask.train_part

    def dying(self, tasks, folder):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(tasks[0])
        return real(self, tasks, folder)

    monkeypatch.setattr(DigitsSubsetsTask, "train_part", dying)
    with pytest.raises(KeyboardInterrupt):
        task.collect(tmp_path / "zoo", processes=1)
    base = load_file(tmp_path / "zoo" / "base.safetensors")
    monkeypatch.setattr(
        DigitsSubsetsTask,
        "train_part",
        lambda self, tasks, folder: trained.append(tasks[0]) or real(self, tasks, folder),
    )
    resumed = task.collect(tmp_path / "zoo", processes=1)
    assert trained == [0, 6, 12, 18]  # none twice
    assert all(torch.equal(value, load_file(zoo.path / "base.safetensors")[name]) for name, value in base.items())
    assert resumed.digest() == zoo.digest()


def test_parts_are_shared_among_processes(task, zoo, tmp_path, monkeypatch):
    """Two launched processes, one after the other: each trains its own half."""

    class Place:
        num_processes = 2

        def __init__(self, rank):
            self.process_index, self.is_main_process = rank, rank == 0

        def wait_for_everyone(self):
            pass

        def main_process_first(self):
            return contextlib.nullcontext()

    path = tmp_path / "zoo"
    task.collect(path, processes=1, limit=1)  # base and first part
    monkeypatch.setattr("accelerate.PartialState", lambda **_: Place(1))
    task.collect(path, processes=1)
    made = [file.name for file in (path / "parts").iterdir()]
    assert made == ["part-00002.safetensors"]  # of the missing 1, 2, 3 rank 1 has the second; the first is listed
    monkeypatch.undo()
    assert task.collect(path, processes=1).digest() == zoo.digest()


def test_copies_of_a_task_share_its_split_and_differ_in_their_images(zoo, tmp_path):
    """Parts of six networks, so that one part holds the end of the first copy and the start of the second."""
    task = DigitsSubsetsTask(CONFIG.model_copy(update={"copies": 2}))
    double = task.collect(tmp_path / "zoo", processes=1)
    first, second = double.entries[: len(zoo)], double.entries[len(zoo) :]
    assert [each.run for each in second] == [each.run + NUM_TASKS for each in first]
    assert [(each.condition, each.split) for each in second] == [(each.condition, each.split) for each in first]
    assert [each.sha256 for each in first[:24]] == [each.sha256 for each in zoo.entries[:24]]  # the same whole parts
    assert not {each.sha256 for each in second} & {each.sha256 for each in first}
    deviations = [double.state_dict(row)["conv1.weight"] for row in (0, len(zoo))]
    assert (deviations[0] - deviations[1]).abs().max() > 1e-3
    answers = task.predict([double.state_dict(len(double) - 1)], "validation")
    right = (answers == task.targets(torch.tensor([second[-1].condition]), "validation")).double().mean().item()
    assert right == pytest.approx(second[-1].metrics["validation_accuracy"], abs=0.005)


def test_images_are_enlarged_as_the_digits_task_enlarges_them():
    task = DigitsSubsetsTask(CONFIG.model_copy(update={"image_size": 16, "network": "vit"}))
    assert torch.equal(task.images("test"), load_splits(16).images["test"])
    images, classes = task.draw(3, torch.Generator().manual_seed(0), augmented=True)
    assert images.shape == (3, 1, 16, 16) and task.build()(images).shape == (3, 2) and classes.shape == (3,)


def test_a_zoo_of_an_earlier_version_is_complete(task, zoo, tmp_path):
    shutil.copytree(zoo.path, tmp_path / "zoo")
    record = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    for section, fields in (
        (record["task"], ("tasks", "copies", "image_size")),
        (record["task"]["base"], ("precision",)),
        (record["task"]["finetune"], ("precision",)),
        (record["task"]["finetune"]["stages"][0], ("schedule",)),
    ):
        for field in fields:
            del section[field]
    (tmp_path / "zoo" / "zoo.json").write_text(json.dumps(record))
    assert task.collect(tmp_path / "zoo", processes=1).digest() == zoo.digest()


def test_a_family_may_be_cut_to_some_of_its_tasks():
    some = ALL_BITS(DigitsSubsetsTask(CONFIG.model_copy(update={"tasks": 300})))
    assert len(some) == 300 == len(some.unique(dim=0))
    assert not torch.equal(some, all_tasks(10)[:300])
    with pytest.raises(InputError, match="at most 1022"):
        ALL_BITS(DigitsSubsetsTask(CONFIG.model_copy(update={"tasks": 2000})))


def test_another_configuration_is_one_line(zoo):
    other = build_task({**CONFIG.model_dump(mode="json"), "seed": 5})
    with pytest.raises(InputError, match="seed"):
        other.collect(zoo.path)


def test_behaviour_losses_are_differentiable_and_draw_training_images(task, monkeypatch):
    asked = []
    real = DigitsSubsetsTask.classes
    monkeypatch.setattr(
        DigitsSubsetsTask, "classes", lambda self, split="test": asked.append(split) or real(self, split)
    )
    weights = {name: value[None].clone().requires_grad_() for name, value in task.build().state_dict().items()}
    bits = task.bits()[[5]].float()
    loss = task.behaviour_losses(weights, bits, 32, torch.Generator().manual_seed(0))
    loss.sum().backward()
    assert loss.shape == (1,) and all(value.grad.abs().sum() > 0 for value in weights.values())
    assert set(asked) == {"train"}


def test_a_teachers_probabilities_are_summed_over_either_side(task, zoo):
    """Against the loss of one network written out: cross-entropy of two logits with two probabilities."""
    network = task.build()
    weights = {name: value[None] for name, value in network.state_dict().items()}
    bits = task.bits()[[5]].float()
    loss = task.behaviour_losses(weights, bits, 32, torch.Generator().manual_seed(0), task.teacher(zoo))
    images, _ = task.draw(32, torch.Generator().manual_seed(0), augmented=True)
    base = task.network(10)
    base.load_state_dict(task.base_network(zoo))
    with torch.no_grad():
        probabilities = base.eval()(images).softmax(-1)
        positive = probabilities[:, bits[0].bool()].sum(1)
        expected = F.cross_entropy(network.eval()(images), torch.stack([1 - positive, positive], 1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_right_answers_may_be_those_of_the_original(task):
    """Against cross-entropy written out for one network; the original's own weights lie at the loss's minimum."""
    network, original = task.build(), task.network(2)
    stacked = [{name: value[None] for name, value in each.state_dict().items()} for each in (network, original)]
    bits = task.bits()[[5]].float()
    losses = [
        task.behaviour_losses(each, bits, 32, torch.Generator().manual_seed(0), originals=stacked[1])
        for each in stacked
    ]
    images, _ = task.draw(32, torch.Generator().manual_seed(0), augmented=True)
    with torch.no_grad():
        expected = F.cross_entropy(network.eval()(images), original.eval()(images).softmax(-1))
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses[1].item() < losses[0].item()


def test_a_temperature_divides_the_log_odds_of_right_answers(task):
    """Of an original whose last layer is twice as large, at a temperature of two: the original's own loss."""
    original = {name: value[None] for name, value in task.network(2).state_dict().items()}
    surer = {name: 2 * value if name.startswith("linear2") else value for name, value in original.items()}
    bits = task.bits()[[5]].float()
    losses = [
        task.behaviour_losses(original, bits, 32, torch.Generator().manual_seed(0), originals=right, temperature=each)
        for right, each in ((original, 1.0), (surer, 2.0), (surer, 1.0))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert losses[2].item() != pytest.approx(losses[0].item(), rel=1e-3)


def test_classes_whose_bit_is_withheld_count_for_neither_side(task, zoo):
    """As if the images of those classes had not been drawn."""
    weights = {name: value[None] for name, value in task.build().state_dict().items()}
    bits = task.bits()[[5]].float()
    bits[0, [2, 7]] = WITHHELD
    loss = task.behaviour_losses(weights, bits, 64, torch.Generator().manual_seed(0))
    images, classes = task.draw(64, torch.Generator().manual_seed(0), augmented=True)
    told = (classes != 2) & (classes != 7)
    assert 0 < told.sum() < 64
    expected = F.cross_entropy(task.build().eval()(images[told]), bits[0].long()[classes[told]])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    taught = task.behaviour_losses(weights, bits, 64, torch.Generator().manual_seed(0), task.teacher(zoo))
    assert taught.isfinite().all()
