"""Recurrent diffusion (RPG, arXiv 2501.11587): prototypes from positions, states and conditions; a
diffusion loss per token. No files, no trainer.

B examples, G distinct (state, condition) pairs, L tokens of a checkpoint, N sampled tokens, D token
width, H model width, S permutation-state width, C condition values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from einops import rearrange, reduce
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rpg.diffusion import FlowConfig, Objective, ObjectiveConfig, build_objective
from rpg.models.backbone import (
    Backbone,
    LSTMBackbone,
    LSTMConfig,
    NoneBackbone,
    NoneConfig,
    TransformerBackbone,
    TransformerConfig,
)
from rpg.models.centre import Centre, fit_centre
from rpg.models.code_prior import CodePrior
from rpg.models.conditioning import (
    ConditionConfig,
    ConditionEncoder,
    InitialConfig,
    StateConfig,
    are_new,
    position_embedding,
)
from rpg.models.denoiser import (
    Decoder,
    DecoderConfig,
    Denoiser,
    JointConfig,
    JointDenoiser,
    MLPConfig,
    MLPDenoiser,
)
from rpg.models.kernel_regression import condition_groups
from rpg.models.mamba2 import Mamba2Backbone, Mamba2Config
from rpg.models.states import CodeTable, TaskTable, permutation_state
from rpg.models.unet1d import UNet1d, UNet1dConfig
from rpg.section import Section
from tokenization.layouts import Layout


@dataclass(frozen=True)
class Batch:
    """One training step's data, on the model's device."""

    samples: Tensor  # [B, N, D] normalised tokens x0, padding 0
    mask: Tensor  # [N, D] 1 where a token holds values
    token_ids: Tensor  # [N] long
    time: Tensor  # [B, N] the objective's unit
    noise: Tensor  # [B, N, D]
    group: Tensor  # [B] long, each example's row of states, conditions and dropped
    states: Tensor  # [G] long
    conditions: Tensor | None  # [G, C]
    dropped: Tensor | None  # [G] bool: the condition is withheld
    initial: Tensor | None = None  # [G, L, D] tokens of the checkpoints to go on from
    num_last: int = 0  # how many of the first examples have all their tokens at the last time
    codes: CodeBatch | None = None  # of the prior over codes
    tasks: Tensor | None = None  # [G, C] the zoo's own conditions, where networks see something else


@dataclass(frozen=True)
class CodeBatch:
    """One step's data of the prior over codes: P checkpoints of its own choice."""

    states: Tensor  # [P] long: of checkpoints
    noise: Tensor  # [P, S]
    time: Tensor  # [P] in 0 … 1
    conditions: Tensor | None  # [P, C]
    tasks: Tensor | None = None  # [P, S] what new tasks are, in place of checkpoints


class Loss(NamedTuple):
    """The mean loss of a batch, and each sampled token's share of it (detached, ``[N]``).

    ``samples`` ``[num_last, N, D]`` are the predicted x₀ of the examples at the last time, if there are any. (A tuple,
    since what spreads weights over processes looks for the forward pass's tensors in tuples, and not in data classes.)
    """

    mean: Tensor
    per_token: Tensor
    samples: Tensor | None = None


BackboneConfig = Annotated[LSTMConfig | Mamba2Config | TransformerConfig | NoneConfig, Field(discriminator="kind")]
BACKBONES: dict[str, Callable[[Any], Backbone]] = {
    "lstm": LSTMBackbone, "mamba2": Mamba2Backbone, "transformer": TransformerBackbone, "none": NoneBackbone,
}  # fmt: skip

DenoiserConfig = Annotated[MLPConfig | UNet1dConfig | JointConfig | DecoderConfig, Field(discriminator="kind")]
DENOISERS: dict[str, Any] = {"mlp": MLPDenoiser, "unet1d": UNet1d, "joint": JointDenoiser, "decoder": Decoder}


def build_backbone(config: BackboneConfig) -> Backbone:
    """The backbone that a configuration describes, randomly initialised from torch's global generator."""
    return BACKBONES[config.kind](config)


def build_denoiser(config: DenoiserConfig, token_size: int, d_prototype: int, num_tokens: int) -> Denoiser:
    """The denoiser that a configuration describes, randomly initialised from torch's global generator."""
    kind = DENOISERS[config.kind]
    made: Denoiser = kind(config, token_size, d_prototype, *([num_tokens] if kind.needs_whole_networks else []))
    return made


