"""Hyper-representations (SANE, arXiv 2406.09997; before it 2209.14733): an autoencoder of a checkpoint's sequence of
tokens, and new networks from kernel density estimates of the training checkpoints' codes.

One transformer maps tokens, with their positions, to one short code a token, another maps codes back. It is trained to
reconstruct tokens, and by a contrastive loss (NT-Xent) that tells checkpoints apart by their codes' mean. New codes are
draws of Gaussian kernels around the codes of *anchors*: the training checkpoints, or the best of them, or what
bootstrapping made of those (`rpg.labs.sane.parts`).

Left out: windows of the sequence and their halos (a network's tokens are taken together, so that memory bounds it),
permutations of hidden units as augmentation (`rpg align` brings runs into one order beforehand), and the conditioning
of batch norm's statistics after generation. docs/ablations.md has what the first two cost. A linear path beside the
transformers (`SaneConfig.linear`) is not in the paper.

B examples, L tokens of a checkpoint, D token width, H model width, Z code width of a token, K anchors.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.models.backbone import build_backbone
from rpg.models.backbone.base import TransformerConfig
from rpg.models.centre import FittedBuffers, StateConfig
from rpg.models.conditioning import ConditionConfig, position_embedding
from rpg.section import Section
from tokenization.layouts import Layout


class BootstrapConfig(Section):
    """Refining the anchors: of networks drawn around them the best become the next anchors (2406.09997)."""

    rounds: int = Field(3, ge=1)
    candidates: int = Field(100, ge=1, description="networks drawn, and scored on the task's images, a round")
    keep: int = Field(30, ge=1, description="anchors after each round; those of the round before compete with them")
    split: str = Field("train", description="images that candidates are scored on")


class SaneConfig(Section):
    """The autoencoder of token sequences and how codes are drawn."""

    constants: ClassVar = {"contrast_temperature": 0.1}
    kind: Literal["sane"] = "sane"
    code_size: int = Field(32, ge=1, description="width Z of a token's code")
    d_model: int = Field(128, ge=2, description="width H of both transformers")
    num_layers: int = Field(2, ge=1, description="blocks of each transformer")
    num_heads: int = Field(4, ge=1, description="attention heads; must divide d_model")
    noise: float = Field(0.1, ge=0, description="added to tokens in training, in units of the normalised tokens")
    contrast: float = Field(
        0.05, ge=0, le=1, description="weight γ of the contrastive loss; the rest is reconstruction"
    )
    linear: bool = Field(
        False, description="a linear map of each token beside both transformers, whose layer norms lose its size"
    )
    draw: Literal["value", "token", "network"] = Field(
        "token",
        description="what is drawn around one anchor: each value of a code (2209.14733), each token's code "
        "(2406.09997), or all codes of a network",
    )
    bandwidth: float = Field(0.1, ge=0, description="of the kernels, in each code value's deviation over the anchors")
    best: float = Field(
        1.0, gt=0, le=1, description="share of the training checkpoints that are anchors, by their score"
    )
    bootstrap: BootstrapConfig | None = Field(
        None, description="refine the anchors by drawing and scoring; null: do not"
    )

    initial: ClassVar[None] = None
    normalises_batches: ClassVar[bool] = False  # the contrastive loss looks at the batch, but no statistics are kept
    condition: ClassVar = ConditionConfig()
    state: ClassVar = StateConfig(of="none")

    @property
    def description(self) -> str:
        """What the model is, for the model card."""
        drawn = f"{'bootstrapped ' if self.bootstrap else ''}kernel density of its codes, each {self.draw} by itself"
        return f"SANE (arXiv 2406.09997): autoencoder of token sequences, {drawn}."


class TokenAutoencoder(FittedBuffers):
    """Encoder, decoder and projection, and the anchors that new codes are drawn around.

    Args:
        config: sizes.
        positions: (layer, token in the layer) ``[L, 2]``.
        token_size: D.
    """

    anchors: Tensor  # [K, L, Z]; filled once the networks are trained

    samplers, num_states = ("kernel_density",), 1

    @classmethod
    def of_layout(cls, config: SaneConfig, layout: Layout, num_states: int, condition_size: int) -> Self:
        """Networks of a layout's sizes."""
        return cls(config, layout.positions.to(torch.get_default_device()), layout.token_size)

    def __init__(self, config: SaneConfig, positions: Tensor, token_size: int) -> None:
        super().__init__()
        self.config = config
        stack = TransformerConfig(
            d_model=config.d_model, num_layers=config.num_layers, num_heads=config.num_heads, causal=False
        )
        self.token_projection = nn.Linear(token_size, config.d_model)
        self.encoder = build_backbone(stack)
        self.code_projection = nn.Linear(config.d_model, config.code_size)
        self.decoder_projection = nn.Linear(config.code_size, config.d_model)
        self.decoder = build_backbone(stack)
        self.output_projection = nn.Linear(config.d_model, token_size)
        self.contrast = nn.Sequential(
            nn.Linear(config.code_size, config.code_size), nn.ReLU(), nn.Linear(config.code_size, config.code_size)
        )
        self.encoder_path = nn.Linear(token_size, config.code_size) if config.linear else None
        self.decoder_path = nn.Linear(config.code_size, token_size) if config.linear else None
        self.register_buffer("position", position_embedding("2d", positions, config.d_model)[1], persistent=False)
        self.register_buffer("anchors", torch.zeros(0, len(positions), config.code_size))

    def encode(self, tokens: Tensor) -> Tensor:
        """Normalised tokens ``[B, L, D]`` → codes ``[B, L, Z]``."""
        codes = self.code_projection(self.encoder(self.token_projection(tokens) + self.position))
        return (codes if self.encoder_path is None else codes + self.encoder_path(tokens)).float()

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[B, L, Z]`` → normalised tokens ``[B, L, D]``, padding included."""
        tokens = self.output_projection(self.decoder(self.decoder_projection(codes) + self.position))
        return (tokens if self.decoder_path is None else tokens + self.decoder_path(codes)).float()

    def forward(self, tokens: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """``(1 - γ)`` times the mean squared error a value, and ``γ`` times NT-Xent of the two views of the batch.

        Args:
            tokens: ``[B, L, D]``.
            mask: ``[L, D]``, 1 where a token holds a value.
            noise: ``[2, B, L, D]`` standard normal, of the two views.
        """
        if not self.config.contrast or len(tokens) < 2:
            noise = noise[:1]  # one view is enough
        views = (tokens + self.config.noise * noise * mask).flatten(0, 1)  # [2B, L, D]
        codes = self.encode(views)
        error = (self.decode(codes) - tokens.repeat(len(noise), 1, 1)).square() * mask
        reconstruction = error.sum() / (len(views) * mask.sum())
        if len(noise) == 1:
            return reconstruction
        projected = F.normalize(self.contrast(codes.mean(1)), dim=1)  # [2B, Z]
        contrast = nt_xent(projected, 0.1)
        return (1 - self.config.contrast) * reconstruction + self.config.contrast * contrast

    @torch.no_grad()
    def draw(self, places: Tensor, noise: Tensor) -> Tensor:
        """Codes ``[G, L, Z]`` from the kernel density around the anchors.

        Args:
            places: ``[G, L, Z]`` in 0 … 1, which anchor each value is drawn around; `SaneConfig.draw` says which of
                these numbers count for all values of a token or a network.
            noise: ``[G, L, Z]`` standard normal.
        """
        if self.config.draw == "token":
            places = places[:, :, :1].expand_as(places)
        elif self.config.draw == "network":
            places = places[:, :1, :1].expand_as(places)
        num = len(self.anchors)
        rows = (places * num).long().clamp(max=num - 1)  # [G, L, Z]
        spread = self.anchors.std(0, correction=0)  # [L, Z]
        return self.anchors.gather(0, rows) + self.config.bandwidth * spread * noise


def nt_xent(projected: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy (arXiv 2002.05709, equation 1), mean over both directions.

    Args:
        projected: ``[2B, Z]`` of unit length; row i and row B + i are views of one checkpoint.
        temperature: of the softmax.
    """
    num = len(projected)
    alike = projected @ projected.T / temperature
    alike = alike.masked_fill(torch.eye(num, dtype=torch.bool, device=projected.device), float("-inf"))
    partner = torch.arange(num, device=projected.device).roll(num // 2)
    return F.cross_entropy(alike, partner)
