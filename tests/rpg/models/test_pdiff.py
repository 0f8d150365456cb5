from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file

from rpg.config import Config, TrainConfig
from rpg.generation.generator import Generator
from rpg.generation.sampler import GROUP
from rpg.models.pdiff import (
    ConvDecoder,
    ConvEncoder,
    LatentDenoiser,
    ParameterDiffusion,
    PDiffConfig,
    flatten_tokens,
    unflatten_values,
)
from rpg.training.loop import train
from rpg.training.run_folder import RunFolder
from tests.conftest import make_zoo, small_config
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout, TokenOptions

SMALL = {"latent_size": 6, "channels": (2, 3, 4, 4, 4), "kernel_size": 3, "denoiser_channels": (4, 4, 4, 4, 4)}
STAGES = {
    "autoencoder": {"steps": 7, "learning_rate": 1e-2, "batch_size": 4},
    "latent": {"steps": 6, "learning_rate": 1e-2, "batch_size": 4},
}


def pdiff_config(folder, **sections) -> Config:
    model = {"kind": "pdiff", **SMALL, **STAGES, **sections.pop("model", {})}
    tokens = {"size": 16, "flatten": "flat", **sections.pop("tokens", {})}
    generate = {"steps": 5, "sampler": "ddim"}
    defaults = TrainConfig().model_dump(include={"steps", "batch_size", "warmup_steps"})
    sections["train"] = {**defaults, **sections.get("train", {})}
    return small_config(folder, model=model, tokens=tokens, generate=generate, **sections)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 500])
def test_networks_keep_any_length(size):
    encoder = ConvEncoder(size, 6, (2, 3, 4, 4, 4), 5, 2)
    decoder = ConvDecoder(size, 6, (2, 3, 4, 4, 4), 5, 2)
    assert decoder(encoder(torch.randn(2, size))).shape == (2, size)
    assert LatentDenoiser(size, (4, 4, 4, 4, 4), 3)(torch.randn(2, size), torch.tensor([0.0, 999.0])).shape == (2, size)


def test_flat_values_and_tokens_are_inverse(zoo):
    layout = TokenLayout.fit(zoo, TokenOptions(size=16, flatten="layer"))
    tokens = layout.encode(zoo.checkpoint(0))
    values = flatten_tokens(layout, tokens)
    assert values.shape == (layout.num_values,) and layout.padding_share > 0
    assert torch.equal(unflatten_values(layout, values), tokens)


def test_losses_are_what_the_paper_writes():
    torch.manual_seed(0)
    network = ParameterDiffusion(PDiffConfig(**SMALL, parameter_noise=0.5, latent_noise=0.25), num_values=40)
    v, xi_v, xi_z = torch.randn(3, 40), torch.randn(3, 40), torch.randn(3, 6)
    z = network.encoder(v + 0.5 * xi_v)
    expected = (network.decoder(z + 0.25 * xi_z) - v).square().mean()  # equation 5
    assert torch.allclose(network.autoencoder_loss(v, xi_v, xi_z), expected)

    latents = 7 + 3 * torch.randn(50, 6)
    network.measure_latents(latents)
    noise, time = torch.randn(50, 6), torch.randint(1000, (50,))
    standard = (latents - latents.mean(0)) / latents.std(0, correction=0)
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000), 0)[time, None]
    predicted = network.denoiser(alpha.sqrt() * standard + (1 - alpha).sqrt() * noise, time)
    assert torch.allclose(network.diffusion_loss(latents, noise, time), (noise - predicted).square().mean(), atol=1e-5)
    assert torch.allclose(network.decode_standardised(standard), network.decoder(latents), atol=1e-5)


def test_variational_loss_is_the_negative_evidence_bound():
    torch.manual_seed(0)
    network = ParameterDiffusion(PDiffConfig(**SMALL, variational=True), num_values=40)
    v, noise = torch.randn(3, 40), torch.randn(3, 6)
    mean, log_variance = network.encode(v)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum(1)
    error = (network.decoder(mean + (log_variance / 2).exp() * noise) - v).square().sum(1)
    bound = -(divergence + error / 2).mean()
    assert torch.allclose(network.autoencoder_loss(v, torch.zeros(3, 40), noise), -2 * bound / 40)


