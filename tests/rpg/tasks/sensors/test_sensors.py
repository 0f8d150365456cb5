from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from rpg.config import BehaviourConfig, Config
from rpg.diffusion import FlowConfig
from rpg.generation.generator import Generator
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.tasks.images.config import Cifar10SubsetsConfig
from rpg.tasks.sensors.config import SensorsConfig
from rpg.tasks.sensors.simulator import declared_settings, draw_settings, seen_by
from rpg.tasks.sensors.task import SensorsTask, TinyMLP
from rpg.tasks.side_by_side import repeat, stack
from rpg.training.data import TrainingSet
from rpg.training.loop import train
from rpg.training.losses import DrawnTasksLoss
from tests.rpg.tasks.images.test_data_sets import write_cifar10
from tokenization.errors import InputError
from tokenization.layouts import fit_layout
from tokenization.zoo.condition import ConditionSpec, Setting, parse_settings, settings_features
from tokenization.zoo.zoo import Zoo

SETTINGS = declared_settings(SensorsConfig())
SMALL = {
    "seen": 6, "validation": 2, "unseen": 3, "group": 4,
    "generalist": {"steps": 20, "sensors": 4, "images": 8}, "specialist": {"steps": 40, "images": 16},
}  # fmt: skip


def sensor(**values) -> torch.Tensor:
    return torch.tensor([parse_settings(SETTINGS, values)])


def small_task(**changes) -> SensorsTask:
    return SensorsTask(SensorsConfig.model_validate({**SMALL, **changes}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, lambda image: image),
        ({"angle": 90}, lambda image: torch.rot90(image, 1, (-2, -1))),
        ({"angle": 180}, lambda image: image.flip(-2, -1)),
        ({"inverted": True}, lambda image: 1 - image),
        ({"shift_right": 0.25}, lambda image: torch.nn.functional.pad(image, (1, -1))),  # one pixel of eight
        ({"shift_down": -0.25}, lambda image: torch.nn.functional.pad(image, (0, 0, -1, 1))),
        (
            {"angle": 90, "shift_right": 0.25, "inverted": 1},
            lambda image: 1 - torch.nn.functional.pad(torch.rot90(image, 1, (-2, -1)), (1, -1)),
        ),
    ],
)
def test_what_a_sensor_sees(values, expected) -> None:
    images = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(seen_by(images, SETTINGS, sensor(**values))[0], expected(images), atol=1e-5)


def test_a_larger_scale_shows_things_larger() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[..., 2:6, 2:6] = 1
    seen = {scale: seen_by(image, SETTINGS, sensor(scale=scale)).sum().item() for scale in (0.8, 1.0, 1.2)}
    assert seen[0.8] == pytest.approx(16 * 0.64, rel=0.15) and seen[1.2] == pytest.approx(16 * 1.44, rel=0.15)


def test_sensors_see_together_what_they_see_alone() -> None:
    rng = torch.Generator().manual_seed(1)
    values, own = draw_settings(SETTINGS, 5, rng), torch.rand(5, 3, 1, 8, 8, generator=rng)
    together = seen_by(own, SETTINGS, values)
    alone = [seen_by(own[i], SETTINGS, values[i : i + 1])[0] for i in range(5)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-6)
    shared = seen_by(own[0], SETTINGS, values)
    assert torch.allclose(shared[0], together[0], atol=1e-6) and shared.shape == together.shape


def test_drawn_sensors_lie_in_the_ranges_and_a_setting_without_a_range_is_none() -> None:
    values = draw_settings(SETTINGS, 500, torch.Generator().manual_seed(0))
    for setting, column in zip(SETTINGS, values.unbind(1), strict=True):
        assert setting.low <= column.min() and column.max() <= setting.high
        assert column.mean() == pytest.approx((setting.low + setting.high) / 2, abs=0.06 * (setting.high - setting.low))
    fixed = declared_settings(SensorsConfig(scale=(1, 1), shift=0, inverted=False))
    assert [setting.name for setting in fixed] == ["angle"]
    with pytest.raises(InputError, match="give angle, scale or shift a range"):
        SensorsTask(SensorsConfig(angle=(0, 0), scale=(1, 1), shift=0, inverted=False))


