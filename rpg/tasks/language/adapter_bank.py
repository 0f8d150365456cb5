"""Many LoRA or DoRA adapters of one base model in one forward pass.

The base sees the rows of all adapters as one batch; what an adapter adds to a linear layer is two batched products.
Nothing is copied per adapter but its own values, and any model that PEFT can adapt will do.
T adapters, B rows of each, S token positions, V vocabulary, r rank, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rpg.tasks.language.config import AdapterConfig
from rpg.tasks.language.rows import IGNORED, Rows, stack_rows
from rpg.tasks.side_by_side import Stacked
from tokenization.errors import InputError

if TYPE_CHECKING:  # slow to import, and only needed once there are adapters
    from peft import LoraConfig


def peft_config(config: AdapterConfig, base: str) -> LoraConfig:
    """PEFT's configuration of adapters for the base of that name or path."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=base, r=config.r, lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout, use_rslora=config.rslora, use_dora=config.kind == "dora",
        target_modules=list(config.target_modules),
    )  # fmt: skip


@dataclass(frozen=True)
class _Site:
    """One adapted linear layer."""

    module: nn.Module
    name: str
    scaling: float
    dora: bool

    def weight(self) -> Tensor:
        """The base's weight ``[O, I]``; Conv1D keeps it the other way round."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight if isinstance(self.module, nn.Linear) else weight.T


class AdapterBank:
    """T adapters of one base as one function; the base is frozen, and left as it was otherwise.

    Raises InputError if ``target_modules`` names no layer of the base.
    """

    def __init__(self, base: nn.Module, config: LoraConfig) -> None:
        from peft.tuners.lora import LoraLayer

        self.base = base.eval().requires_grad_(False)
        with peft_on(base, config) as adapted:
            names = {module: name for name, module in adapted.named_modules()}
            layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
            self.sites = [
                _Site(layer.get_base_layer(), names[layer], layer.scaling["default"], bool(config.use_dora))
                for layer in layers
            ]
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters

    def logits(self, weights: Stacked, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits ``[T, B, K, V]`` of T adapters, under PEFT's names, each on its own rows.

        Differentiable in ``weights``. Token ids ``[T, B, S]`` are padded on the right; ``keep`` are the positions
        ``[K]`` whose logits are wanted, all when None.
        """
        options: dict[str, Any] = {"use_cache": False}
        if keep is not None and self._keeps_logits:
            options["logits_to_keep"] = keep
        with self._adapted(weights):
            found = self.base(ids.flatten(0, 1), **options).logits  # [T·B, K, V]
        if keep is not None and not self._keeps_logits:
            found = found[:, keep]
        return found.unflatten(0, ids.shape[:2])

    @contextmanager
    def _adapted(self, weights: Stacked) -> Iterator[None]:
        handles = [site.module.register_forward_hook(functools.partial(_adapt, site, weights)) for site in self.sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _adapt(site: _Site, weights: Stacked, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The layer's output with each adapter's part: W x + s B A x, in DoRA (arXiv 2402.09353) times m / |W + s B A|."""
    x = inputs[0]
    down = weights[f"{site.name}.lora_A.weight"].to(x.dtype)  # [T, r, I]
    up = weights[f"{site.name}.lora_B.weight"].to(x.dtype)  # [T, O, r]
    rows = x.reshape(len(down), -1, x.shape[-1])  # [T, B·S, I]
    delta = torch.bmm(torch.bmm(rows, down.mT), up.mT) * site.scaling  # [T, B·S, O]
    if not site.dora:
        return output + delta.view(output.shape)
    magnitude = weights[f"{site.name}.lora_magnitude_vector"].to(x.dtype)  # [T, O]
    bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros((), dtype=x.dtype, device=x.device)
    linear = (output - bias).reshape(delta.shape)
    scale = (magnitude / _norms(site, down, up))[:, None]  # [T, 1, O]
    return (scale * (linear + delta)).view(output.shape) + bias


@torch.no_grad()
def _norms(site: _Site, down: Tensor, up: Tensor) -> Tensor:
    """Norms of the rows of W + s B A ``[T, O]``, without making T such matrices.

    They are constants to the gradient, as in PEFT (arXiv 2402.09353, section 4.3).
    """
    weight = site.weight().to(down.dtype)  # [O, I]
    mixed = (up * (down @ weight.T).mT).sum(-1)  # [T, O]: b_o · A w_o
    squared = ((up @ (down @ down.mT)) * up).sum(-1)  # [T, O]: b_oᵀ A Aᵀ b_o
    return (weight.square().sum(1) + 2 * site.scaling * mixed + site.scaling**2 * squared).clamp(min=0).sqrt()


@contextmanager
def peft_on(base: nn.Module, config: LoraConfig) -> Iterator[Any]:
    """PEFT's own model around ``base``, which is as before afterwards. Raises InputError for nothing to adapt."""
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():  # of what PEFT completes in the configuration by itself
            warnings.simplefilter("ignore")
            adapted = get_peft_model(base, config)  # type: ignore[arg-type]
    except ValueError as error:
        found = str(sorted(config.target_modules or ()))
        raise InputError(
            f"task.adapter.target_modules {found} do not fit the base ({str(error).split('.')[0]}); "
            "name layers that it has"
        ) from None
    try:
        yield adapted
    finally:
        adapted.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config


def fresh_adapter(base: nn.Module, config: LoraConfig, seed: int) -> dict[str, Tensor]:
    """An untrained adapter under PEFT's names: A random, B zero, DoRA's norms those of the base.

    Torch's global random state is as before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with peft_on(base, config) as adapted:
            return adapter_state(adapted)


def adapter_state(adapted: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter of a PEFT model under PEFT's names, float32, on the CPU, copied."""
    from peft import get_peft_model_state_dict

    state: Mapping[str, Tensor] = get_peft_model_state_dict(adapted)
    return {name: value.detach().float().cpu().clone() for name, value in state.items()}


AdapterScores = dict[str, Tensor]
"""Metrics by name, float64 ``[T]``: ``symbol_accuracy`` and ``exact_match`` (0 … 1), ``perplexity`` (1 …)."""


@torch.inference_mode()
def score_adapters(
    bank: AdapterBank, weights: Stacked, rows: Sequence[Rows], rows_at_once: int = 2048
) -> AdapterScores:
    """Score T adapters, each on its own rows (as many for all).

    *Exact match* is the share of rows whose completion and its end are what greedy decoding writes: that is so exactly
    when the most likely token is the right one at every position of the completion, given the right ones before it.
    *Symbol accuracy* is the share of right ones among the completions' tokens, their end left out. *Perplexity* is the
    exponential of the mean cross-entropy of these tokens, their end included.

    Args:
        weights: ``[T, *shape]`` under PEFT's names.
        rows_at_once: rows of all adapters together in a forward pass, to bound memory.
    """
    device = next(bank.base.parameters()).device
    num_adapters = max(1, rows_at_once // len(rows[0]))
    parts = []
    for first in range(0, len(rows), num_adapters):
        chosen = {name: value[first : first + num_adapters].to(device) for name, value in weights.items()}
        stacked = stack_rows(rows[first : first + num_adapters])
        size = max(1, rows_at_once // len(stacked))
        pieces = [
            _counts(bank, chosen, stacked[:, begin : begin + size], device)
            for begin in range(0, stacked.ids.shape[1], size)
        ]
        parts.append(torch.stack(pieces).sum(0))
    symbols, right, tokens, loss, exact, num_rows = torch.cat(parts).T
    return {
        "symbol_accuracy": right / symbols.clamp(min=1),
        "exact_match": exact / num_rows,
        "perplexity": (loss / tokens).exp(),
    }


def _counts(bank: AdapterBank, weights: Stacked, rows: Rows, device: torch.device) -> Tensor:
    """What the scores are made of, float64 ``[T, 6]`` on the CPU."""
    keep = rows.scored
    targets = rows.targets[..., keep].to(device)  # [T, B, K]
    logits = bank.logits(weights, rows.ids.to(device), keep.to(device))  # [T, B, K, V]
    wanted = targets != IGNORED
    symbols = wanted & (targets != rows.end)
    right = logits.argmax(-1) == targets
    exact = (right | ~wanted).all(-1)  # [T, B]
    sums = [
        symbols.sum((1, 2)),
        (right & symbols).sum((1, 2)),
        wanted.sum((1, 2)),
        token_losses(logits, targets).double().sum((1, 2)),
        exact.sum(1),
        torch.full_like(exact.sum(1), exact.shape[1]),
    ]
    return torch.stack([each.double() for each in sums], 1).cpu()


def completion_losses(bank: AdapterBank, weights: Stacked, rows: Rows) -> Tensor:
    """Mean cross-entropy of the completions' tokens ``[T]`` of T adapters, each on its own rows ``[T, B, S]``."""
    keep = rows.scored
    targets = rows.targets[..., keep]  # [T, B, K]
    losses = token_losses(bank.logits(weights, rows.ids, keep), targets)
    return losses.sum((1, 2)) / (targets != IGNORED).sum((1, 2))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every position ``[…, K, V]``, ``[…, K]`` → ``[…, K]``; 0 where there is no target."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)
