"""Estimates against what really happens: real parameters, real bytes, peaks of the same computation on real tensors."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rpg.config import Config
from rpg.models import build_network
from rpg.planning.inspect import plan_tables
from rpg.planning.machine import checkpoint_bytes, held_bytes
from rpg.planning.measuring import LiveBytes, fake_copy
from rpg.planning.plan import build_estimator, make_plan
from rpg.planning.zoo_summary import ZooSummary, find_zoo_summary
from rpg.training.batches import BatchSampler, to_batch
from rpg.training.data import TrainingSet
from tests.conftest import make_zoo, small_config
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.layout.directions import BLOCK_BYTES, fitting_bytes
from tokenization.layout.layout import TokenLayout
from tokenization.zoo.zoo import Zoo

MEBI = 1 << 20


def test_live_bytes_of_a_computation_known_by_hand() -> None:
    x = torch.zeros(256, 1024)  # 1 MiB, not counted: it was there before
    with LiveBytes() as live:
        y = x + 1
        z = y.view(-1)[:5]  # a view keeps the whole storage, and costs nothing
        assert live.live == MEBI
        del y
        assert live.live == MEBI
        del z
        assert live.live == 0
        x.mul(2).add_(1)
    assert (live.live, live.peak) == (0, MEBI)


def test_live_bytes_of_a_forward_and_backward_pass() -> None:
    """Of two linear layers: the hidden activation is kept (and its relu), then the gradients appear."""
    network = nn.Sequential(nn.Linear(64, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 64, bias=False))
    x = torch.zeros(256, 64)
    with LiveBytes() as live:
        out = network(x)
        # The product itself is let go: relu keeps its own result, which the second layer keeps too.
        assert live.live == MEBI + 256 * 64 * 4
        out.sum().backward()
        del out
    assert live.live == 2 * 64 * 1024 * 4
    assert live.peak > 2 * MEBI


BACKBONES = [
    {"kind": "lstm", "d_model": 32, "num_layers": 2},
    {"kind": "mamba2", "d_model": 32, "num_layers": 1, "d_state": 8, "headdim": 16},
    {"kind": "transformer", "d_model": 32, "num_layers": 1, "num_heads": 2},
    {"kind": "transformer", "d_model": 32, "num_layers": 3, "num_heads": 2, "checkpointing": True},
    {"kind": "none", "d_model": 32},
]
DENOISERS = [
    {"kind": "mlp", "width": 32, "hidden": 64, "depth": 2},
    {"kind": "unet1d", "channels": [1, 8, 8, 8, 1], "d_time": 16},
    {"kind": "unet1d", "channels": [1, 8, 8, 8, 1], "d_time": 16, "checkpointing": True},
]


@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda d: d["kind"] + "+" * ("checkpointing" in d))
@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda b: b["kind"] + "+" * ("checkpointing" in b))
def test_training_memory_is_that_of_the_real_step(tmp_path: Path, backbone: dict, denoiser: dict) -> None:
    zoo = make_zoo(tmp_path / "zoo", num=6, num_runs=3, condition_size=2)
    model = {"backbone": backbone, "denoiser": denoiser, "condition": {"kind": "binary", "dropout": 0.5}}
    config = small_config(tmp_path, model=model, train={"batch_size": 6, "tokens": 5}, tokens={"size": 32})
    summary = ZooSummary.of(zoo, config)
    memory = build_estimator(config, summary).training_memory()

    layout = TokenLayout.fit(zoo, config.tokens)
    network = build_network(config.model, layout, summary.num_states, summary.condition_size).train()
    sampler = BatchSampler(TrainingSet(zoo, config), layout)
    batch = to_batch(sampler.load(0), network.objective, torch.device("cpu"))  # type: ignore[arg-type]
    with LiveBytes() as live:
        network(batch).mean.backward()
    gradients = sum(parameter.grad.nbytes for parameter in network.parameters() if parameter.grad is not None)
    assert memory.gradients == sum(parameter.nbytes for parameter in network.parameters()) >= gradients
    assert memory.activations + memory.gradients == pytest.approx(live.peak, rel=0.1)
    assert sum(build_estimator(config, summary).parameters().values()) * 4 == memory.gradients
    assert memory.total == sum(memory.components().values())


def test_summary_parameters_and_bytes_of_a_known_zoo(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo", num=6, num_runs=3, condition_size=2)
    config = small_config(tmp_path, model={"condition": {"kind": "binary"}}, train={"batch_size": 2, "tokens": 5})
    summary = ZooSummary.of(zoo, config)
    assert (summary.num_checkpoints, summary.num_states, summary.condition_size) == (6, 3, 2)
    # Values: convolution 27 + 3, norm 2 x 3, its statistics 2 x 3, linear 60 + 5; tokens of 16: 2 + 1 + 2 + 2 + 4 + 1.
    assert (summary.layout.num_values, summary.layout.num_tokens) == (107, 12)
    assert checkpoint_bytes(summary.layout) == 4 * 107
    assert build_estimator(config, summary).rows_per_step == 2 * 5
    assert build_estimator(config, summary).bytes_read_per_step == round(10 * 4 * 107 / 12)
    assert held_bytes(summary.layout) == 4 * 12 * 16 + 4 * 107
    assert build_estimator(config, summary).cache_bytes == 6 * 12 * 16 * 4
    counts = build_estimator(config, summary).parameters()
    assert set(counts) == {"backbone", "denoiser", "state", "condition"}
    width, state = 32, config.model.state.width
    assert counts["backbone"] == 2 * 4 * width * (width + 1)
    assert counts["state"] == 3 * state + width * (state + 1)
    # Null vector, two linear layers of the encoder, one into the denoiser.
    assert counts["condition"] == width + width * 3 + 2 * width * (width + 1)


def test_generation_memory_grows_with_the_tile_and_not_with_the_zoo(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    summary = ZooSummary.of(zoo, small_config(tmp_path))
    small, large = (
        build_estimator(small_config(tmp_path, generate={"tile_tokens": tile}), summary).generation_memory()
        for tile in (12, 120)
    )
    assert large.tile == pytest.approx(10 * small.tile, rel=0.05)
    assert small.weights == large.weights and 10 * small.prototypes == large.prototypes
    assert large.total == large.weights + large.prototypes + max(large.backbone, large.tile) > large.loading


@pytest.mark.slow
def test_the_largest_networks_are_measured_without_memory() -> None:
    """A generator of 1.4 billion parameters for a network of 250 million values: no storage, and only seconds."""
    overrides = [
        "tokens.size=16384",
        "model.backbone={kind: mamba2, d_model: 8192, num_layers: 2}",
        "model.denoiser.kind=unet1d",
        "train.tokens=64",
        "train.batch_size=1",
    ]
    config = Config.defaults(overrides)
    network = nn.Sequential(*(nn.Linear(16384, 5 * 1024, device="meta") for _ in range(3)))
    network.append(network[0])
    checkpoint = Checkpoint.without_values(network.state_dict(), Path("large"))
    assert checkpoint.ties == {"3.weight": "0.weight", "3.bias": "0.bias"}
    summary = ZooSummary(TokenLayout.without_statistics(checkpoint, config.tokens))
    memory = build_estimator(config, summary).training_memory(bf16=True)
    assert summary.layout.num_values > 250e6 and memory.weights > 3 << 30
    assert memory.activations > 64 * 16384 * 128 * 2  # the widest convolution's output alone, in bf16
    assert build_estimator(config, summary).generation_memory().weights == memory.weights  # fp32


def test_finding_directions_is_bounded_by_a_block_of_tokens_and_no_gpu_holds_it(tmp_path: Path) -> None:
    """`scripts/check_plan.py` compares with real processes."""
    one, two, many, more = (fitting_bytes(24, (num, 8, 16384)) for num in (10, 20, 10_000, 20_000))
    assert two == 2 * one and many == more > two
    assert 2 * BLOCK_BYTES < many < 4 * BLOCK_BYTES
    zoo = make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path, tokens={"rank": 3})
    memory = build_estimator(config, ZooSummary.of(zoo, config)).training_memory()
    assert memory.fitting == fitting_bytes(6, (12, 3, 16)) and memory.total >= memory.fitting
    assert memory.on_device + memory.waiting + memory.cache + memory.fitting + memory.libraries == sum(
        memory.components().values()
    )


def test_pdiff_is_estimated_too(tmp_path: Path) -> None:
    zoo: Zoo = make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path, model={"kind": "pdiff"})
    summary = ZooSummary.of(zoo, config)
    memory = build_estimator(config, summary).training_memory()
    network = build_network(config.model, TokenLayout.fit(zoo, config.tokens))
    assert memory.gradients == sum(parameter.nbytes for parameter in network.parameters())
    assert 0 < memory.ema < memory.gradients and memory.cache == 6 * 107 * 4
    # 107 values are 128 of 1 and 64 of 8 channels in the first convolution, in blocks of 16 both; 50 checkpoints
    assert build_estimator(config, summary).scratch_bytes(network) == 50 * 16 * (128 + 64) * 4
    assert build_estimator(config, summary).generation_memory().total > memory.weights


def test_pdiff_is_shown_with_its_own_batches(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    config = small_config(
        tmp_path, model={"kind": "pdiff", "autoencoder": {"steps": 5, "learning_rate": 1e-3, "batch_size": 37}}
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(*plan_tables(make_plan(config, find_zoo_summary(config))))
    assert "37 checkpoints" in console.file.getvalue()


def test_fake_networks_compute_shapes_alone() -> None:
    network = nn.LSTM(8, 8, device="meta")
    with FakeTensorMode():
        out, _ = fake_copy(network)(torch.empty(5, 2, 8))
    assert out.shape == (5, 2, 8) and out.device.type == "cpu"
