"""Mamba-2 backbone: the paper's, and the one for checkpoints of thousands of tokens.

A layer has the parameter names and shapes of ``mamba_ssm.Mamba2``, whose kernels it runs on CUDA where they are
installed; elsewhere it is plain PyTorch. Weights trained with one load into the other.
Shape letters: B examples, L tokens of a checkpoint, H model width; I inner width (expand · H), A heads, P width of
a head, S width of the state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.models.backbone import Backbone, BackboneSection
from rpg.packages import install_command


def chunked_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int) -> Tensor:
    """Compute y_i = c_i · h_i with the states h_i = exp(dt_i a) h_{i-1} + dt_i b_i x_iᵀ and h_{-1} = 0, per head.

    Decays, their logarithms and the states are fp32 under autocast too; the matrix products follow autocast.

    Args:
        x: inputs ``[B, L, A, P]``.
        dt: step sizes ``[B, L, A]``, positive, fp32.
        a: decay rates ``[A]``, negative, fp32.
        b: input projections ``[B, L, S]``.
        c: output projections ``[B, L, S]``.
        chunk_size: Q; any positive number gives the same result, and L need not be a multiple.

    Returns:
        ``[B, L, A, P]`` in fp32 (autocast's precision where both terms are products under autocast).
    """
    length, num_heads = x.shape[1:3]
    chunk_size = min(chunk_size, length)
    num_chunks = -(-length // chunk_size)
    padding = num_chunks * chunk_size - length
    if padding:
        # A padded token has dt = 0: it neither decays the state nor adds to it.
        x, dt, b, c = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, padding)) for t in (x, dt, b, c))
    x, dt, b, c = (rearrange(t, "b (k q) ... -> b k q ...", q=chunk_size) for t in (x, dt, b, c))
    log_decay = (dt * a).cumsum(dim=2)  # [B, K, Q, A]: since the start of the chunk

    y = _within_chunks(x * dt[..., None], log_decay, b, c)  # [B, K, Q, A, P]
    if num_chunks > 1:
        to_end = (log_decay[:, :, -1:] - log_decay).exp() * dt  # [B, K, Q, A]
        inputs = (x * to_end[..., None]).flatten(3)  # [B, K, Q, A·P]
        added = rearrange(b.mT @ inputs, "b k s (a p) -> b k s a p", a=num_heads)
        states = _before_chunks(added, log_decay[:, :, -1].exp())  # [B, K, S, A, P]
        carried = rearrange(c @ states.flatten(3), "b k q (a p) -> b k q a p", a=num_heads)
        y = torch.addcmul(y, carried, log_decay.exp()[..., None])  # [B, K, Q, A, P]
    return rearrange(y, "b k q a p -> b (k q) a p")[:, :length]


def _within_chunks(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What a chunk's own tokens contribute: attention with the decay as its mask.

    Takes ``[B, K, Q, A, P]`` (times dt), ``[B, K, Q, A]`` and twice ``[B, K, Q, S]``; returns ``[B, K, Q, A, P]``.
    """
    scores = c @ b.mT  # [B, K, Q, Q]
    log_decay = rearrange(log_decay, "b k q a -> b k a q")
    size = log_decay.shape[-1]
    future = torch.full((size, size), -torch.inf, device=x.device).triu(1)  # [Q, Q]
    decay = (log_decay[..., :, None] - log_decay[..., None, :]).add_(future).exp_()  # [B, K, A, Q, Q]
    y = (scores[:, :, None] * decay) @ rearrange(x, "b k q a p -> b k a q p")
    return rearrange(y, "b k a q p -> b k q a p")


def _before_chunks(added: Tensor, decay: Tensor) -> Tensor:
    """The state before each chunk, from what each adds ``[B, K, S, A, P]`` and its decay ``[B, K, A]``."""
    state = torch.zeros_like(added[:, 0], dtype=torch.float32)  # [B, S, A, P]
    states = [state]
    for addend, factor in zip(added[:, :-1].unbind(1), decay[:, :-1].unbind(1), strict=True):
        state = torch.addcmul(addend, state, factor[:, None, :, None])  # [B, S, A, P]
        states.append(state)
    return torch.stack(states, dim=1)  # [B, K, S, A, P]


class Mamba2Config(BackboneSection):
    """A stack of Mamba-2 layers. The paper's is plain: ``residual`` and ``norm`` false."""

    kind: Literal["mamba2"] = "mamba2"
    num_layers: int = Field(2, ge=1, description="Number of Mamba-2 layers.")
    widths: tuple[int, ...] | None = Field(
        None,
        description="Width of every layer where they differ, joined by linear layers; d_model is the first and "
        "num_layers their number. The last is the width of the prototypes.",
    )
    d_state: int = Field(128, ge=1, description="Width of the state of a head.")
    d_conv: int = Field(4, ge=1, description="Width of the causal convolution before the recurrence.")
    expand: int = Field(2, ge=1, description="Inner width of a layer, in multiples of its width.")
    headdim: int = Field(64, ge=1, description="Width of a head; must divide the inner width.")
    chunk_size: int = Field(64, ge=1, description="Tokens the recurrence takes at once; no effect on the result.")
    residual: bool = Field(True, description="Add the input of every layer to its output.")
    norm: bool = Field(True, description="Normalise the input of every layer (RMS norm).")

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Width of every layer."""
        return self.widths or (self.d_model,) * self.num_layers

    @property
    def d_output(self) -> int:
        """Width of the prototypes the backbone writes."""
        return self.layer_widths[-1]

    @model_validator(mode="after")
    def _widths_agree(self) -> Mamba2Config:
        widths = self.layer_widths
        if (len(widths), widths[0]) != (self.num_layers, self.d_model):
            raise ValueError(
                f"widths {list(widths)} must be num_layers, {self.num_layers}, widths of which the first is d_model, "
                f"{self.d_model}"
            )
        for width in widths:
            if width < 1 or self.expand * width % self.headdim:
                raise ValueError(f"headdim {self.headdim} must divide expand times the width, {self.expand * width}")
        return self


@functools.cache
def fused_scan() -> Callable[..., Tensor] | None:
    """The kernel of ``mamba_ssm`` for a whole layer, or None where it (or the convolution it needs) is missing."""
    try:
        import causal_conv1d  # noqa: F401
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
    except ImportError:
        return None
    return mamba_split_conv1d_scan_combined


class Mamba2(nn.Module):
    """One Mamba-2 layer (arXiv 2405.21060): projection, causal convolution, state-space recurrence, gate.

    Its sizes are those of `Mamba2Config`.
    """

    def __init__(
        self, d_model: int, *, d_state: int = 128, d_conv: int = 4, expand: int = 2, headdim: int = 64,
        chunk_size: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.headdim = headdim
        self.chunk_size = chunk_size
        self.num_heads = self.d_inner // headdim
        self.d_xbc = self.d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_xbc + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(self.d_xbc, self.d_xbc, d_conv, groups=self.d_xbc, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as ``mamba_ssm.Mamba2`` does: decay rates in 1 … 16, step sizes log-uniform in 0.001 … 0.1."""
        for module in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            module.reset_parameters()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()  # [A]
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
        self.D.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, H]`` to ``[B, L, H]``; output i depends on the inputs up to i only."""
        zxbcdt = self.in_proj(x)  # [B, L, 2I + 2S + A]
        a = -self.A_log.float().exp()  # [A]
        kernel = self.kernel(zxbcdt.device)
        if kernel is not None:
            return self._forward_fused(kernel, zxbcdt, a)
        z, xbc, dt = zxbcdt.split([self.d_inner, self.d_xbc, self.num_heads], dim=-1)
        xbc = self.conv1d(rearrange(xbc, "b l i -> b i l"))[..., : x.shape[1]]
        xbc = rearrange(F.silu(xbc), "b i l -> b l i").float()  # [B, L, I + 2S]
        inner, b, c = xbc.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        inner = rearrange(inner, "b l (a p) -> b l a p", p=self.headdim)
        dt = F.softplus(dt.float() + self.dt_bias.float())  # [B, L, A]
        y = chunked_scan(inner, dt, a, b, c, self.chunk_size)  # [B, L, A, P]
        y = torch.addcmul(y, inner, self.D[:, None]).flatten(2)  # [B, L, I]
        # Not self.norm(…): an fp32 input with bf16 parameters would miss the fused implementation.
        y = F.rms_norm(y * F.silu(z), (self.d_inner,), self.norm.weight.float(), self.norm.eps)  # [B, L, I]
        return self.out_proj(y.to(z.dtype))  # [B, L, H]

    def kernel(self, device: torch.device) -> Callable[..., Tensor] | None:
        """The kernel that computes this layer on ``device``; None: plain PyTorch does."""
        # The convolution's kernel wants rows of a multiple of eight values and a width of two to four.
        fits = self.in_proj.out_features % 8 == 0 and self.conv1d.kernel_size[0] in (2, 3, 4)
        return fused_scan() if device.type == "cuda" and fits else None

    def _forward_fused(self, kernel: Callable[..., Tensor], zxbcdt: Tensor, a: Tensor) -> Tensor:
        """The same by the kernels of ``mamba_ssm``: ``[B, L, 2I + 2S + A]`` and ``[A]`` to ``[B, L, H]``."""
        # The kernels need a chunk of a power of two of at least 16; 256 is what they are tuned for.
        return kernel(
            zxbcdt, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, a, D=self.D, chunk_size=256,
            activation="silu", rmsnorm_weight=self.norm.weight, rmsnorm_eps=self.norm.eps,
            outproj_weight=self.out_proj.weight, outproj_bias=None, headdim=self.headdim, ngroups=1,
            norm_before_gate=False,
        )  # fmt: skip


class Mamba2Layer(nn.Module):
    """A Mamba-2 layer, optionally with RMS norm before it and a residual connection around it."""

    def __init__(self, mixer: Mamba2, d_model: int, residual: bool, norm: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5) if norm else nn.Identity()
        self.mixer = mixer
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, H]`` to ``[B, L, H]``."""
        y = self.mixer(self.norm(x))  # [B, L, H]
        return x + y if self.residual else y  # [B, L, H]


