"""Plans: FLOPs against closed forms, structures without a zoo, and the largest network that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.planning.measuring import count_flops
from rpg.planning.plan import CUDA_BYTES, GIB, build_estimator, largest_network, make_plan, parse_memory
from rpg.planning.zoo_summary import ZooSummary, find_zoo_summary
from rpg.section import default_config
from rpg.training.loop import train
from tests.conftest import configurations, make_zoo, small_config
from tests.rpg.denoiser_flops import flops_per_token
from tokenization.errors import InputError

WIDTH, HIDDEN, DEPTH, D, TIME = 32, 64, 2, 16, 256


def config_of(folder: Path, **sections) -> Config:
    model = {
        "backbone": {"kind": "lstm", "d_model": WIDTH, "num_layers": 2},
        "denoiser": {"kind": "mlp", "width": WIDTH, "hidden": HIDDEN, "depth": DEPTH},
    }
    return small_config(folder, **{"model": model, "train": {"tokens": 5, "batch_size": 4}, **sections})


@pytest.fixture
def zoo(tmp_path: Path) -> ZooSummary:
    make_zoo(tmp_path / "zoo")
    return find_zoo_summary(config_of(tmp_path))


def test_flops_of_generation_are_those_of_the_closed_forms(tmp_path, zoo):
    config = config_of(tmp_path)
    found = build_estimator(config, zoo).generation_flops()
    length, tile = zoo.layout.num_tokens, config.generate.tile_tokens
    state = 2 * config.model.state.width * WIDTH
    assert found.backbone == state + 2 * 8 * length * WIDTH * (WIDTH + WIDTH)  # two layers, four gates, x and h
    num_modulations = 3 * DEPTH + 2
    assert found.once == 2 * WIDTH * num_modulations * WIDTH
    once_a_step = 2 * WIDTH * (TIME + WIDTH + num_modulations * WIDTH)  # the embedding of the time
    denoiser = build_estimator(config, zoo).meta_network().denoiser
    assert found.step == flops_per_token(denoiser) + once_a_step // tile
    assert found.total == found.backbone + length * (found.once + config.generate.steps * found.step)


@pytest.mark.parametrize("kind", ["mlp", "unet1d"])
def test_counted_flops_of_a_denoiser_call_are_the_closed_form(tmp_path, zoo, kind):
    """For a very long tile, so that nothing computed once a step is left."""
    config = config_of(tmp_path, model={"denoiser": {"kind": kind}}, generate={"tile_tokens": 1 << 20})
    closed = flops_per_token(build_estimator(config, zoo).meta_network().denoiser)
    assert build_estimator(config, zoo).generation_flops().step == pytest.approx(closed, rel=1e-3)


def test_a_training_step_costs_three_forward_passes(tmp_path, zoo):
    config = config_of(tmp_path)
    rows = 4 * 5
    assert build_estimator(config, zoo).rows_per_step == rows
    length, groups, num_modulations = zoo.layout.num_tokens, zoo.num_states, 3 * DEPTH + 2
    forward = groups * (2 * config.model.state.width * WIDTH + 16 * length * WIDTH * 2 * WIDTH)
    forward += rows * 2 * WIDTH * num_modulations * WIDTH  # of the prototypes
    forward += rows * 2 * WIDTH * (TIME + WIDTH + num_modulations * WIDTH)  # of every row's own time
    forward += rows * flops_per_token(build_estimator(config, zoo).meta_network().denoiser)
    # The inputs, the times' sinusoids and the noisy rows, need no gradient; the position embedding neither.
    needless = rows * 2 * WIDTH * (TIME + D)
    assert build_estimator(config, zoo).training_flops() == pytest.approx(3 * forward - needless, rel=0.02)
    parts = config_of(tmp_path, train={"tokens": 5, "batch_size": 4, "gradient_accumulation": 2})
    # The backbone runs for each part, here for as many states as before.
    assert build_estimator(parts, zoo).training_flops() > build_estimator(config, zoo).training_flops()


@pytest.mark.parametrize("basis", ["token", "network"])
@pytest.mark.parametrize("condition", ["none", "binary"])
def test_coefficients_codes_and_directions_are_counted_as_they_run(tmp_path, basis, condition):
    """The plan knows no values; a trained generator's own operations must come to the same."""
    zoo = make_zoo(tmp_path / "zoo", num=8, condition_size=0 if condition == "none" else 3)
    model = {"state": {"of": "code", "width": 5}, "condition": {"kind": condition}}
    tokens = {"rank": 4, "basis": basis, "centre": "zoo" if condition == "none" else "condition"}
    config = small_config(tmp_path, tokens=tokens, model=model, train={"steps": 1})
    found = build_estimator(config, ZooSummary.of(zoo, config)).generation_flops()
    generator = Generator.from_pretrained(train(config, say=lambda _: None))
    layout, network = generator.layout, generator.network
    asked = None if condition == "none" else torch.ones(1, 3)
    with count_flops() as known:
        network.known(network.state.weight[:1], asked, torch.arange(layout.num_tokens))
    with count_flops() as directions:
        for _ in layout.expand(torch.zeros(layout.num_tokens, 4), 0, layout.num_tokens):
            pass
    assert found.known == known.get_total_flops() > 0
    assert found.directions == directions.get_total_flops() == 2 * layout.cut.num_tokens * 4 * 16
    length, steps = layout.num_tokens, config.generate.steps
    both = found.known + found.directions
    assert found.total == found.backbone + length * (found.once + steps * found.step) + both
    assert build_estimator(config, ZooSummary.of(zoo, config)).bytes_read_per_step == 0


