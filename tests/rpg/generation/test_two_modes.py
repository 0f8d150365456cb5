"""A planted family whose requests leave two opposite networks possible: the exact posterior and its score are known."""

from __future__ import annotations

import math

import pytest
import torch

from rpg.evaluation.two_sample import joint_score
from rpg.generation.generator import Generator
from rpg.training.loop import train
from tests.conftest import small_config
from tokenization.zoo.zoo import ConditionSpec, Zoo

SHARPNESS, NUM_DRAWS, NUM_EXAMPLES = 4.0, 32, 100


def planted(angle: torch.Tensor, sign: torch.Tensor) -> dict[str, torch.Tensor]:
    """Answers 1 where a point lies on the side that the request's line and an untold sign say."""
    side = SHARPNESS * sign * torch.stack([angle.cos(), angle.sin()])
    return {"weight": torch.stack([torch.zeros(2), side])}


def joint(networks: list[dict[str, torch.Tensor]], right: dict[str, torch.Tensor], points: torch.Tensor) -> float:
    weights = torch.stack([each["weight"] for each in networks]).double()
    answers = (points @ right["weight"].double().T).argmax(-1)
    log_p = torch.einsum("mki,bi->mbk", weights, points).log_softmax(-1)
    return joint_score(log_p[:, torch.arange(len(points)), answers][None]).item()


@pytest.mark.slow
def test_diffusion_scores_as_the_exact_posterior_where_one_network_cannot(tmp_path):
    rng = torch.Generator().manual_seed(0)
    zoo = Zoo.create(tmp_path / "zoo", condition=ConditionSpec("vector", 2))
    for index in range(200):
        angle, sign = torch.rand((), generator=rng) * math.pi, 1.0 - 2 * (index % 2)
        request = (math.cos(2 * angle), math.sin(2 * angle))  # of a line: it closes to a circle after half a turn
        zoo.append(planted(angle, torch.tensor(sign)), run=index, step=0, condition=request)
    prior = {"width": 48, "depth": 2, "dropout": 0.0, "batch_size": 96, "steps": 12}
    config = small_config(
        tmp_path,
        tokens={"normalization": "residual"},
        model={"state": {"of": "code", "width": 2, "prior": prior}, "condition": {"kind": "vector"}},
        train={"steps": 250, "learning_rate": 3e-3, "warmup_steps": 20, "ema_decay": 0.98, "save_every": 250},
        generate={"state": "prior", "steps": 1},
    )
    generator = Generator.from_pretrained(train(config, say=lambda _: None))
    scores: dict[str, list[float]] = {"diffusion": [], "exact": [], "average": [], "one": []}
    for number in range(10):
        angle = torch.rand((), generator=rng) * math.pi
        points = torch.randn(NUM_EXAMPLES, 2, generator=rng, dtype=torch.float64)
        right, opposite = planted(angle, torch.tensor(1.0)), planted(angle, torch.tensor(-1.0))
        request = [math.cos(2 * angle), math.sin(2 * angle)]
        drawn = generator.generate(NUM_DRAWS, seed=number, condition=request)
        scores["diffusion"].append(joint(drawn, right, points))
        scores["exact"].append(joint([right, opposite], right, points))
        scores["average"].append(joint([{"weight": torch.zeros(2, 2)}], right, points))
        # Whoever names one network without the sign is right half the time.
        scores["one"].append((joint([right], right, points) + joint([opposite], right, points)) / 2)
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    assert mean["exact"] < 0.25
    assert mean["diffusion"] < mean["exact"] + 0.05, mean
    assert min(mean["average"], mean["one"]) > mean["exact"] + 0.4, mean
