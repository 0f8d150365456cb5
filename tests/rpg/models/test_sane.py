from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from rpg.config import Config
from rpg.experiments.evaluating import evaluate_run
from rpg.generation.generator import Generator
from rpg.generation.sampler import GROUP
from rpg.labs.sane.model import SaneConfig, TokenAutoencoder, nt_xent
from rpg.planning.plan import make_plan
from rpg.planning.zoo_summary import ZooSummary
from rpg.tasks import build_task
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tokenization.errors import InputError

SMALL = {"kind": "sane", "code_size": 4, "d_model": 16, "num_layers": 1, "num_heads": 2}


def sane_config(folder, **sections) -> Config:
    return small_config(folder, **{**sections, "model": {**SMALL, **sections.pop("model", {})}})


def small_autoencoder(**changes) -> TokenAutoencoder:
    torch.manual_seed(0)
    positions = torch.tensor([[0, 0], [0, 1], [1, 0]])
    return TokenAutoencoder(SaneConfig(**{**SMALL, **changes}), positions, token_size=5)


def test_nt_xent_is_the_cross_entropy_of_finding_the_other_view():
    torch.manual_seed(0)
    views = F.normalize(torch.randn(6, 4), dim=1)
    expected = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        logits = torch.stack([views[i] @ views[j] / 0.5 for j in others])
        expected.append(logits.logsumexp(0) - views[i] @ views[(i + 3) % 6] / 0.5)
    assert torch.allclose(nt_xent(views, 0.5), torch.stack(expected).mean())


def test_padding_is_not_reconstructed_and_views_differ_by_noise():
    network = small_autoencoder(contrast=0, noise=0.5)
    tokens, noise = torch.randn(4, 3, 5), torch.randn(2, 4, 3, 5)
    mask = torch.ones(3, 5)
    mask[2, 3:] = 0
    tokens = tokens * mask
    rows = [network.decode(network.encode(tokens + 0.5 * each * mask)) for each in noise]
    errors = torch.stack([((row - tokens) * mask).square().sum() / (4 * 13) for row in rows])
    assert torch.allclose(network(tokens, mask, noise), errors[0])  # without contrast one view is enough
    network.config = network.config.model_copy(update={"contrast": 1e-9})
    assert torch.allclose(network(tokens, mask, noise), errors.mean())


def test_the_linear_path_keeps_what_layer_norms_lose():
    network, tokens = small_autoencoder(linear=True), torch.randn(2, 3, 5)
    with torch.no_grad():
        for layer in (network.code_projection, network.output_projection):
            layer.weight.zero_()
            layer.bias.zero_()
    codes = network.encode(tokens)
    assert torch.allclose(codes, F.linear(tokens, network.encoder_path.weight, network.encoder_path.bias))
    assert torch.allclose(
        network.decode(codes), F.linear(codes, network.decoder_path.weight, network.decoder_path.bias)
    )
    assert not any("path" in name for name in small_autoencoder().state_dict())


def test_codes_know_where_their_token_lies():
    network = small_autoencoder()
    codes = network.encode(torch.ones(1, 3, 5))[0]
    assert not torch.allclose(codes[0], codes[1]) and not torch.allclose(codes[1], codes[2])


@pytest.mark.parametrize(("draw", "mixed"), [("network", False), ("token", True), ("value", True)])
def test_draws_lie_around_anchors(draw, mixed):
    network = small_autoencoder(draw=draw, bandwidth=0.0)
    network.fill(anchors=torch.arange(10.0)[:, None, None].expand(10, 3, 4).clone())
    places, noise = torch.rand(200, 3, 4), torch.randn(200, 3, 4)
    codes = network.draw(places, noise)
    assert set(codes.flatten().tolist()) == set(range(10))
    assert bool((codes == codes[:, :1, :1]).all()) is not mixed
    assert bool((codes == codes[:, :, :1]).all()) is (draw != "value")
    network.config = network.config.model_copy(update={"bandwidth": 0.5})
    around = network.draw(places, noise) - codes
    assert torch.allclose(around, 0.5 * torch.arange(10.0).std(correction=0) * noise, atol=1e-5)