class RecurrentConfig(Section):
    """The networks of recurrent diffusion."""

    kind: Literal["recurrent"] = "recurrent"
    position: Literal["2d", "1d", "layer", "learned", "none"] = Field(
        "2d",
        description="(layer, token) sinusoid; 1-D sinusoid; the layer alone, so that the tokens of a layer may change "
        "places as hidden units may; learned; no position embedding",
    )
    state: StateConfig = StateConfig()
    condition: ConditionConfig = ConditionConfig()
    initial: InitialConfig | None = Field(
        None,
        description="a second condition: the checkpoint to go on from; what is generated is the difference from it",
    )
    backbone: BackboneConfig = LSTMConfig()
    denoiser: DenoiserConfig = MLPConfig()
    diffusion: ObjectiveConfig = FlowConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> RecurrentConfig:
        if self.initial is not None and self.state.of != "none":
            raise ValueError("initial takes the place of permutation states; set state.of to none")
        if self.initial is not None and self.initial.own and self.condition.kind != "metric":
            raise ValueError("initial.own asks for a metric; set condition.kind to metric, or leave own out")
        if self.denoiser.kind == "decoder" and self.diffusion.prediction != "sample":
            raise ValueError("denoiser decoder predicts clean tokens; set diffusion.prediction to sample")
        if self.state.neighbours and self.condition.kind != "class":
            raise ValueError("state.neighbours needs condition.kind: class")
        if self.condition.inject == "prior" and self.state.prior is None:
            raise ValueError("condition.inject: prior needs state.prior")
        return self

    @property
    def normalises_batches(self) -> bool:
        """Whether what is computed of a row depends on the rows beside it."""
        return self.denoiser.kind == "unet1d"

    @property
    def description(self) -> str:
        """What the model is, for the model card."""
        return (
            "Recurrent diffusion (arXiv 2501.11587).\n"
            f"Objective: {self.diffusion.kind}, backbone: {self.backbone.kind}, denoiser: {self.denoiser.kind}."
        )


