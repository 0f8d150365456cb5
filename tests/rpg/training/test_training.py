import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.training.batches import BatchSampler
from rpg.training.data import TrainingSet
from rpg.training.loop import train
from rpg.training.run_folder import RunFolder
from rpg.training.trainer import Trainer
from tests.conftest import make_zoo, small_config
from tokenization.errors import InputError
from tokenization.files import recover_folder
from tokenization.layout.layout import TokenLayout
from tokenization.zoo.zoo import Zoo


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "generator" / "model.safetensors")


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


UNET = {"kind": "unet1d", "channels": [1, 4, 6, 4, 1]}


@pytest.mark.parametrize(
    "model",
    [
        {"state": {"of": "run"}},
        {"state": {"of": "checkpoint", "noise": 0.3}},
        {"state": {"of": "checkpoint", "width": None, "initial": "constant", "noise": 0.3}, "denoiser": UNET},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, zoo, model):
    whole = small_config(tmp_path, model=model, run=str(tmp_path / "whole"))
    train(whole)
    parts = small_config(tmp_path, model=model, run=str(tmp_path / "parts"))
    train(parts, max_seconds=0)  # stops after its first step
    assert RunFolder(parts.run).steps()[0][0] == 1
    train(parts, resume=True)
    assert_same_bits(weights(whole.run), weights(parts.run))

    def losses(run: str) -> list[dict]:
        return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]

    assert losses(whole.run) == losses(parts.run)


@pytest.mark.parametrize("kind", ["recurrent", "kernel_ridge"])
def test_statistics_are_of_the_checkpoints_that_are_trained_on(tmp_path, zoo, kind):
    """As many held-out checkpoints lie ten away, so that statistics with any part of them are far off."""
    both = Zoo.create(tmp_path / "both")
    for index, entry in enumerate(zoo.entries):
        state = zoo.state_dict(index)
        both.append(state, run=entry.run, step=entry.step)
        far = {name: value + 10 if value.is_floating_point() else value for name, value in state.items()}
        both.append(far, run=entry.run, step=entry.step, split="unseen")
    tokens = {"size": 16, "normalization": "residual"}
    model = small_config(tmp_path).plain()["model"] if kind == "recurrent" else {"kind": kind}
    config = Config.parse({**small_config(tmp_path, zoo=str(both.path), tokens=tokens).plain(), "model": model}, "test")
    layout = Generator.from_pretrained(train(config)).layout
    found = torch.stack([layout.encode(zoo.checkpoint(index)) for index in range(len(zoo))])
    torch.testing.assert_close(found.mean(0), torch.zeros_like(found[0]), atol=1e-4, rtol=0)
    assert found.abs().max() < 10  # standard deviations


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_sessions(tmp_path, zoo):
    config, started = small_config(tmp_path), time.monotonic()
    train(config, max_seconds=0, say=lambda _: None)
    record = RunFolder(config.run).steps()[0][1] / "complete.json"
    content = json.loads(record.read_text())
    assert 0 < content["seconds"] < time.monotonic() - started
    record.write_text(json.dumps({**content, "seconds": 1000.0}))
    for _ in range(2):  # the second time nothing is left to do
        seconds = Generator.from_pretrained(train(config, resume=True)).facts["training seconds"]
        assert 1000 < seconds < 1000 + time.monotonic() - started


