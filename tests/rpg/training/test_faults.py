"""Full disks, damaged files and losses that are not finite: what is saved stays whole and usable."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpg.training.loop import train
from rpg.training.run_folder import RunFolder
from rpg.training.trainer import Trainer
from tests.conftest import small_config
from tokenization.errors import InputError


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "generator" / "model.safetensors")


def assert_same_run(run: str | Path, other: str | Path) -> None:
    """Bit-equal weights and the same logged losses, once each."""
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    lines, expected = ((Path(each) / "metrics.jsonl").read_text().splitlines() for each in (run, other))
    assert [json.loads(line) for line in lines] == [json.loads(line) for line in expected]


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, zoo):
    config = small_config(tmp_path)
    train(config)
    folder = RunFolder(config.run)
    (newest, path), (older, _) = folder.steps()
    victim = path / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-7])
    before, said = weights(config.run), []
    train(config, resume=True, say=said.append)
    assert "model.safetensors" in said[0] and "falling back" in said[0]
    assert said[1] == f"going on after step {older} of {newest}"
    assert all(torch.equal(value, before[name]) for name, value in weights(config.run).items())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
@pytest.mark.parametrize(("limit", "place"), [(40_000, r"step-00000010.*from step-00000005"), (700, "run.*last save")])
def test_a_full_disk_keeps_the_save_before(tmp_path, zoo, limit, place):
    """The kernel refuses files beyond ``limit`` bytes: the optimizer's state, or a line of the log."""
    whole, config = (small_config(tmp_path, run=str(tmp_path / run)) for run in ("whole", "run"))
    train(whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int, total: int, loss: float) -> None:
        if done == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    try:
        with pytest.raises(InputError, match=place) as caught:
            train(config, progress=fill, say=lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)
    assert RunFolder(config.run).newest()[0] == 5
    train(config, resume=True, say=lambda _: None)
    assert_same_run(config.run, whole.run)


@pytest.mark.parametrize("part", [0, 1])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, zoo, part):
    """It names step and layer, and no parameter has changed, whichever part of an accumulated batch it is in."""
    config = small_config(tmp_path, train={"gradient_accumulation": 2})
    trainer = Trainer(config, resume=False, overwrite=False, say=lambda _: None)
    steps = trainer.sampler.prefetch(0, 3)
    for step, parts in steps:
        if step == 2:
            break
        trainer.train_step(step, parts)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    parts[part].samples[:, -1] = float("nan")
    with pytest.raises(InputError, match=r"step 3, layer '3\.bias' has a loss that is not finite"):
        trainer.train_step(step, parts)
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, zoo):
    trainer = Trainer(small_config(tmp_path), resume=False, overwrite=False, say=lambda _: None)
    trainer.network.denoiser.input.bias.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    _, parts = next(trainer.sampler.prefetch(0, 1))
    with pytest.raises(InputError, match="a gradient of step 1 is not finite"):
        trainer.train_step(0, parts)
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())
