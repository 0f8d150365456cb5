"""Training under masks or rounding, and what is stored of a network that was trained so."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rpg.tasks.images.config import Pruning, Quantisation
from tokenization.checkpoint.masks import cut_mask, share_out
from tokenization.compressed.parts import Kind, by_channel, new_part, quantised

MASKS: dict[str, Kind] = {"csr": "csr", "stored": "mask", "implied": "zeros"}
"""How a pruned weight is stored, by the configuration's name for it."""


class Compression:
    """Prunes or quantises the weights of a network, those of two or more dimensions.

    Pruned weights go by magnitude, to a share that rises cubically (Zhu and Gupta, arXiv 1710.01878), and may come
    back, as the gradient reaches them too (dynamic network surgery, Guo et al., arXiv 1608.04493): the mask goes on
    changing while checkpoints are saved. Small layers keep more (Erdős–Rényi densities, Mocanu et al., arXiv
    1707.04780). Weights are quantised to symmetric codes, one scale a channel, and the gradient passes the rounding as
    it is.

    Attributes:
        trunk: the dense network that every run begins with, once there is one.
    """

    def __init__(self, config: Pruning | Quantisation) -> None:
        self.config = config
        self.trunk: dict[str, Tensor] = {}

    @property
    def steps(self) -> int:
        """Training steps before the first checkpoint."""
        return self.config.steps

    def weights(self, network: nn.Module, progress: float) -> dict[str, Tensor]:
        """What the network computes with in a step, differentiable in its parameters.

        Args:
            network: holds the dense weights that are trained.
            progress: of the steps that compress, 0 … 1; 1 is the whole compression.
        """
        named = {name: each for name, each in network.named_parameters() if each.ndim > 1}
        effective = self._effective({name: each.detach() for name, each in named.items()}, progress)
        return {name: each + (effective[name] - each.detach()) for name, each in named.items()}

    def _effective(self, weights: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        if isinstance(self.config, Pruning):
            masks = self._masks(weights, self.config.sparsity * (1 - (1 - progress) ** 3))
            return {name: weight * masks[name] for name, weight in weights.items()}
        pairs = {name: quantised(weight, self.config.bits) for name, weight in weights.items()}
        return {name: codes * by_channel(scale, codes) for name, (codes, scale) in pairs.items()}

    def store(self, network: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of dense weights, compressed: what the checkpoint holds."""
        weights = {name: each for name, each in network.items() if each.ndim > 1}
        if isinstance(self.config, Pruning):
            kind, masks = MASKS[self.config.masks], self._masks(weights, self.config.sparsity)
            made = {n: new_part(kind, n, w, int(masks[n].sum())).masked(w, masks[n]) for n, w in weights.items()}
        else:
            kind, bits = ("int8" if self.config.bits == 8 else "int4"), self.config.bits
            codes = {name: quantised(weight, bits) for name, weight in weights.items()}
            made = {n: new_part(kind, n, w).restore(codes[n][0], codes[n][1].log()) for n, w in weights.items()}
        return {n: t for name, each in network.items() for n, t in made.get(name, {name: each}).items()}

    def _masks(self, weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """The largest weights of each layer, so many that ``sparsity`` of them all are zero."""
        sizes = [each.numel() for each in weights.values()]
        total = sum(sizes) - round(sparsity * sum(sizes))
        counts = share_out(total, [float(sum(each.shape)) for each in weights.values()], sizes)
        return {
            name: cut_mask(each.abs(), 1 - count / each.numel())
            for (name, each), count in zip(weights.items(), counts, strict=True)
        }
