import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rpg.config import Config
from rpg.training.loop import train
from rpg.training.optim import build_optimizer, learning_rate
from rpg.training.run_folder import RunFolder
from tests.conftest import small_config
from tokenization.errors import InputError

# Moments of fewer than 4,096 values stay in fp32 in bitsandbytes: these have more.
MODEL = {"backbone": {"kind": "lstm", "d_model": 64, "num_layers": 1}}


def losses(config: Config) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]


def test_the_learning_rate_warms_up_and_ends_near_zero():
    config = small_config(Path("x"), train={"steps": 100, "warmup_steps": 10, "learning_rate": 1.0}).train
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 == max(rates)
    assert rates[54] == pytest.approx(0.52, abs=0.02) and rates[-1] < 0.001


def test_eight_bit_moments_train_alike_and_resume_exactly(tmp_path, zoo):
    pytest.importorskip("bitsandbytes")
    full, whole, parts = (
        small_config(tmp_path, run=str(tmp_path / name), model=MODEL, train={"optimizer": name.partition("-")[0]})
        for name in ("adamw", "adamw8bit-whole", "adamw8bit-parts")
    )
    for config in (full, whole):
        train(config)
    assert losses(whole) == pytest.approx(losses(full), rel=1e-3) and losses(whole) != losses(full)
    train(parts, max_seconds=0)  # stops after its first step
    train(parts, resume=True)
    mine, theirs = (load_file(Path(config.run) / "generator" / "model.safetensors") for config in (parts, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    _, newest = RunFolder(whole.run).steps()[0]
    with safe_open(newest / "optimizer.safetensors", "pt") as file:
        moments = [file.get_tensor(f"state{i}.backbone.layers.0.lstm.weight_hh_l0") for i in (1, 2)]
    assert all(moment.dtype == torch.uint8 for moment in moments)


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"needs bitsandbytes, which is not installed.*pip install 'bitsandbytes>=0\.49'"
    ):
        build_optimizer(small_config(tmp_path, train={"optimizer": "adamw8bit"}).train, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("denoiser", "recompute"),
    [({}, {"checkpoint_rows": 5}), ({"kind": "unet1d", "channels": (1, 4, 8, 4, 1)}, {"checkpointing": True})],
    ids=["mlp", "unet1d"],
)
def test_recomputed_and_compiled_networks_train_alike(tmp_path, zoo, denoiser, recompute):
    """aot_eager traces forward and backward as inductor does, without a compiler."""
    model = {**small_config(tmp_path).plain()["model"], "state": {"of": "run", "noise": 0.3}}
    model["denoiser"] = denoiser or model["denoiser"]
    plain = small_config(tmp_path, run=str(tmp_path / "plain"), model=model)
    recomputed = {
        "backbone": {**model["backbone"], "checkpointing": True},
        "denoiser": {**model["denoiser"], **recompute},
    }
    frugal = small_config(tmp_path, run=str(tmp_path / "frugal"), model={**model, **recomputed})
    compiled = small_config(tmp_path, run=str(tmp_path / "compiled"), model=model, train={"compile": "aot_eager"})
    for config in (plain, frugal, compiled):
        train(config, say=lambda _: None)
    assert losses(frugal) == pytest.approx(losses(plain), abs=1e-5)
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
