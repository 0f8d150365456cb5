import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpg.batches import BatchSampler
from rpg.optimizers import learning_rate
from rpg.runs import RunFolder
from rpg.training import train
from tests.conftest import make_zoo, small_config
from tokenization.errors import InputError
from tokenization.layout import TokenLayout
from tokenization.zoo import Zoo


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "generator" / "model.safetensors")


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("state", [{"of": "run"}, {"of": "checkpoint", "noise": 0.3}])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, zoo, state):
    whole = small_config(tmp_path, model={"state": state}, run=str(tmp_path / "whole"))
    train(whole)
    parts = small_config(tmp_path, model={"state": state}, run=str(tmp_path / "parts"))
    train(parts, max_seconds=0)  # stops after its first step
    assert RunFolder(parts.run).steps()[0][0] == 1
    train(parts, resume=True)
    assert_same_bits(weights(whole.run), weights(parts.run))

    def losses(run: str) -> list[dict]:
        return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]

    assert losses(whole.run) == losses(parts.run)


def test_a_killed_run_resumes_from_its_last_save(tmp_path, zoo):
    whole = small_config(tmp_path, run=str(tmp_path / "whole"), train={"steps": 120, "save_every": 10})
    train(whole)
    killed = small_config(tmp_path, run=str(tmp_path / "killed"), train={"steps": 120, "save_every": 10})
    killed.save(tmp_path / "killed.yaml")
    command = [sys.executable, "-m", "rpg.cli", "train", str(tmp_path / "killed.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = RunFolder(killed.run)
    wait_for(lambda: len(folder.steps()) > 0)
    process.kill()
    process.wait()
    train(killed, resume=True)
    assert_same_bits(weights(whole.run), weights(killed.run))


def test_sigterm_saves_and_ends_with_exit_code_0(tmp_path, zoo):
    config = small_config(tmp_path, train={"steps": 100000, "save_every": 50})
    config.save(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "rpg.cli", "train", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    folder = RunFolder(config.run)
    wait_for(lambda: len(folder.steps()) > 0)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--resume" in output
    assert folder.newest() is not None


def wait_for(condition, seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, zoo):
    config = small_config(tmp_path)
    train(config)
    folder = RunFolder(config.run)
    (newest, path), (older, _) = folder.steps()
    victim = path / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-7])
    said: list[str] = []
    found = folder.newest(said.append)
    assert found is not None and found[0] == older < newest
    assert "model.safetensors" in said[0] and "falling back" in said[0]
    before = weights(config.run)
    train(config, resume=True)
    assert_same_bits(before, weights(config.run))


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


def test_a_loss_that_is_not_finite_names_step_and_layer(tmp_path, zoo, monkeypatch):
    from rpg import trainer as training

    real = training.to_batch

    def poisoned(*arguments):
        batch = real(*arguments)
        if poisoned.calls == 2:
            batch.samples[:, -1] = float("nan")
        poisoned.calls += 1
        return batch

    poisoned.calls = 0
    monkeypatch.setattr(training, "to_batch", poisoned)
    config = small_config(tmp_path, train={"save_every": 1})
    with pytest.raises(InputError, match=r"step 3, layer '3\.bias'"):
        train(config)
    newest = RunFolder(config.run).newest()
    assert newest is not None and newest[0] == 2


def test_processes_share_the_batch_without_overlap(tmp_path, zoo):
    config = small_config(tmp_path, tokens={"size": 8}, train={"tokens": 5})
    layout = TokenLayout.fit(zoo, config.tokens)
    whole = BatchSampler(zoo, layout, config).load(7)
    halves = [BatchSampler(zoo, layout, config, rank, 2).load(7) for rank in range(2)]
    assert torch.equal(torch.cat([half.samples for half in halves]), whole.samples)
    assert halves[0].seeds + halves[1].seeds == whole.seeds
    assert all(torch.equal(half.token_ids, whole.token_ids) for half in halves)


def test_an_epoch_visits_every_checkpoint_once(tmp_path, zoo):
    config = small_config(tmp_path, train={"batch_size": 3})
    sampler = BatchSampler(zoo, TokenLayout.fit(zoo, config.tokens), config)
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


def test_impossible_requests_are_named(tmp_path, zoo):
    with pytest.raises(InputError, match=r"train\.batch_size"):
        train(small_config(tmp_path, train={"batch_size": 3, "gradient_accumulation": 2}))
    with pytest.raises(InputError, match="condition"):
        train(small_config(tmp_path, model={"condition": {"kind": "binary"}}), overwrite=True)
    empty = tmp_path / "empty"
    Zoo.create(empty)
    with pytest.raises(InputError, match="no checkpoint"):
        train(small_config(tmp_path, zoo=str(empty)), overwrite=True)


def test_the_learning_rate_warms_up_and_ends_near_zero():
    config = small_config(Path("x"), train={"steps": 100, "warmup_steps": 10, "learning_rate": 1.0}).train
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates)
    assert rates[54] == pytest.approx(0.52, abs=0.02) and rates[-1] < 0.001


def test_a_conditional_generator_trains_with_dropout(tmp_path):
    make_zoo(tmp_path / "zoo", num=8, condition_size=3)
    config = small_config(tmp_path, model={"condition": {"kind": "binary", "dropout": 0.5}})
    train(config)
    assert "condition.null" in weights(config.run)