class RecurrentDiffusion(nn.Module):
    """The generator's networks.

    Args:
        positions: ``[L, 2]`` long, (layer index, token index in the layer).
        num_states: size of the table of permutation states (1 when all checkpoints share one).
        condition_size: C, or the number of classes; 0 without a condition.
        regress: take the tokens' regression on the condition off them first (``tokens.centre: condition``).
    """

    position_embedding: Tensor

    @classmethod
    def of_layout(cls, config: RecurrentConfig, layout: Layout, num_states: int, condition_size: int) -> Self:
        """Networks of a layout's sizes."""
        # Under `torch.device("meta")` the positions have to be there too: their embedding can take gigabytes.
        positions, regress = layout.positions.to(torch.get_default_device()), layout.options.centre == "condition"
        return cls(config, positions, layout.token_size, num_states, condition_size, regress)

    def __init__(
        self, config: RecurrentConfig, positions: Tensor, token_size: int, num_states: int = 1,
        condition_size: int = 0, regress: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.num_tokens = config, len(positions)
        self.token_size, self.condition_size = token_size, condition_size
        self.backbone = build_backbone(config.backbone)
        width, d_prototype = self.backbone.d_model, self.backbone.d_output
        self.denoiser = build_denoiser(config.denoiser, token_size, d_prototype, self.num_tokens)
        self.objective: Objective = build_objective(config.diffusion)
        learned, embedding = position_embedding(config.position, positions, width)
        if learned:
            self.position_embedding = nn.Parameter(embedding)
        else:
            self.register_buffer("position_embedding", embedding, persistent=False)
        self.state: nn.Embedding | CodeTable | None = None
        self.state_projection: nn.Module | None = None
        if config.state.of != "none":
            self.state, self.state_projection = permutation_state(config.state, num_states, width)
        self.condition: ConditionEncoder | None = None
        self.denoiser_condition: nn.Module | None = None
        conditioned = config.condition.kind != "none"
        encoder = partial(ConditionEncoder, config.condition, condition_size) if conditioned else None
        if encoder is not None and config.condition.inject != "prior":
            self.condition = encoder(width)
            if config.condition.inject == "both":
                self.denoiser_condition = nn.Linear(width, d_prototype)
        self.centre: Centre | None = None
        self.initial = nn.Linear(token_size, width) if config.initial is not None else None
        if config.state.of == "code" or regress or config.initial is not None:
            regressed = (config.condition.kind, condition_size) if regress and condition_size else None
            self.centre = Centre(self.num_tokens, token_size, regressed)
        self.prior: CodePrior | None = None
        if config.state.prior is not None:
            assert self.state is not None
            self.prior = CodePrior(config.state.prior, self.state.embedding_dim, encoder)

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers, the default first."""
        return tuple(self.objective.samplers)

    @torch.no_grad()
    def fit_centre(
        self, tokens: Tensor, conditions: Tensor | None, weight: Tensor, shown: Tensor | None = None
    ) -> None:
        """Measure what is known of tokens in closed form, and codes; see `rpg.models.centre.fit_centre`."""
        assert self.centre is not None
        code_size = self.state.embedding_dim if isinstance(self.state, CodeTable) else 0
        grouped = conditions is not None and are_new(self.config.condition.kind)
        groups = condition_groups(conditions) if grouped else None  # type: ignore[arg-type]
        fitted = fit_centre(self.centre, tokens, conditions, code_size, weight, groups, shown)
        if isinstance(self.state, CodeTable):
            self.state.fill(weight=fitted.codes)
            if self.state.classes is not None and conditions is not None:
                self.state.fill(classes=conditions[:, 0], spread=fitted.spread)
        if self.prior is not None and self.prior.spread is not None:
            self.prior.spread.copy_(fitted.spread)

    @torch.no_grad()
    def fit_initial(self, differences: Tensor) -> None:
        """Measure how large tokens' differences ``[n, L, D]`` from their initial are."""
        assert self.centre is not None
        self.centre.fill(scale=differences.square().mean((0, 2)).sqrt())

    def known(
        self, states: Tensor | None, conditions: Tensor | None, token_ids: Tensor, initial: Tensor | None = None
    ) -> Tensor | None:
        """The closed-form part of tokens ``[N]``, ``[G or 1, N, D]``, for states ``[G, S]``; None without one.

        Starts ``[G, L, D]`` are a part of it: what they have to change by is left to the denoiser.
        """
        if self.centre is None:
            return None
        codes = states if isinstance(self.state, CodeTable) else None
        known = self.centre(conditions, codes, token_ids)
        return known if initial is None else known + initial[:, token_ids]

    @property
    def num_states(self) -> int:
        """Size of the table of permutation states; 1 without one."""
        return self.state.num_embeddings if self.state is not None else 1

    def prototypes(
        self, states: Tensor | None, conditions: Tensor | None = None, dropped: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Prototypes ``[G, L, H]`` of G (state, condition) pairs.

        Args:
            states: ``[G, S]`` state embeddings (not ids, so that fresh ones can be given), or None.
            conditions: ``[G, C]``, or None.
            dropped: ``[G]`` bool, where the condition is withheld.
            initial: ``[G, L, D]``, the tokens to go on from, each seen at its own place; None of a model without.
        """
        num_groups = len(states) if states is not None else len(conditions) if conditions is not None else 1
        x = self.position_embedding[None].expand(num_groups, -1, -1)  # [G, L, H]
        if self.state_projection is not None:
            assert states is not None
            x = x + self.state_projection(states)[:, None]
        if self.initial is not None:
            assert initial is not None
            x = x + self.initial(initial)
        embedded = None
        if self.condition is not None:
            assert conditions is not None
            embedded = self.condition(conditions, dropped)  # [G, H]
            if self.config.condition.inject == "last_tokens":
                first = self.num_tokens - self.config.condition.last_tokens
                last = torch.arange(self.num_tokens, device=x.device) >= first
                x = x + embedded[:, None] * last[None, :, None]
            else:
                x = x + embedded[:, None]
        prototypes = self.backbone(x)  # [G, L, H]
        if self.denoiser_condition is not None:
            assert embedded is not None
            prototypes = prototypes + self.denoiser_condition(embedded)[:, None]
        return prototypes

    def state_vectors(self, states: Tensor, noise: Tensor | None = None) -> Tensor | None:
        """Embeddings ``[G, S]`` of state ids ``[G]``; ``noise`` ``[G, S]`` of unit variance is scaled by the config."""
        if self.state is None:
            return None
        vectors = self.state(states)
        if noise is not None and self.config.state.noise:
            spread = self.state.weight.detach().std(0) if self.state.num_embeddings > 1 else 1.0
            vectors = vectors + self.config.state.noise * spread * noise
        return vectors

    def predict(self, x: Tensor, time: Tensor, context: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """The denoiser's prediction ``[M, D]`` for noisy rows ``x`` ``[M, D]``; padding goes in and comes out as 0.

        ``mask`` ``[M, D]`` is 1 where a row holds values; None where all of them do.
        """
        if mask is None:
            return self.denoiser(x, time, context).float()
        return self.denoiser(x * mask, time, context).float() * mask

    def _predict_rows(self, x: Tensor, time: Tensor, prototypes: Tensor, mask: Tensor) -> Tensor:
        """:meth:`predict` from prototypes ``[M, H]``, recomputed in the backward pass if so configured."""

        def whole(x: Tensor, time: Tensor, prototypes: Tensor, mask: Tensor) -> Tensor:
            return self.predict(x, time, self.denoiser.precompute(prototypes), mask)

        inputs, num_rows = (x, time, prototypes, mask), self.denoiser.checkpoint_rows
        if num_rows is None or not (self.training and torch.is_grad_enabled()):
            return whole(*inputs)
        chunks = zip(*(tensor.split(num_rows) for tensor in inputs), strict=True)
        recompute = partial(checkpoint, whole, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([recompute(*chunk) for chunk in chunks])  # [M, D]

    def one_step(
        self, noise: Tensor, mask: Tensor, states: Tensor | None = None, conditions: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The tokens that one sampling step makes of normal noise ``[E, L, D]``, float32, differentiable.

        ``mask`` ``[L, D]`` is 1 where a token holds values; ``states`` ``[E, S]`` are embeddings; ``initial``
        ``[E, L, D]`` tokens to go on from.
        """
        rows = mask.repeat(len(noise), 1)  # [E·L, D]
        context = self.denoiser.precompute(self.prototypes(states, conditions, None, initial).flatten(0, 1))

        def predict(x: Tensor, time: Tensor) -> Tensor:
            return self.predict(x, time.expand(len(x)), context, rows)

        sampler = self.objective.plain_sampler
        made = self.objective.sample(predict, noise.flatten(0, 1) * rows, sampler=sampler, num_steps=1).view_as(noise)
        token_ids = torch.arange(self.num_tokens, device=noise.device)
        known = self.known(states, conditions, token_ids, initial)
        if self.centre is not None and known is not None:
            made = self.centre.complete(made, known, token_ids)
        return made.float()

    def forward(self, batch: Batch, state_noise: Tensor | None = None) -> Loss:
        """The masked, weighted mean squared error of the denoiser's prediction over the batch."""
        num_examples, num_sampled = batch.samples.shape[:2]
        states = self.state_vectors(batch.states, state_noise)
        prototypes = self.prototypes(states, batch.conditions, batch.dropped, batch.initial)  # [G, L, H]
        prototypes = prototypes[:, batch.token_ids][batch.group].flatten(0, 1)  # [B·N, H]
        samples = batch.samples
        known = self.known(self.state_vectors(batch.states), batch.conditions, batch.token_ids, batch.initial)
        if self.centre is not None and known is not None:
            known = known.expand(len(batch.states), -1, -1)[batch.group]  # [B, N, D]
            samples = self.centre.remainder(samples, known, batch.token_ids) * batch.mask
        x0, noise = samples.flatten(0, 1), batch.noise.flatten(0, 1)  # [B·N, D]
        time = batch.time.flatten()  # [B·N]
        mask = batch.mask[None].expand(num_examples, -1, -1).flatten(0, 1)  # [B·N, D]
        noisy = self.objective.add_noise(x0, noise, time)
        prediction = self._predict_rows(noisy, self.objective.network_time(time), prototypes, mask)  # [B·N, D]
        error = (prediction - self.objective.target(x0, noise, time)).square() * mask
        per_row = error.sum(1) * self.objective.weight(time)  # [B·N]
        per_token = reduce(per_row, "(b n) -> n", "mean", n=num_sampled)
        mean = per_token.sum() / batch.mask.sum().clamp(min=1)
        made = None
        if batch.num_last:
            rows = batch.num_last * num_sampled
            made = self.objective.to_sample(noisy[:rows], prediction[:rows], time[:rows])
            made = rearrange(made, "(b n) d -> b n d", n=num_sampled)
            if self.centre is not None and known is not None:
                made = self.centre.complete(made, known[: batch.num_last], batch.token_ids)
        if batch.codes is not None:
            mean = mean + self.prior_loss(batch.codes)
        return Loss(mean, (per_token / batch.mask.sum(1).clamp(min=1)).detach(), made)

    def prior_loss(self, codes: CodeBatch) -> Tensor:
        """The loss of the prior over codes."""
        assert self.prior is not None and self.state is not None
        if codes.tasks is not None and isinstance(self.state, TaskTable):
            vectors = self.state.codes(codes.tasks)
        else:
            vectors = self.state(codes.states)
        return self.prior.loss(vectors, codes.noise, codes.time, codes.conditions)
