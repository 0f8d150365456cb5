from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rpg.generation.generator import Generator
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.seeding import make_rng
from rpg.tasks import DigitsConfig, build_task
from rpg.training.loop import train
from rpg.training.losses import NewStatesConfig, NewStatesLoss
from tests.conftest import small_config
from tokenization.errors import InputError


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    task = DigitsConfig(network="mlp-mini", train_steps=40, steps=6, batch_size=32)
    build_task(task).collect(folder / "zoo")
    model = {
        "state": {"of": "checkpoint"},
        "backbone": {"kind": "lstm", "d_model": 32, "num_layers": 1},
        "denoiser": {"kind": "mlp", "width": 32, "hidden": 32, "depth": 1},
    }

    def config(name: str = "run", **sections):
        train = {"steps": 6, "new_states": {"networks": 2, "images": 16, "start": 0.5}, **sections.pop("train", {})}
        base = {"task": task.model_dump(), "tokens": {"size": 128}, "model": model, "run": str(folder / name)}
        return small_config(folder, train=train, **{**base, **sections})

    return config


def test_states_are_wider_by_their_temperature_and_have_the_tables_covariance():
    network = RecurrentDiffusion(small_config_model(), torch.tensor([[0, 0], [0, 1]]), 4, num_states=6)
    loss = NewStatesLoss.__new__(NewStatesLoss)
    loss.network = network
    rng = torch.Generator().manual_seed(0)
    drawn = loss.states(torch.full((40_000,), 3.0), rng)
    table = network.state.weight.detach()
    assert torch.allclose(drawn.mean(0), table.mean(0), atol=0.06)
    expected = 9 * torch.cov(table.T, correction=0)
    assert torch.allclose(torch.cov(drawn.T), expected, atol=0.4)


def small_config_model():
    from rpg.models.recurrent_diffusion import RecurrentConfig, StateConfig

    return RecurrentConfig(state=StateConfig(of="checkpoint", width=3))


def test_the_loss_is_cross_entropy_plus_spread(setting):
    config = setting("loss")
    generator = Generator.from_pretrained(train(config))
    task = build_task(config.task)
    loss = NewStatesLoss(
        generator.network, task, generator.layout, NewStatesConfig(networks=3, images=20, temperature=1)
    )
    value = loss(torch.Generator().manual_seed(2))
    rng = torch.Generator().manual_seed(2)
    torch.rand(3, generator=rng)
    noise = torch.randn(3, *loss.mask.shape, generator=rng)
    tokens = loss.network.one_step(noise, loss.mask, loss.states(torch.ones(3), rng))
    rows = torch.randint(len(loss.labels), (20,), generator=rng)
    network, losses, sizes = task.build().eval(), [], []
    for each in tokens:
        network.load_state_dict(generator.layout.decode(each))
        losses.append(torch.nn.functional.cross_entropy(network(loss.images[rows]), loss.labels[rows]))
        apart = (each - tokens.mean(0))[generator.layout.mask].square().mean() * 3 / 2
        sizes.append(apart.sqrt())
    spread = (1 - torch.stack(sizes)).clamp(min=0).square().mean()
    assert torch.allclose(value, torch.stack(losses).mean() + spread, atol=1e-4)


def test_one_step_is_what_generation_does_in_one_step(setting):
    generator = Generator.from_pretrained(train(setting("step", generate={"steps": 1, "tile_tokens": 512})))
    loss = NewStatesLoss(generator.network, build_task(generator.config.task), generator.layout, NewStatesConfig())
    sampler, request = generator.sampler(), generator.request(1)
    ((tile, rows),) = sampler.sample(request)
    num_tokens, width = loss.mask.shape
    group = max(1, sampler.tile_tokens // num_tokens)
    noise = torch.randn(group, num_tokens, width, generator=make_rng(0, "tile", tile.network, tile.token))[:1]
    tokens = loss.network.one_step(noise, loss.mask, sampler.states.draw(request.state, 0, [0], request.temperature))
    torch.testing.assert_close(tokens, rows)
    assert (tokens[:, ~generator.layout.mask] == 0).all()


def test_it_changes_training_from_its_start_on_and_resumes_exactly(setting):
    with_it, without = train(setting("with")), train(setting("without", train={"new_states": None}))
    weights = [load_file(folder / "model.safetensors") for folder in (with_it, without)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    config = setting("parts")
    train(config, max_seconds=0, say=lambda _: None)
    resumed = load_file(train(config, resume=True) / "model.safetensors")
    assert all(torch.equal(resumed[name], weights[0][name]) for name in resumed)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"state": {"of": "none"}}}, "two or more"),
        ({"tokens": {"size": 128, "normalization": "layer"}}, "normalization: residual"),
        ({"model": {"state": {"of": "checkpoint"}, "denoiser": {"kind": "unet1d"}}}, "batch normalisation"),
    ],
)
def test_settings_that_do_not_go_with_it_are_named(setting, sections, message):
    with pytest.raises(InputError, match=message):
        train(setting("wrong", **sections), overwrite=True)


def test_temperature_widens_generated_networks(setting):
    folder = train(setting("wide", generate={"state": "gaussian", "steps": 1}))
    generator = Generator.from_pretrained(folder)
    spreads = []
    for temperature in (0.5, 8.0):
        generator.config = generator.config.model_copy(
            update={"generate": generator.config.generate.model_copy(update={"temperature": temperature})}
        )
        networks = generator.generate(8, seed=1)
        spreads.append(float(torch.stack([network["linear1.weight"] for network in networks]).std(0).mean()))
    assert spreads[1] > spreads[0]