def test_features_of_settings_are_those_known_in_closed_form() -> None:
    found = settings_features(SETTINGS, sensor(angle=90, scale=1.2, shift_right=-0.25, inverted=True))[0]
    waves = [0, 1, -1, 0]  # cosine and sine of 90° and 180°
    assert torch.allclose(found, torch.tensor([*waves, 1, -1, 0, 1, 0, 1.0]), atol=1e-6)
    whole = settings_features(SETTINGS, torch.cat([sensor(angle=0), sensor(angle=360)]))
    assert torch.allclose(whole[0], whole[1], atol=1e-5)  # the circle closes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"angel": 3}, r"there is no setting 'angel'; choose among angle, scale, shift_right, shift_down, inverted"),
        ({"angle": 400}, "setting angle is 400; give 0 to 360"),
        ({"angle": "nan"}, "setting angle is nan; give 0 to 360"),
        ({"scale": "big"}, "setting scale is 'big'; give a number"),
        ({"inverted": 0.5}, "setting inverted is 0.5; give true or false"),
    ],
)
def test_impossible_settings_are_one_line(given, message) -> None:
    with pytest.raises(InputError, match=message):
        parse_settings(SETTINGS, given)


def test_a_zoo_of_sensors_is_collected_resumed_and_described(tmp_path: Path) -> None:
    task = small_task()
    task.collect(tmp_path / "zoo", limit=4, processes=1)
    zoo = task.collect(tmp_path / "zoo", processes=1)
    assert [entry.split for entry in zoo.entries] == ["train"] * 6 + ["validation"] * 2 + ["unseen"] * 3
    assert Zoo.open(zoo.path).condition == task.condition and task.condition.num_inputs == 10
    again = small_task().collect(tmp_path / "again", processes=1)
    for index in (0, 5, 10):
        assert all(torch.equal(value, again.state_dict(index)[name]) for name, value in zoo.state_dict(index).items())
    settings = torch.tensor([entry.condition for entry in zoo.entries])
    assert torch.equal(settings, task.sensors()[0])
    own = stack([zoo.state_dict(index) for index in range(11)])
    general = task.untrained(zoo, settings)["generalist"]
    assert task.accuracies(own, settings).mean() > task.accuracies(general, settings).mean()
    assert zoo.entries[3].metrics["validation_accuracy"] == pytest.approx(
        float(task.accuracies(own, settings, "validation")[3])
    )


def test_a_network_that_knows_the_answer_scores_1() -> None:
    """Two classes, all black and all white: the right network for an inverted sensor has the opposite sign."""
    task = small_task()
    task.__dict__["_data"] = (
        task._data[0].__class__(
            {name: torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8) for name in ("train", "test")},
            {name: torch.tensor([0, 1]) for name in ("train", "test")}, 2, mean=0.5,
        ),
        ("black", "white"),
    )  # fmt: skip
    ones = torch.ones(1, 64)
    bright = {
        "1.weight": torch.cat([ones, -ones, torch.zeros(6, 64)]), "1.bias": torch.zeros(8),
        "3.weight": torch.tensor([[-1.0, 1.0], [1.0, -1.0]]) @ torch.eye(2, 8), "3.bias": torch.zeros(2),
    }  # fmt: skip
    weights, sensors = repeat(bright, 2), torch.cat([sensor(), sensor(inverted=True)])
    assert task.accuracies(weights, sensors).tolist() == [1.0, 0.0]
    losses = task.behaviour_losses(weights, sensors, 40, torch.Generator().manual_seed(0))
    assert losses[0] < 1e-3 and losses[1] > 10


def test_every_sensor_is_taught_by_images_of_its_own() -> None:
    task = small_task()
    network, alike = repeat(task.build().state_dict(), 2), sensor().repeat(2, 1)
    losses = task.behaviour_losses(network, alike, 16, torch.Generator().manual_seed(0))
    images, classes = task.draw_for_each(2, 16, torch.Generator().manual_seed(0))
    assert losses[0] != losses[1]
    seen = task.see(images, alike)
    assert torch.allclose(TinyMLP.side_by_side(network, seen), task.side(network, seen), atol=1e-5)
    assert losses.tolist() == pytest.approx(task.losses(network, seen, classes).tolist(), rel=1e-5)


def test_a_folder_of_the_users_own(tmp_path: Path) -> None:
    for number in range(24):
        folder = tmp_path / "images" / ("even" if number % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (10 * number, 0, 0)).save(folder / f"{number}.png")
    task = small_task(data=str(tmp_path / "images"), image_size=4)
    assert task.class_names == ("even", "odd")
    assert [len(task.images(split)) for split in ("train", "validation", "test")] == [14, 4, 6]
    assert task.see(task.images(), task.sensors()[0]).shape == (11, 6, 3, 4, 4)
    with pytest.raises(InputError, match="too few to keep some apart"):
        (tmp_path / "few" / "a").mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / "few" / "a" / "1.png")
        small_task(data=str(tmp_path / "few")).images()


