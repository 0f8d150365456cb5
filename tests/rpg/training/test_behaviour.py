from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rpg.config import BehaviourConfig, Config, TrainConfig
from rpg.diffusion import DDPMConfig, FlowConfig, build_objective
from rpg.tasks import DigitsConfig, DigitsSubsetsConfig
from rpg.tasks.images.digits import DigitsSubsetsTask, DigitsTask
from rpg.tasks.side_by_side import stack
from rpg.training.batches import BatchSampler, to_batch
from rpg.training.data import TrainingSet, training_entries
from rpg.training.loop import train
from rpg.training.losses import AuxiliaryLosses, BehaviourLoss, num_at_last_time
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.zoo.condition import WITHHELD
from tokenization.zoo.zoo import Zoo


@pytest.fixture(scope="module")
def task():
    return DigitsSubsetsTask(DigitsSubsetsConfig())


@pytest.fixture(scope="module")
def zoo(task, tmp_path_factory):
    """Ten untrained networks with a condition each; two are validation tasks, two unseen ones."""
    zoo = Zoo.create(tmp_path_factory.mktemp("zoo"), task=task.config.model_dump(mode="json"), condition=task.condition)
    for index in range(10):
        torch.manual_seed(index)
        state = task.network(2).state_dict()
        split = "train" if index < 6 else "validation" if index < 8 else "unseen"
        zoo.append(state, run=index, step=1, condition=task.bits()[index * 100].tolist(), split=split)
    return zoo


def config_of(zoo, tmp_path, **changes):
    tree = {
        "run": str(tmp_path / "run"),
        "zoo": str(zoo.path),
        "model": {
            "state": {"of": "none"},
            "condition": {"kind": "binary"},
            "backbone": {"kind": "lstm", "d_model": 16, "num_layers": 1},
            "denoiser": {"kind": "mlp", "width": 16, "hidden": 16, "depth": 1},
        },
        "train": {"steps": 3, "batch_size": 4, "warmup_steps": 0, "behaviour": {"images": 8}, **changes},
    }
    return Config.parse(tree, "test")


def test_the_loss_of_the_zoos_own_weights_is_their_cross_entropy(task, zoo):
    layout = TokenLayout.fit(zoo, TokenOptions())
    tokens = torch.stack([layout.encode(zoo.checkpoint(index)) for index in (0, 3)]).requires_grad_()
    conditions = torch.tensor([zoo.entries[index].condition for index in (0, 3)])
    loss = BehaviourLoss(task, layout, BehaviourConfig(weight=2.0, images=64), zoo)
    value = loss(tokens, conditions, None, torch.Generator().manual_seed(7))
    images, classes = task.draw(64, torch.Generator().manual_seed(7), augmented=True)
    expected = 0.0
    for index, condition in zip((0, 3), conditions, strict=True):
        network = task.build()
        network.load_state_dict(zoo.state_dict(index))
        expected += nn.functional.cross_entropy(network.eval()(images), condition.long()[classes]).item()
    assert value.item() == pytest.approx(expected, rel=1e-4)  # weight 2 times the mean of two
    value.backward()
    assert tokens.grad.abs().sum() > 0
    assert loss.seconds > 0 and loss.fraction_of(10 * loss.seconds) == "10%"
    alone = loss(tokens, conditions, torch.tensor([False, True]), torch.Generator().manual_seed(7))
    assert alone.item() != pytest.approx(value.item())  # a dropped condition is not scored


def test_both_is_halfway_between_the_base_and_the_checkpoint(task, zoo):
    made, own = (stack([zoo.state_dict(index) for index in each]) for each in ((0, 1), (2, 3)))
    bits = torch.tensor([zoo.entries[index].condition for index in (2, 3)])
    base = task.network(10)
    targets = [{"teacher": lambda images: base(images).softmax(-1)}, {"originals": own}]
    with torch.no_grad():  # cross-entropy is linear in the right answers
        first, second, both = (
            task.behaviour_losses(made, bits, 32, torch.Generator().manual_seed(0), **each)
            for each in (*targets, targets[0] | targets[1])
        )
    assert torch.allclose(both, (first + second) / 2, atol=1e-5) and not torch.allclose(first, second, atol=1e-3)


def test_the_first_examples_are_at_the_last_time(zoo, tmp_path):
    config = config_of(zoo, tmp_path)
    rows = BatchSampler(TrainingSet(zoo, config), TokenLayout.fit(zoo, TokenOptions())).load(0)
    for objective, last in ((build_objective(FlowConfig()), 1.0), (build_objective(DDPMConfig()), 999)):
        batch = to_batch(rows, objective, torch.device("cpu"), 2)
        assert (batch.time[:2] == last).all() and (batch.time[2:] < last).all()
    assert num_at_last_time(TrainConfig(), 8) == 0
    assert num_at_last_time(TrainConfig(behaviour=BehaviourConfig(fraction=0.5)), 8) == 4


def test_training_with_it_reports_its_cost(zoo, tmp_path):
    folder = train(config_of(zoo, tmp_path), say=lambda text: None)
    assert "behaviour loss, share of training seconds" in (folder / "README.md").read_text()


def test_splits_decide_what_is_trained_on(zoo):
    assert training_entries(zoo, ["train"]) == [0, 1, 2, 3, 4, 5]
    assert training_entries(zoo, ["validation", "train"]) == list(range(8))


def test_impossible_uses_are_one_line(task, zoo, tmp_path):
    layout = TokenLayout.fit(zoo, TokenOptions())
    with pytest.raises(InputError, match="train.behaviour"):
        BehaviourLoss(DigitsTask(DigitsConfig()), layout, BehaviourConfig(), zoo)
    with pytest.raises(InputError, match="train.tokens"):
        train(config_of(zoo, tmp_path, tokens=5), say=lambda text: None)
    with pytest.raises(InputError, match="base.safetensors"):
        BehaviourLoss(task, layout, BehaviourConfig(target="base"), zoo)


def test_withheld_bits_lie_halfway_and_differ_by_step(zoo, tmp_path):
    config = config_of(zoo, tmp_path)
    condition = config.model.condition.model_copy(update={"withhold": 0.3})
    config = config.model_copy(update={"model": config.model.model_copy(update={"condition": condition})})
    sampler = BatchSampler(TrainingSet(zoo, config), TokenLayout.fit(zoo, TokenOptions()))
    drawn = torch.cat([sampler.load(step).conditions for step in range(40)])
    assert set(drawn.unique().tolist()) == {0.0, WITHHELD, 1.0}
    assert (drawn == WITHHELD).float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert (drawn == WITHHELD).any(0).all()
    with pytest.raises(InputError, match="withhold"):
        Config.parse({"model": {"condition": {"kind": "vector", "withhold": 0.3}}}, "test")


def test_every_process_draws_the_same_images():
    def draw(rank: int, step: int = 3, seed: int = 0) -> int:
        losses = AuxiliaryLosses.__new__(AuxiliaryLosses)
        losses.settings, losses.seed, losses.distributed = TrainConfig(), seed, SimpleNamespace(rank=rank)
        losses.behaviour, losses.new_states = lambda *arguments: arguments[3].initial_seed(), None
        batch = SimpleNamespace(
            group=torch.tensor([0]), num_last=1, dropped=None, conditions=torch.zeros(1, 1), tasks=None,
            samples=torch.zeros(1),
        )  # fmt: skip
        return losses(step, batch, SimpleNamespace(samples=torch.zeros(1)))

    assert draw(0) == draw(1)
    assert len({draw(0), draw(0, step=4), draw(0, seed=1)}) == 3
