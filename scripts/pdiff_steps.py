"""What the number of diffusion steps T does to p-diff's latents: a run's denoiser, trained anew for each T and seed.

Along the direction in which the zoo's latents vary most, their variance is many times that of the noise. Where the last
noise level still holds some of that signal, sampling from noise alone starts in the middle, and stays there, also
with an exact denoiser.

python scripts/pdiff_steps.py RUN [--steps 10 100 1000 2000] [--seeds 3] [--training 1000]
"""

from __future__ import annotations

import torch
from _common import Parser, run_command

from rpg.diffusion.objectives import DDPMConfig
from rpg.generation.generator import Generator
from rpg.generation.pdiff_sampler import flatten_tokens
from rpg.models.pdiff import ParameterDiffusion
from rpg.tasks.schedule import cosine_decay
from rpg.training.data import training_entries
from tokenization.zoo.zoo import Zoo

DRAWN = 64
"""Latents that are sampled of each denoiser."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run of p-diff")
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 100, 1000, 2000], metavar="T")
    parser.add_argument("--seeds", type=int, default=3, help="denoisers of each T")
    parser.add_argument("--training", type=int, default=1000, help="optimizer steps of each")
    arguments = parser.parse_args()
    generator = Generator.from_pretrained(arguments.run)
    config, layout, trained = generator.config, generator.layout, generator.network
    assert isinstance(trained, ParameterDiffusion)
    zoo = Zoo.open(config.zoo)
    entries = training_entries(zoo, config.train.splits)
    values = torch.stack([flatten_tokens(layout, layout.encode(zoo.checkpoint(i))) for i in entries])
    latents = (trained.encode(values)[0] - trained.latent_mean) / trained.latent_std  # [K, Z]
    directions = torch.linalg.svd(latents - latents.mean(0), full_matrices=False).Vh  # [K, Z]
    shares = (latents @ directions.T).var(0, correction=0)
    print(
        f"{len(entries)} latents of {latents.shape[1]}: the first direction has {shares[0] / shares.sum():.0%} of their"
    )
    print(f"variance, {shares[0]:.1f} times that of the noise.\n")
    print("| T | signal left of it at T, over the noise | spread, generated over zoo: exact denoiser | by seed |")
    print("| --- | --- | --- | --- |")
    for num_steps in arguments.steps:
        found = []
        for seed in range(arguments.seeds):
            network = denoiser(trained, latents, num_steps, arguments.training, seed)
            drawn = sample(network, num_steps, seed)
            found.append(float(((drawn @ directions[0]).var() / shares[0]).sqrt()))
        left, exact = linear_chain(num_steps, float(shares[0]))
        spreads = ", ".join(f"{each:.2f}" for each in found)
        print(f"| {num_steps} | {left:.2f} | {exact:.2f} | {spreads} |", flush=True)


def linear_chain(num_steps: int, variance: float) -> tuple[float, float]:
    """What the best denoiser of a Gaussian of ``variance`` makes of unit noise: the signal over the noise at T, and the
    standard deviation of the samples over the Gaussian's own."""
    betas = torch.linspace(DDPMConfig().beta_start, DDPMConfig().beta_end, num_steps, dtype=torch.float64)
    kept, sampled = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)]), torch.tensor(1.0)
    for step in range(num_steps, 0, -1):
        beta, after, before = betas[step - 1], kept[step], kept[step - 1]
        slope = (1 - beta / (after * variance + 1 - after)) / (1 - beta).sqrt()
        sampled = slope.square() * sampled + beta * (1 - before) / (1 - after)
    return float((kept[-1] * variance).sqrt()), float((sampled / variance).sqrt())


def denoiser(
    trained: ParameterDiffusion, latents: torch.Tensor, num_steps: int, training: int, seed: int
) -> ParameterDiffusion:
    """A denoiser of standardised latents ``[K, Z]``."""
    torch.manual_seed(seed)
    diffusion = DDPMConfig(num_steps=num_steps)
    network = ParameterDiffusion(trained.config.model_copy(update={"diffusion": diffusion}), num_values=1)
    stage = trained.config.latent
    optimizer = torch.optim.AdamW(network.denoiser.parameters(), lr=stage.learning_rate, fused=True)
    for step in range(training):
        optimizer.param_groups[0]["lr"] = stage.learning_rate * cosine_decay(step, training)
        rows = latents[torch.randint(len(latents), (stage.batch_size,))]
        time = network.objective.sample_time(len(rows), None)
        network.diffusion_loss(rows, torch.randn_like(rows), time).backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.eval().requires_grad_(False)


def sample(network: ParameterDiffusion, num_steps: int, seed: int) -> torch.Tensor:
    """Standardised latents ``[DRAWN, Z]`` by ancestral sampling with all steps."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(DRAWN, network.config.latent_size, generator=rng)
    return network.objective.sample(
        lambda x, time: network.denoiser(x, time.expand(len(x))),
        noise,
        sampler="ddpm",
        num_steps=num_steps,
        generator=rng,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_command(main)
