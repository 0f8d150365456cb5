"""What is known of a checkpoint's tokens in closed form; diffusion learns the rest.

Tokens are the sum of three parts: their regression on the condition (`rpg.models.kernel_regression`), a linear function
of the checkpoint's *code*, and a remainder of unit root mean square in every token, which the denoiser makes. A code is
the checkpoint's whitened leading principal components, of what the condition leaves; it is one for all tokens, so that
tokens which are denoised one by one belong to one network. Codes are one kind of permutation state
(`rpg.models.states`).

Letters: n checkpoints, G of a batch, T tokens, k values of a token, C condition values, m code values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from rpg.models.conditioning import are_new, regression_inputs
from rpg.models.kernel_regression import FittedBuffers, KernelRidge, exact_distances, rbf

SMALLEST_REMAINDER = 1e-5
"""Where no more than this remains of a token, it is rounding error, not to be scaled up to unit size."""


class Centre(FittedBuffers):
    """The closed-form part of tokens, and the spread of what remains. It has no parameters, only buffers.

    ``condition`` is kind and size of the conditions that are regressed on; None for none.
    """

    conditions: Tensor
    length: Tensor
    dual: Tensor
    code_map: Tensor
    scale: Tensor
    seen: Tensor
    without: Tensor

    def __init__(self, num_tokens: int, token_size: int, condition: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.condition = condition
        self.register_buffer("conditions", torch.zeros(0, condition[1] if condition else 0))
        self.register_buffer("length", torch.ones(()))
        self.register_buffer("dual", torch.zeros(0, num_tokens, token_size))
        self.register_buffer("code_map", torch.zeros(0, num_tokens, token_size))
        self.register_buffer("scale", torch.ones(num_tokens))
        self.register_buffer("seen", torch.zeros(0, condition[1] if condition else 0), persistent=False)
        self.register_buffer("without", torch.zeros(0, num_tokens, token_size), persistent=False)

    def resize(self, num_checkpoints: int, code_size: int) -> None:
        """Take the sizes that fitting to a zoo would give, without values."""
        num_tokens, token_size = self.code_map.shape[1:]
        self.fill(code_map=self.code_map.new_empty(code_size, num_tokens, token_size))
        if self.condition is not None:
            self.fill(
                conditions=self.conditions.new_empty(num_checkpoints, self.condition[1]),
                dual=self.dual.new_empty(num_checkpoints, num_tokens, token_size),
            )

    def forward(self, conditions: Tensor | None, codes: Tensor | None, token_ids: Tensor) -> Tensor:
        """The known part of tokens ``[N]`` of G networks with codes ``[G, m]``, ``[G or 1, N, k]`` float32.

        Conditions ``[G, C]`` are as they come from a zoo; without regression they are ignored.
        """
        known = self.code_map.new_zeros(1, len(token_ids), self.code_map.shape[-1])
        with torch.autocast(known.device.type, enabled=False):
            if self.condition is not None and conditions is not None:
                inputs = regression_inputs(self.condition[0], conditions, self.condition[1]).float()
                kernel = rbf(inputs, self.conditions, self.length)  # [G, n]
                regressed = torch.tensordot(kernel, self.dual[:, token_ids], 1)
                known = known + (self._without(inputs, regressed, token_ids) if self.training else regressed)
            if len(self.code_map) and codes is not None:
                known = known + torch.tensordot(codes.float(), self.code_map[:, token_ids], 1)
        return known

    def _without(self, inputs: Tensor, regressed: Tensor, token_ids: Tensor) -> Tensor:
        """The prediction for each condition from the checkpoints of all others, where that is known.

        Training sees what generation will see: the error of the regression for an unseen condition.
        """
        if not len(self.seen):
            return regressed
        distance, place = exact_distances(inputs, self.seen).min(1)
        return torch.where(distance[:, None, None] < 1e-3, self.without[place][:, token_ids], regressed)

    def remainder(self, rows: Tensor, known: Tensor, token_ids: Tensor) -> Tensor:
        """What the denoiser makes of tokens ``[..., N, k]``: the rest, of unit size; 0 where nothing remains."""
        scale = self.scale[token_ids, None]
        return torch.where(scale > 0, (rows - known) / scale.clamp(min=SMALLEST_REMAINDER), 0.0)

    def complete(self, rest: Tensor, known: Tensor, token_ids: Tensor) -> Tensor:
        """Tokens from the rest ``[..., N, k]``: the inverse of `remainder`."""
        return known + rest * self.scale[token_ids, None]


@dataclass(frozen=True)
class FittedCentre:
    """What a centre was fitted to.

    Attributes:
        codes: ``[n, m]`` float32, of zero mean and unit variance in the zoo.
        spread: ``[m]`` float32: how far the zoo reaches along each direction, of unit mean square.
        regression: the regression on the condition; None without.
        left_out: ``[n, T, k]`` float32: the tokens less their prediction from the other checkpoints.
    """

    codes: Tensor
    spread: Tensor
    regression: KernelRidge | None
    left_out: Tensor


def fit_centre(
    centre: Centre, tokens: Tensor, conditions: Tensor | None, code_size: int, weight: Tensor,
    groups: Tensor | None = None, shown: Tensor | None = None,
) -> FittedCentre:  # fmt: skip
    """Fit both parts to a zoo, into ``centre``.

    The regression's remainders are those of the left-out fits: of a checkpoint that was fitted hardly anything would
    remain, and diffusion would learn that a condition leaves no choice.

    Args:
        centre: takes what is found; its ``condition`` says whether to regress.
        tokens: ``[n, T, k]``, of zero mean over the zoo.
        conditions: ``[n, C]`` as they come from the zoo, or None.
        code_size: m; cut to n - 1; 0 for no codes.
        weight: ``[T]``, by which each token's values are multiplied where checkpoints are compared.
        groups: ``[n]`` long, where networks will be requested for unseen conditions: checkpoints of one number
            have one condition.
        shown: ``[n, F]``, what each checkpoint shows: codes are components of that, in place of tokens.
    """
    num, _, token_size = tokens.shape
    values = rearrange(tokens, "n l d -> n (l d)").to(torch.float64)
    weights = weight.to(torch.float64).repeat_interleave(token_size)
    regression, dual = None, None
    if centre.condition is not None and conditions is not None:
        scaled = values * weights
        inputs = regression_inputs(centre.condition[0], conditions, centre.condition[1])
        # New conditions are left out with all their checkpoints.
        by_condition = are_new(centre.condition[0])
        regression = KernelRidge.fit(inputs, scaled @ scaled.T, by_condition)
        dual = rearrange((regression.inverse @ values).float(), "n (l d) -> n l d", d=token_size)
        left_out = regression.left_out() @ values
        if by_condition:
            first = torch.tensor([int((regression.groups == each).nonzero()[0]) for each in regression.groups.unique()])
            without = rearrange((values - left_out)[first].float(), "n (l d) -> n l d", d=token_size)
            centre.fill(seen=inputs[first], without=without)
        values = left_out
    left_out = rearrange(values, "n (l d) -> n l d", d=token_size)
    code_size = min(code_size, num - 1)
    differing = values if groups is None else _within(values, groups)
    weighted = differing * weights if shown is None else (shown - shown.mean(0)).to(torch.float64)
    codes = _whitened(weighted, code_size)  # [n, m or 0]
    reach = (codes.T @ weighted).norm(dim=1)  # [m]
    code_map = codes.T @ values / num  # least squares: the codes are orthogonal, of mean square 1
    rest = rearrange(values - codes @ code_map, "n (l d) -> n l d", d=token_size)
    spread = rest.square().mean((0, 2)).sqrt()
    # Where nothing remains but rounding, the denoiser must not blow it up to unit size, nor add anything of its own.
    scale = torch.where(spread > SMALLEST_REMAINDER, spread, 0.0)
    centre.fill(code_map=rearrange(code_map, "m (l d) -> m l d", d=token_size), scale=scale)
    if regression is not None and dual is not None:
        centre.fill(conditions=regression.conditions, length=torch.tensor(regression.length), dual=dual)
    spread = (reach / reach.square().mean().sqrt()).float() if code_size else reach.float()
    return FittedCentre(codes.float(), spread, regression, left_out.float())


def _within(values: Tensor, groups: Tensor) -> Tensor:
    """How checkpoints ``[n, M]`` differ from the mean of their own condition, where conditions have several; else all.

    What a regression gets wrong of a condition is the same for all its checkpoints. A code of that would be drawn at
    random for a new condition, and make every network worse; a code of the differences makes them differ, and no more.
    """
    counts = groups.bincount()
    if len(groups) == len(counts):
        return values
    sums = values.new_zeros(len(counts), values.shape[1]).index_add_(0, groups, values)
    return values - (sums / counts[:, None])[groups]


def _whitened(values: Tensor, size: int) -> Tensor:
    """The leading principal components of ``[n, M]``, each of mean square 1: ``[n, size]``."""
    if len(values) > 2 * values.shape[1] and size <= values.shape[1]:  # the smaller of two equal problems
        axes = torch.linalg.eigh(values.T @ values).eigenvectors.flip(1)[:, :size]
        vectors = values @ axes
        vectors = vectors / vectors.norm(dim=0).clamp(min=torch.finfo(vectors.dtype).tiny)
    else:
        vectors = _leading_eigenvectors(values, size)
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign() * len(values) ** 0.5


def _leading_eigenvectors(values: Tensor, size: int) -> Tensor:
    return torch.linalg.eigh(values @ values.T).eigenvectors.flip(1)[:, :size]