def test_what_is_measured_of_a_zoo_has_the_planned_size(tmp_path):
    make_zoo(tmp_path / "zoo", num=8, condition_size=3)
    model = {"state": {"of": "code", "width": 5}, "condition": {"kind": "binary"}}
    config = small_config(tmp_path, tokens={"rank": 4, "centre": "condition"}, model=model, train={"steps": 1})
    planned = build_estimator(config, find_zoo_summary(config)).meta_network()
    fitted = Generator.from_pretrained(train(config, say=lambda _: None)).network
    sizes = [{name: each.shape for name, each in network.named_buffers()} for network in (planned, fitted)]
    assert sizes[0] == sizes[1]


def test_real_operations_are_counted_as_fake_ones():
    network = nn.LSTM(8, 6, batch_first=True)
    with count_flops() as counter:
        network(torch.zeros(3, 5, 8))[0].sum().backward()
    assert counter.get_total_flops() == 3 * 8 * 3 * 5 * 6 * (8 + 6)


def test_a_timm_network_needs_no_zoo(tmp_path):
    config = Config.load(default_config("large/convnext_atto.yaml"), [f"zoo={tmp_path / 'none'}"])
    by_name, by_task = find_zoo_summary(config, network="resnet18", num_checkpoints=7), find_zoo_summary(config)
    assert by_name.layout.num_values == 11_699_112 and by_name.num_states == 7
    assert by_task.layout.num_values == 3_695_520 and by_task.num_states == 50
    plan = make_plan(config, by_task)
    assert sum(plan.parameters.values()) * 4 == plan.training.gradients
    host = plan.training.waiting + plan.training.cache + plan.training.fitting + plan.training.libraries
    assert plan.training.on_device == sum(plan.training.components().values()) - host
    halves = make_plan(config, by_task, num_processes=2).training
    assert halves.batch < plan.training.batch and halves.optimizer == plan.training.optimizer


@pytest.mark.slow
def test_our_recipe_costs_twenty_thousand_times_less_and_is_smaller_than_its_network(tmp_path):
    flops = {}
    for kind in ("large", "paper"):
        config = Config.load(default_config(f"{kind}/convnext_large.yaml"), [f"zoo={tmp_path / 'none'}"])
        found = find_zoo_summary(config)
        flops[kind] = build_estimator(config, found).generation_flops().total
        if kind == "large":
            plan = make_plan(config, found)
            assert sum(plan.parameters.values()) <= 197_767_336 == found.layout.num_values
            assert build_estimator(config, found).rows_per_step >= 2048 and plan.training.total <= 24e9
    assert flops["paper"] >= 20_000 * flops["large"]


LARGE = [path for path in configurations(default_config("large")) if path.stem not in ("base", "convnext_large")]
QUICK = ("vit_base", "segformer_ade20k")
"""One network of each kind of task; the largest is planned above."""


@pytest.mark.parametrize(
    "path", [pytest.param(each, id=each.stem, marks=() if each.stem in QUICK else pytest.mark.slow) for each in LARGE]
)
def test_every_large_network_is_planned_without_its_zoo(tmp_path, path):
    config = Config.load(path, [f"zoo={tmp_path / 'none'}"])
    plan = make_plan(config, find_zoo_summary(config))
    assert plan.estimator.zoo.layout.token_size == config.tokens.rank == 8 and plan.estimator.zoo.num_states == 50
    assert sum(plan.parameters.values()) < plan.estimator.zoo.layout.num_values
    assert plan.generation_flops.directions >= 2 * 8 * plan.estimator.zoo.layout.num_values


def test_moments_of_eight_bits(tmp_path):
    wide = [f"zoo={tmp_path / 'none'}", "model.denoiser.width=1024", "model.denoiser.hidden=2048"]
    config = Config.load(default_config("large/convnext_atto.yaml"), wide)
    small = Config.load(default_config("large/convnext_atto.yaml"), [*wide, "train.optimizer=adamw8bit"])
    zoo = find_zoo_summary(config)
    full, eighth = (build_estimator(each, zoo).training_memory().optimizer for each in (config, small))
    assert 0.25 < eighth / full < 0.26


@pytest.mark.parametrize(
    ("arguments", "changes", "expected"),
    [
        ({}, {}, "no zoo"),
        ({"network": "resnet19"}, {}, "a timm model"),
        ({"network": "resnet18"}, {"model": {"condition": {"kind": "binary"}}}, "--condition-size"),
    ],
)
def test_what_is_not_known_is_asked_for(tmp_path, arguments, changes, expected):
    with pytest.raises(InputError, match=expected):
        find_zoo_summary(config_of(tmp_path, **changes), **arguments)


def test_the_largest_network_fits_and_a_larger_one_does_not(tmp_path, zoo):
    config = config_of(tmp_path)
    memory = CUDA_BYTES + (16 << 20)
    largest = largest_network(config, zoo, memory)
    assert largest.num_bytes <= memory and largest.num_values == largest.num_tokens * D
    edge = largest_network(config, zoo, largest.num_bytes)
    assert edge.num_tokens == pytest.approx(largest.num_tokens, rel=0.02)
    assert largest_network(config, zoo, CUDA_BYTES).num_values == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * GIB), ("80", 80 * GIB), ("512MiB", 512 << 20), ("RTX4090", 24 * GIB)],
)
def test_memory_is_a_size_or_a_gpu(text, expected):
    assert parse_memory(text) == expected


def test_other_memory_is_refused():
    with pytest.raises(InputError, match="a100"):
        parse_memory("much")
