"""FLOPs of denoisers in closed form, beside which tests hold what is counted."""

from itertools import pairwise
from typing import Any

from rpg.models.denoiser import JointConfig
from rpg.models.unet1d import UNet1dConfig


def flops_per_token(denoiser: Any) -> int:
    """Of one forward call per token, less what is computed once per prototype or per step."""
    config = denoiser.config
    if isinstance(config, UNet1dConfig):
        pairs = sum(c_in * c_out for c_in, c_out in pairwise(config.channels))
        return 2 * config.kernel_size * denoiser.token_size * pairs
    flops = 2 * config.width * (2 * denoiser.token_size + 2 * config.hidden * config.depth)
    if isinstance(config, JointConfig):
        flops += config.depth * (8 * config.width**2 + 4 * denoiser.num_tokens * config.width)
    return flops