def test_a_network_that_timm_lacks_is_one_line() -> None:
    with pytest.raises(InputError, match="timm cannot make task.network nothing"):
        small_task(network="nothing").build()


class Planted:
    """Networks of two weights for directions: the right weights for an angle are its cosine and sine."""

    settings = (Setting("angle", 0.0, 360.0, "periodic"),)

    def build(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 1, bias=False)

    def collect(self, path, *, progress=None, limit=None):
        raise NotImplementedError

    def teacher(self, zoo):
        raise NotImplementedError

    def draw_tasks(self, num, rng):
        return 360 * torch.rand(num, 1, generator=rng)

    def behaviour_losses(self, weights, conditions, num_images, rng, teacher=None):
        points = torch.randn(num_images, 2, generator=rng)
        found = weights["weight"][:, 0] @ points.T  # [T, B]
        return (found - self.right(conditions) @ points.T).square().mean(1)

    def right(self, conditions):
        angle = torch.deg2rad(conditions[:, 0])
        return torch.stack([angle.cos(), angle.sin()], 1)


@pytest.mark.parametrize("drawn", ["fresh", "zoo"])
def test_drawn_tasks_teach_what_a_misleading_zoo_does_not(tmp_path: Path, drawn: str) -> None:
    """The zoo's weights are noise; the right ones for every angle are known, and learned from what networks do."""
    task = Planted()
    zoo = Zoo.create(tmp_path / "zoo", condition=ConditionSpec.of_settings(task.settings))
    for number in range(8):
        torch.manual_seed(number)
        zoo.append({"weight": torch.randn(1, 2)}, run=number, step=0, condition=[45.0 * number])
    config = Config.parse({"zoo": str(zoo.path), "tokens": {"size": 2, "normalization": "residual"}, "model": {
        "state": {"of": "none"}, "condition": {"kind": "vector"}, "diffusion": FlowConfig().model_dump(),
        "backbone": {"kind": "lstm", "d_model": 32, "num_layers": 1},
        "denoiser": {"kind": "mlp", "width": 32, "hidden": 32, "depth": 1},
    }}, "test")  # fmt: skip
    layout = fit_layout(zoo, config.tokens)
    network = TrainingSet(zoo, config).build_network(layout)
    assert isinstance(network, RecurrentDiffusion)
    known = None if drawn == "fresh" else torch.tensor([entry.condition for entry in zoo.entries])
    loss = DrawnTasksLoss(network, task, layout, BehaviourConfig(images=16), zoo, known=known)
    with pytest.raises(InputError, match="Planted takes no train.behaviour.noise; leave it out"):
        DrawnTasksLoss(network, task, layout, BehaviourConfig(noise=0.1), zoo)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(400):
        optimizer.zero_grad()
        loss.draw(torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    generator = Generator(config, layout, network, zoo.condition)
    angles = (
        torch.tensor([[10.0], [100.0], [200.0], [300.0]]) if drawn == "fresh" else loss.draw_tasks(4, torch.Generator())
    )
    made = torch.cat([each["weight"] for each in generator.generate(4, condition=angles, steps=1)])
    assert torch.allclose(made, task.right(angles), atol=0.15)


@pytest.mark.parametrize("read", [False, True])
def test_encoders_of_examples_are_taught_the_settings(tmp_path: Path, read: bool) -> None:
    task = small_task()
    task.collect(tmp_path / "zoo", processes=1)
    zoo = Zoo.open(tmp_path / "zoo")
    condition = {"kind": "examples", "counts": [10], "classes": 10, "features": 10, "read": read}
    tree = {"run": str(tmp_path / "run"), "zoo": str(zoo.path), "tokens": {"size": 610, "flatten": "flat"},
            "model": {"state": {"of": "none"}, "backbone": {"kind": "none", "d_model": 16}, "condition": condition,
                      "denoiser": {"kind": "decoder", "width": 16},
                      "diffusion": {"kind": "flow", "prediction": "sample"}},
            "train": {"imitation": 0, "behaviour": {"networks": 16}}}  # fmt: skip
    config = Config.parse(tree, "test")
    layout = fit_layout(zoo, config.tokens)
    network = TrainingSet(zoo, config).build_network(layout)
    examples = TrainingSet(zoo, config).examples
    loss = DrawnTasksLoss(network, task, layout, config.train.behaviour, zoo, examples)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for step in range(60):
        optimizer.zero_grad()
        loss.draw(torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    tasks = task.draw_tasks(64, torch.Generator().manual_seed(99))
    rows = examples.draw(tasks, torch.Generator().manual_seed(98))
    told = network.condition.reader(rows) if read else network.condition(rows)[:, :10]
    wanted = task.condition.inputs(tasks)
    assert (told - wanted)[:, 7].square().mean() < 0.3  # the sign of the contrast, of variance 1
    with pytest.raises(InputError, match="model.condition.features is 9, but tasks have 10 numbers"):
        condition["features"] = 9
        other = TrainingSet(zoo, Config.parse(tree, "test")).build_network(layout)
        DrawnTasksLoss(other, task, layout, config.train.behaviour, zoo, examples)


def test_a_generator_of_settings_is_asked_by_name_and_says_so(tmp_path: Path) -> None:
    task = small_task()
    task.collect(tmp_path / "zoo", processes=1)
    tree = {"run": str(tmp_path / "run"), "zoo": str(tmp_path / "zoo"), "task": task.config.model_dump(mode="json"),
            "model": {"state": {"of": "none"}, "condition": {"kind": "vector"},
                      "backbone": {"kind": "lstm", "d_model": 16, "num_layers": 1},
                      "denoiser": {"kind": "mlp", "width": 16, "hidden": 16, "depth": 1}},
            "train": {"steps": 2, "batch_size": 4, "behaviour": {"images": 8}}}  # fmt: skip
    for tasks, imitation in (("zoo", 1.0), ("fresh", 1.0), ("zoo", 0.0), ("fresh", 0.0)):
        tree["train"] |= {
            "behaviour": {"images": 8, "tasks": tasks, "networks": 3, "noise": 0.1},
            "imitation": imitation,
        }
        train(Config.parse(tree, "test"), overwrite=True)
    with pytest.raises(InputError, match="imitation: 0 leaves nothing to learn from; give behaviour a weight"):
        Config.parse(tree | {"train": {"imitation": 0}}, "test")
    generator = Generator.from_pretrained(tmp_path / "run")
    assert generator.condition == task.condition
    by_name = generator.generate(1, condition={"angle": 137, "inverted": True})
    by_values = generator.generate(1, condition=[137, 1, 0, 0, 1])
    assert all(torch.equal(value, by_values[0][name]) for name, value in by_name[0].items())
    request = generator.request(2, condition={"angle": 137.5})
    assert '"condition": [137.5, 1.0, 0.0, 0.0, 0.0]' in request.provenance("", (), 1)["rpg.provenance"]
    with pytest.raises(InputError, match="setting scale is 1.3; give 0.8 to 1.2"):
        generator.generate(1, condition=[137, 1.3, 0, 0, 1])


VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize("layout", ["imagenet", "cifar10"])
def test_a_timm_network_is_trained_for_sensors_on_images_in_the_usual_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """FOLDER/train/CLASS and FOLDER/val/CLASS, and the batches of CIFAR-10, each with a few small images."""
    if layout == "imagenet":
        for number in range(30):
            folder = tmp_path / ("val" if number < 6 else "train") / f"n0000000{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (11, 9), (8 * number, 0, 0)).save(folder / f"{number}.JPEG")
        options, num_classes, num_test = {"data": str(tmp_path)}, 2, 6
    else:
        write_cifar10(tmp_path, lambda where, what, value: monkeypatch.setattr(where, what, value))
        few = partial(Cifar10SubsetsConfig, num_validation=2)
        monkeypatch.setattr("rpg.tasks.sensors.simulator.Cifar10SubsetsConfig", few)
        options, num_classes, num_test = {"data": "cifar10", "root": str(tmp_path)}, 10, 4
    task = small_task(**options, image_size=8, network="vit_tiny_patch16_224", network_arguments=VIT)
    zoo = task.collect(tmp_path / "zoo", processes=1)
    networks = repeat(zoo.state_dict(0), 2)
    seen = task.probabilities(networks, task.sensors()[0][:2])
    assert seen.shape == (2, num_test, num_classes) and torch.allclose(seen.sum(-1), torch.ones(2, num_test))
    shown = task.examples(task.sensors()[0][:2], torch.tensor([[0, 1], [1, 0]]), torch.Generator().manual_seed(0))
    assert task.inputs(shown).shape == (2, 2, 3, 8, 8)
    losses = task.behaviour_losses(networks, task.sensors()[0][:2], 4, torch.Generator().manual_seed(0), noise=0.1)
    assert losses.shape == (2,) and losses.isfinite().all()
