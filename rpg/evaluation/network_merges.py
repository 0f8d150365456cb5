"""Merges of checkpoints (as mergekit makes them) and of adapters (as PEFT does) as baselines.

m merged networks, n of a zoo, V values of a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rpg.merging.parts import METHODS, merge_values
from rpg.seeding import derive_seed, make_rng
from tokenization.checkpoint.checkpoint import Checkpoint, StateDict
from tokenization.layout.canonical import NO_PRODUCT
from tokenization.lora.adapter import balanced_factors, module_of, partner_of, scaling_of

MERGES = tuple(f"merge_{method}" for method in METHODS)

AFFORDABLE_MERGES = ("merge_linear", "merge_ties")
"""Those of networks so large that each takes minutes."""

NUM_MERGED = 4
"""Networks that are merged into one."""

NUM_MADE = 12
"""Networks of a kind at most where they are drawn at random: merges of one run differ little."""


class NetworkMerges:
    """Merges checkpoints of one structure, a tensor at a time, read from their memory maps.

    Args:
        runs: which run each is of; all of one when None.
    """

    def __init__(self, networks: Sequence[Checkpoint], runs: Sequence[int] | None = None) -> None:
        self.networks = list(networks)
        self.runs = [0] * len(self.networks) if runs is None else list(runs)

    @property
    def methods(self) -> tuple[str, ...]:
        """`MERGES`; none of a single network."""
        return MERGES if len(self.networks) > 1 else ()

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Equal shares ``[num, n]`` of some networks of a random run."""
        return draw_shares(self.runs, min(num, NUM_MADE), generator)

    def merge(self, method: str, shares: Tensor, seed: int = 0, base: StateDict | None = None) -> StateDict:
        """One network, made by ``method`` of those with the largest positive shares, in the stored dtypes.

        Args:
            shares: of all networks, ``[n]``; those that count are scaled to add up to 1.
            base: what they began with; the mean of the run that they are of when None.
        """
        rows, weights = chosen_of(shares)
        first = self.networks[0]
        read = {0, *rows, *(_of_run(self.runs, rows[0]) if base is None else ())}
        stored: dict[str, Tensor] = {}
        for name, info in first.tensors.items():
            if not info.averaged:
                stored[name] = first.tensor(name)
                continue
            values = torch.stack([self.networks[row].flat(name).float() for row in rows])
            if len(rows) > 1:
                begun = base[name].flatten().float() if base is not None else self._mean(name, rows[0])
                made = merge_values(method.removeprefix("merge_"), values, begun, weights, make_rng(seed, name))
            else:
                made = values[0]
            if name.endswith("running_var"):
                made = made.clamp(min=values.min())
            stored[name] = made.to(info.dtype).view(info.shape)
            for row in read:
                self.networks[row].release(name)
        return {name: stored[first.ties.get(name, name)] for name in first.order}

    def _mean(self, name: str, row: int) -> Tensor:
        """The mean of a tensor over the run that a network is of."""
        members = _of_run(self.runs, row)
        total = torch.zeros(self.networks[0].flat(name).numel(), dtype=torch.float64)
        for member in members:
            total += self.networks[member].flat(name)
        return (total / len(members)).float()


def draw_shares(runs: Sequence[int], num: int, generator: torch.Generator) -> Tensor:
    """Equal shares of up to `NUM_MERGED` networks of a random run, of any where runs have one each: ``[num, n]``."""
    groups = [members for members in _groups(runs).values() if len(members) > 1] or [list(range(len(runs)))]
    shares = torch.zeros(num, len(runs), dtype=torch.float64)
    for row in shares:
        members = groups[int(torch.randint(len(groups), (), generator=generator))]
        order = torch.randperm(len(members), generator=generator)[:NUM_MERGED].tolist()
        row[[members[place] for place in order]] = 1 / len(order)
    return shares


def chosen_of(shares: Tensor) -> tuple[list[int], Tensor]:
    """The networks with the largest positive shares, and their weights, which add up to 1."""
    values, rows = shares.double().topk(min(NUM_MERGED, len(shares)))
    values = values.clamp(min=0)
    values = values / values.sum() if values.sum() > 0 else torch.full_like(values, 1 / len(values))
    return rows[values > 0].tolist(), values[values > 0]


