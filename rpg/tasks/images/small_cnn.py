"""Many `SmallCNN` side by side in matrix products alone, with gradients in two thirds of grouped convolutions' time.

Images come last everywhere, and the pixels of a pooling window first, so that pooling compares whole blocks of memory.
T networks, B images, C channels, S height and width of the images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def small_cnns(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits ``[T, B, classes]`` of T networks on the same images ``[B, C, S, S]``.

    Args:
        weights: tensors of `SmallCNN` under their names, ``[T, *shape]``.
        images: what all see.
    """
    size, half = images.shape[-1], images.shape[-1] // 2
    first, second = weights["conv1.weight"], weights["conv2.weight"]
    num, channels, more = len(first), first.shape[1], second.shape[1]
    patches = F.unfold(images, 3, padding=1)[..., _by_window(size, images.device)]  # [B, 9·C, S²]
    patches = patches.permute(1, 2, 0).flatten(1)  # [9·C, S²·B]
    hidden = torch.addmm(weights["conv1.bias"].reshape(-1, 1), first.flatten(0, 1).flatten(1), patches)
    hidden = _ReluPool.apply(hidden.view(num, channels, 4, -1)).view(num, channels * half**2, -1)  # [T, C1·S²/4, B]
    matrix = second.flatten(0, 2).flatten(1) @ _places(half, second)  # [T·C2·C1, S²/4 · S²/4]
    matrix = matrix.view(num, more, channels, half**2, half**2).transpose(2, 3).reshape(num, more * half**2, -1)
    hidden = torch.bmm(matrix, hidden).view(num, more, -1) + weights["conv2.bias"].unsqueeze(2)
    hidden = _ReluPool.apply(hidden.view(num, more, 4, -1)).view(num, more * half**2 // 4, -1)  # [T, C2·S²/16, B]
    hidden = torch.baddbmm(weights["linear1.bias"].unsqueeze(2), weights["linear1.weight"], hidden).relu()
    return torch.baddbmm(weights["linear2.bias"].unsqueeze(2), weights["linear2.weight"], hidden).transpose(1, 2)


def _by_window(size: int, device: torch.device) -> Tensor:
    """The pixels of an image, the upper left ones of all 2×2 windows first, int64 ``[S²]``."""
    return torch.arange(size**2, device=device).view(size // 2, 2, size // 2, 2).permute(1, 3, 0, 2).flatten()


def _places(size: int, like: Tensor) -> Tensor:
    """A 3×3 kernel as a matrix from pixels to pixels: ``[9, out · in]`` of zeros and ones, out by `_by_window`."""
    every = F.unfold(torch.eye(size**2).to(like).view(-1, 1, size, size), 3, padding=1)  # [in, 9, out]
    return every[..., _by_window(size, like.device)].permute(1, 2, 0).flatten(1)


class _ReluPool(torch.autograd.Function):
    """The maximum of four blocks ``[T, C, 4, n]``, and of zero; of equal ones the first has the gradient."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor) -> Tensor:
        first, second, third, fourth = blocks.unbind(2)
        upper, lower = torch.maximum(first, second), torch.maximum(third, fourth)
        largest = torch.maximum(upper, lower).relu_()
        ctx.save_for_backward(first >= second, third >= fourth, upper >= lower, largest)
        return largest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        left_above, left_below, above, largest = ctx.saved_tensors
        gradient = gradient * (largest > 0)
        upper = gradient * above
        parts = gradient.new_empty(*gradient.shape[:2], 4, gradient.shape[2])
        for place, (row, left) in enumerate(((upper, left_above), (gradient - upper, left_below))):
            chosen = torch.mul(row, left, out=parts[:, :, 2 * place])
            torch.sub(row, chosen, out=parts[:, :, 2 * place + 1])
        return parts