def test_dead_latents_stay_dead():
    network = ParameterDiffusion(PDiffConfig(**SMALL), num_values=40)
    latents = torch.randn(20, 6)
    latents[:, 2] = 5.0
    network.measure_latents(latents)
    assert torch.isfinite((latents - network.latent_mean) / network.latent_std).all()
    assert network.latent_std[2] < 1e-5


@pytest.mark.parametrize("variational", [False, True])
def test_it_trains_saves_loads_and_generates(tmp_path, zoo, variational):
    config = pdiff_config(tmp_path, model={"variational": variational})
    folder = train(config)
    generator = Generator.from_pretrained(folder)
    networks = generator.generate(GROUP + 2, seed=3)
    assert all(torch.isfinite(value).all() for network in networks for value in network.values())
    assert torch.equal(generator.generate(1, seed=3)[0]["0.weight"], networks[0]["0.weight"])
    assert not torch.equal(networks[0]["0.weight"], networks[1]["0.weight"])
    paths = generator.generate(GROUP + 2, seed=3, output=tmp_path / "files")
    for path, network in zip(paths, networks, strict=True):
        stored = load_file(path)
        assert all(torch.equal(stored[name], network[name]) for name in network)
    assert "p-diff" in (folder / "README.md").read_text()


@pytest.mark.parametrize("stop", [3, 10])  # in the first stage, in the second
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, zoo, stop):
    whole = train(pdiff_config(tmp_path, run=str(tmp_path / "whole")))
    parts = pdiff_config(tmp_path, run=str(tmp_path / "parts"))

    def interrupt(done: int, total: int, loss: float) -> None:
        if done == stop - 1:
            signal.raise_signal(signal.SIGTERM)

    train(parts, progress=interrupt, say=lambda _: None)
    assert RunFolder(parts.run).steps()[0][0] == stop
    resumed = train(parts, resume=True)
    first, second = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_autoencoder_learns_a_low_dimensional_zoo(tmp_path):
    make_zoo(tmp_path / "zoo", num=12)
    stages = {
        "autoencoder": {"steps": 120, "learning_rate": 1e-2, "batch_size": 12},
        "latent": {"steps": 1, "learning_rate": 1e-3},
    }
    pdiff = {**stages, "latent_size": 16, "channels": (8, 16, 32, 32, 32)}
    config = pdiff_config(tmp_path, model=pdiff, train={"log_every": 120})
    losses = []
    train(config, progress=lambda done, total, loss: losses.append(loss))
    assert losses[0] < 0.2  # the normalised values have mean square 1


def test_only_the_included_tensors_are_generated(tmp_path, zoo):
    config = pdiff_config(tmp_path, tokens={"include": ("1.weight", "1.bias")})
    generated = Generator.from_pretrained(train(config)).generate(1)[0]
    base = zoo.state_dict(0)
    assert generated.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], generated[name])}
    assert changed == {"1.weight", "1.bias"}


def test_a_condition_is_the_users_mistake(tmp_path):
    make_zoo(tmp_path / "zoo", condition_size=2)
    with pytest.raises(InputError, match="condition.*an unknown key"):
        train(pdiff_config(tmp_path, model={"condition": {"kind": "binary"}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 5}, {"batch_size": 2}, {"learning_rate": 1e-4}, {"betas": (0.9, 0.999)}, {"weight_decay": 0.0},
        {"warmup_steps": 1}, {"tokens": 3}, {"optimizer": "adamw8bit"}, {"new_states": {}}, {"behaviour": {}},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_what_has_no_effect_is_refused(tmp_path, changes):
    make_zoo(tmp_path / "zoo")
    with pytest.raises(InputError, match=rf"train\.{next(iter(changes))} has no effect on p-diff"):
        train(pdiff_config(tmp_path, train=changes))
    assert not (tmp_path / "run").exists()


def test_its_data_are_those_of_the_splits(tmp_path):
    zoo = make_zoo(tmp_path / "zoo")
    zoo.append(zoo.state_dict(0), run=0, step=99, split="validation")
    for splits in (["train"], ["train", "validation"]):
        config = pdiff_config(tmp_path, train={"splits": splits}, run=str(tmp_path / "-".join(splits)))
        folder = train(config)
        count = len(zoo.subset("train")) + len(splits) - 1
        assert f"| training checkpoints | {count} |" in (folder / "README.md").read_text()