def test_a_run_goes_on_with_what_it_began_with(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    for seed in range(4):
        torch.manual_seed(seed)
        zoo.append({"w": torch.randn(8, 8), "scale": torch.rand(())}, run=seed, step=0)
    config = small_config(tmp_path)
    train(config, max_seconds=0, say=lambda _: None)
    record = RunFolder(config.run).steps()[0][1] / "complete.json"
    content = json.loads(record.read_text())
    del content["learned"]  # as earlier versions wrote it, which kept single values of the first checkpoint
    record.write_text(json.dumps(content))
    with pytest.raises(InputError, match="took 'scale', a single value, from the first checkpoint.*--overwrite"):
        train(config, resume=True)
    train(config, overwrite=True, max_seconds=0, say=lambda _: None)  # the cure
    zoo.append({"w": torch.randn(8, 8), "scale": torch.rand(())}, run=4, step=0)
    with pytest.raises(InputError, match="other checkpoints or labels than the zoo has now.*--overwrite"):
        train(config, resume=True)
    train(config, overwrite=True, max_seconds=0, say=lambda _: None)
    train(config, resume=True)


def test_steps_are_ordered_as_numbers(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (5, 100000000, 20):
        (folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    assert [step for step, _ in folder.steps()] == [100000000, 20, 5]


def test_a_run_that_is_there_is_neither_overwritten_nor_mixed(tmp_path, zoo):
    config = small_config(tmp_path)
    train(config)
    with pytest.raises(InputError, match="--resume"):
        train(config)
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        train(small_config(tmp_path, train={"learning_rate": 0.5}), resume=True)


def test_a_generator_that_a_kill_moved_aside_does_not_come_back_after_a_new_run(tmp_path, zoo):
    config = small_config(tmp_path)
    train(config, max_seconds=0, say=lambda _: None)
    folder = RunFolder(config.run)
    folder.generator.rename(folder.path / ".generator.replaced")
    folder.start(config, resume=False)
    recover_folder(folder.generator)
    assert not folder.generator.exists()


def test_processes_share_the_batch_without_overlap(tmp_path, zoo):
    config = small_config(tmp_path, tokens={"size": 8}, train={"tokens": 5})
    layout = TokenLayout.fit(zoo, config.tokens)
    whole = BatchSampler(TrainingSet(zoo, config), layout).load(7)
    halves = [BatchSampler(TrainingSet(zoo, config), layout, rank, 2).load(7) for rank in range(2)]
    assert torch.equal(torch.cat([half.samples for half in halves]), whole.samples)
    assert halves[0].seeds + halves[1].seeds == whole.seeds
    assert all(torch.equal(half.token_ids, whole.token_ids) for half in halves)


def test_an_epoch_visits_every_checkpoint_once(tmp_path, zoo):
    config = small_config(tmp_path, train={"batch_size": 3})
    sampler = BatchSampler(TrainingSet(zoo, config), TokenLayout.fit(zoo, config.tokens))
    for epoch in range(3):
        assert sorted(sampler.examples(2 * epoch) + sampler.examples(2 * epoch + 1)) == list(range(6))


def test_gradient_accumulation_gives_the_same_run(tmp_path, zoo):
    results = []
    for parts in (1, 2):
        config = small_config(tmp_path, run=str(tmp_path / str(parts)), train={"gradient_accumulation": parts})
        train(config)
        results.append(weights(config.run))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_averaged_weights_have_the_running_statistics_of_the_same_steps(tmp_path, zoo, decay):
    config = small_config(tmp_path, model={"denoiser": UNET}, train={"ema_decay": decay})
    trainer = Trainer(config, resume=False, overwrite=True, say=print)
    names = [name for name, _ in trainer.network.named_buffers() if "running" in name]
    expected = [trainer.network.get_buffer(name).clone() for name in names]
    for step, rows in trainer.sampler.prefetch(0, 5):
        trainer.train_step(step, rows)
        rate = 1 - min(decay, (2 + step) / (11 + step))
        for value, name in zip(expected, names, strict=True):
            value.lerp_(trainer.network.get_buffer(name), rate)
    folder = trainer.finish()
    found = load_file(folder / "model.safetensors")
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], value)
        assert torch.equal(found[name], trainer.network.get_buffer(name)) is (decay == 0)
    generator = Generator.from_pretrained(folder)
    assert_same_bits(generator.generate(3)[0], generator.generate(1)[0])


def test_batch_normalisation_forbids_another_accumulation(tmp_path, zoo):
    config = small_config(tmp_path, model={"denoiser": UNET})
    train(config, max_seconds=0)
    with pytest.raises(InputError, match=r"train\.gradient_accumulation"):
        train(small_config(tmp_path, model={"denoiser": UNET}, train={"gradient_accumulation": 2}), resume=True)


def test_impossible_requests_are_named(tmp_path, zoo):
    with pytest.raises(InputError, match=r"train\.batch_size"):
        train(small_config(tmp_path, train={"batch_size": 3, "gradient_accumulation": 2}))
    with pytest.raises(InputError, match="condition"):
        train(small_config(tmp_path, model={"condition": {"kind": "binary"}}), overwrite=True)
    empty = tmp_path / "empty"
    Zoo.create(empty)
    with pytest.raises(InputError, match="no checkpoint"):
        train(small_config(tmp_path, zoo=str(empty)), overwrite=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_dropped_condition_trains_what_stands_for_it(tmp_path, dropout):
    zoo = make_zoo(tmp_path / "zoo", num=8, condition_size=3)
    condition = {"kind": "binary", "dropout": dropout}
    config = small_config(tmp_path, model={"condition": condition}, train={"weight_decay": 0.0})
    untrained = (
        TrainingSet(zoo, config).build_network(TokenLayout.fit(zoo, config.tokens)).state_dict()["condition.null"]
    )
    train(config)
    moved = (weights(config.run)["condition.null"] - untrained).abs().max()
    assert moved > 1e-5 if dropout else moved < 1e-6