class Mamba2Backbone(Backbone):
    """Prototypes from Mamba-2 layers that read the positions in the checkpoint's order."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        sizes = {name: getattr(config, name) for name in ("d_state", "d_conv", "expand", "headdim", "chunk_size")}
        self.layers = nn.ModuleList(
            Mamba2Layer(Mamba2(width, **sizes), width, config.residual, config.norm) for width in config.layer_widths
        )
        # joints[i] leads from layer i to layer i + 1.
        self.joints = nn.ModuleList(
            nn.Identity() if width == following else nn.Linear(width, following)
            for width, following in pairwise(config.layer_widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, L, d_model]`` to ``[B, L, d_output]``."""
        for index, layer in enumerate(self.layers):
            if index:
                x = self.joints[index - 1](x)  # [B, L, H of the layer]
            x = self.run_layer(layer, x)  # [B, L, H of the layer]
        return x


def describe_kernels(network: nn.Module, device: torch.device) -> str | None:
    """How the Mamba-2 layers of a network are computed on ``device``, as one line; None where it has none."""
    layers = [module for module in network.modules() if isinstance(module, Mamba2)]
    if not layers:
        return None
    if all(layer.kernel(device) for layer in layers):
        return "Mamba-2 layers run on the kernels of mamba_ssm"
    missing = device.type == "cuda" and fused_scan() is None
    cure = f"; faster after {install_command('mamba-ssm', 'causal-conv1d')}" if missing else ""
    return f"Mamba-2 layers run in plain PyTorch{cure}"