def _groups(runs: Sequence[int]) -> Mapping[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(run, []).append(place)
    return groups


def _of_run(runs: Sequence[int], row: int) -> list[int]:
    """The networks of one's run; all of them where it is alone in its run."""
    members = _groups(runs)[runs[row]]
    return members if len(members) > 1 else list(range(len(runs)))


PEFT_METHODS = ("peft_linear", "peft_svd", "peft_ties", "peft_dare_linear", "peft_dare_ties")
"""``peft_`` and PEFT's ``combination_type``."""

DENSITY = 0.2
"""Share of the values that ties and dare keep: that of the TIES paper (arXiv 2306.01708) and of PEFT's guide."""

MERGED = "merged"


class PeftMerges:
    """Merges adapters of one structure.

    PEFT merges pairs alone: it leaves DoRA's magnitudes at the norms of the base, new biases at 0, and multiplies what
    it made of rsLoRA adapters by a further √rank. Here merged pairs have the scaling that PEFT means them to have, and
    whatever is not a pair is a weighted mean, which is right for biases; of DoRA's magnitudes it is an approximation.

    Args:
        config: text of PEFT's ``adapter_config.json``.
        adapters: n of them, as they were saved.
        finish: brings a merged adapter into the form that the others are compared in.
    """

    def __init__(
        self, config: str, adapters: Sequence[Checkpoint], finish: Callable[[StateDict], Any] | None = None
    ) -> None:
        self.config: dict[str, Any] = json.loads(config)
        self.adapters, self.finish = list(adapters), finish or dict
        tensors = self.adapters[0].tensors
        self.pairs = {  # A by B
            partner: name
            for name in tensors
            for side, partner in [partner_of(name) or ("", "")]
            if side == "A" and partner in tensors
        }
        self.is_grouped = any(tensors[b].shape[1] != tensors[a].shape[0] for b, a in self.pairs.items())
        self._models: dict[Any, Any] = {}

    @property
    def methods(self) -> tuple[str, ...]:
        """`PEFT_METHODS`; none for a single adapter or updates beyond ``B A`` (grouped convolutions are)."""
        several = len(self.adapters) > 1 and bool(self.pairs) and not self.is_grouped
        return PEFT_METHODS if several and not any(self.config.get(field) for field in NO_PRODUCT) else ()

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Equal shares ``[num, n]`` of a few random adapters."""
        return draw_shares([0] * len(self.adapters), num, generator)

    def merge(self, method: str, shares: Tensor, seed: int = 0) -> StateDict:
        """One adapter, made by ``method`` of those with the largest positive shares.

        Args:
            shares: of all adapters, ``[n]``; those that count are scaled to add up to 1.
        """
        rows, weights = chosen_of(shares)
        chosen = list(zip([self.adapters[row] for row in rows], weights.tolist(), strict=True))
        made: dict[str, Tensor] = {}
        for name, info in self.adapters[0].tensors.items():
            if name in self.pairs:
                a = self.pairs[name]
                given = [(each.tensor(a), each.tensor(name), value) for each, value in chosen]
                made[a], made[name] = self._pair(method, a, given, derive_seed(seed, method, name))
            elif name not in self.pairs.values():
                mean = sum(value * each.tensor(name).double() for each, value in chosen)
                made[name] = torch.as_tensor(mean).to(info.dtype)
            for each, _ in chosen:
                each.release(name)
        first = self.adapters[0]
        return self.finish({name: made[first.ties.get(name, name)] for name in first.order})

    def _pair(
        self, method: str, name: str, given: Sequence[tuple[Tensor, Tensor, float]], seed: int
    ) -> tuple[Tensor, Tensor]:
        """The merged factors, in the scaling of those that are given (PEFT's new adapters are scaled by other rules).

        PEFT's ``svd`` decomposes the whole update ``[out, in]``; its ``cat``, decomposed by its factors, is the same to
        rounding and some hundred times faster.
        """
        shapes = [each.shape for each in given[0][:2]]
        given = [(a.flatten(1), b.flatten(1), weight) for a, b, weight in given]  # of convolutions
        a, b, _ = given[0]
        scaling = scaling_of(module_of(name), self.config)
        kind = "cat" if method == "peft_svd" else method.removeprefix("peft_")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model, layer = self._model(a.shape[1], b.shape[0], a.shape[0], scaling, len(given))
            for number, (each_a, each_b, _) in enumerate(given):
                layer.lora_A[str(number)].weight.data = each_a.float()
                layer.lora_B[str(number)].weight.data = each_b.float()
            torch.manual_seed(seed)
            model.add_weighted_adapter(
                [str(number) for number in range(len(given))], [value for *_, value in given], MERGED, kind,
                density=DENSITY,
            )  # fmt: skip
        new_a, new_b = layer.lora_A[MERGED].weight.data, layer.lora_B[MERGED].weight.data / scaling
        model.delete_adapter(MERGED)
        if kind == "cat":
            new_a, new_b = balanced_factors(new_a, new_b)
            new_a, new_b = new_a[: len(a)], new_b[:, : len(a)]
        return new_a.to(a.dtype).view(shapes[0]), new_b.to(b.dtype).view(shapes[1])

    def _model(self, size_in: int, size_out: int, rank: int, scaling: float, num: int) -> tuple[Any, Any]:
        """A network of one layer with ``num`` adapters, called ``0``, ``1``, …, and that layer."""
        from peft import LoraConfig, get_peft_model

        key = (size_in, size_out, rank, scaling, num)
        if key not in self._models:
            base = nn.Module()
            base.layer = nn.Linear(1, 1, bias=False)
            base.layer.in_features, base.layer.out_features = size_in, size_out
            base.layer.weight = nn.Parameter(torch.zeros(1, 1).expand(size_out, size_in), requires_grad=False)
            alpha: Any = scaling * rank
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"])
            model = get_peft_model(base, config, "0")  # type: ignore[arg-type]
            for number in range(1, num):
                model.add_adapter(str(number), config)
            self._models[key] = model, base.layer
        return self._models[key]


Merges = NetworkMerges | PeftMerges
"""Makes one network of a few of a zoo, by several methods."""