def test_it_trains_saves_loads_resumes_and_generates(tmp_path, zoo):
    folder = train(sane_config(tmp_path))
    generator = Generator.from_pretrained(folder)
    assert generator.network.anchors.shape[0] == len(zoo)
    networks = generator.generate(GROUP + 2, seed=3)
    assert all(torch.isfinite(value).all() for network in networks for value in network.values())
    assert torch.equal(generator.generate(1, seed=3)[0]["0.weight"], networks[0]["0.weight"])
    assert not torch.equal(networks[0]["0.weight"], networks[1]["0.weight"])
    paths = generator.generate(GROUP + 2, seed=3, output=tmp_path / "files")
    assert all(
        torch.equal(load_file(path)["0.weight"], each["0.weight"]) for path, each in zip(paths, networks, strict=True)
    )
    assert "SANE" in (folder / "README.md").read_text()
    parts = sane_config(tmp_path, run=str(tmp_path / "parts"))
    train(parts, max_seconds=0, say=lambda _: None)
    first, second = load_file(folder / "model.safetensors"), load_file(train(parts, resume=True) / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns_a_zoo_and_its_reconstructions_are_told_apart(tmp_path):
    zoo = make_zoo(tmp_path / "zoo", num=12)
    settings = {"steps": 200, "batch_size": 12, "log_every": 200, "ema_decay": 0.9}
    config = sane_config(tmp_path, model={"code_size": 8, "d_model": 32, "noise": 0.01}, train=settings)
    generator = Generator.from_pretrained(train(config))
    layout, network = generator.layout, generator.network
    tokens = torch.stack([layout.encode(zoo.checkpoint(i)) for i in range(12)])
    errors = torch.cdist((network.decode(network.anchors) * layout.mask).flatten(1), tokens.flatten(1))
    assert errors.argmin(1).tolist() == list(range(12))
    assert errors.diag().square().sum() < 0.3 * tokens.square().sum()


@pytest.mark.slow
def test_bootstrapping_keeps_what_scores_well(tmp_path):
    task = {"name": "digits", "network": "cnn", "runs": 2, "train_steps": 60, "steps": 4}
    settings = {"steps": 40, "batch_size": 8, "ema_decay": 0.9}
    few = {"num": 3, "num_baseline": 2, "noise": (0.1,), "baselines": ()}
    model = {"bandwidth": 0.5, "bootstrap": {"rounds": 2, "candidates": 12, "keep": 3, "split": "validation"}}
    config = sane_config(tmp_path, task=task, tokens={"size": 128}, train=settings, model=model, evaluate=few)
    scorer = build_task(config.task)
    scorer.collect(config.zoo)
    generator = Generator.from_pretrained(train(config))
    assert len(generator.network.anchors) == 3
    model = config.model.model_copy(update={"bootstrap": None})
    plain = config.model_copy(update={"model": model, "run": str(tmp_path / "plain")})
    others = Generator.from_pretrained(train(plain))
    assert len(others.network.anchors) == 8

    def score(made: Generator) -> torch.Tensor:
        decoded = [made.layout.decode(rows * made.layout.mask) for rows in made.network.decode(made.network.anchors)]
        labels = scorer.labels("validation")
        return torch.stack([F.cross_entropy(each, labels) for each in scorer.logits(decoded, "validation")])

    assert score(generator).max() <= score(others).sort().values[2] + 1e-5  # the best three and better ones
    assert evaluate_run(config.run).kinds["generated"].count == 3


def test_scores_need_a_task(tmp_path, zoo):
    with pytest.raises(InputError, match="neither|task"):
        train(sane_config(tmp_path, model={"best": 0.5}))


@pytest.mark.parametrize("changes", [{"tokens": 3}, {"behaviour": {}}, {"new_states": {}}])
def test_what_has_no_effect_is_refused(tmp_path, zoo, changes):
    with pytest.raises(InputError, match=rf"train\.{next(iter(changes))} has no effect on SANE"):
        train(sane_config(tmp_path, train=changes))


def test_its_needs_are_estimated(tmp_path, zoo):
    config = sane_config(tmp_path)
    plan = make_plan(config, ZooSummary.of(zoo, config))
    assert sum(plan.parameters.values()) > 0 and plan.training_flops > 0
    assert plan.training.total > 0 and plan.generation.total > plan.generation.weights
    assert plan.generation_flops.total > 0
