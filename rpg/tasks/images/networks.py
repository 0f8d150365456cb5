"""Small image classifiers that serve as target networks, their images, and what they answer.

``cnn`` and ``vit`` are ours, ``vit-tiny``, ``convnext-tiny`` and ``convnext-large`` are timm's; the five ``*-mini``
networks follow p-diff (arXiv 2402.13144, appendix A.2), with their spatial sizes derived from the image so that they
also fit images smaller than the paper's 32×32.

`SmallCNN` side by side are matrix products alone, with gradients in two thirds of grouped convolutions' time. Images
come last everywhere, and the pixels of a pooling window first, so that pooling compares whole blocks of memory.
T networks, B images, C channels, S height and width of the images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from rpg.tasks import load_callable
from tokenization.compressed.form import dense
from tokenization.errors import InputError


def small_cnns(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits ``[T, B, classes]`` of T `SmallCNN`, ``weights`` ``[T, *shape]``, on the same images ``[B, C, S, S]``."""
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


@fx.wrap
def pooled(images: Tensor) -> Tensor:
    """`F.max_pool2d` of 2×2, bit by bit; without gradients in a sixth of its time on a CPU. Sizes are even."""
    if torch.is_grad_enabled():
        return F.max_pool2d(images, 2)
    rows = torch.maximum(images[..., ::2], images[..., 1::2])
    return torch.maximum(rows[..., ::2, :], rows[..., 1::2, :])


class SmallCNN(nn.Module):
    """Two 3×3 convolutions (8 and 16 channels) with pooling, a linear layer of 32 and the classifier; S = 4, 8, …"""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.linear1 = nn.Linear(16 * (image_size // 4) ** 2, 32)
        self.linear2 = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] → logits [B, classes]."""
        hidden = pooled(F.relu(self.conv1(images)))
        hidden = pooled(F.relu(self.conv2(hidden)))
        return self.linear2(F.relu(self.linear1(hidden.flatten(1))))

    side_by_side = staticmethod(small_cnns)


class ConvNetMini(nn.Module):
    """p-diff's ConvNet-mini: convolutions 8 (7×7), 8 and 4 (3×3), linear layers of 16 and the classes.

    The paper pools 32×32 images down to 4×4, so that ``linear1`` reads 64 values; smaller images are pooled fewer
    times to keep that size.

    Args:
        pooled: height and width that ``linear1`` reads. The paper's table 6 counts 24,262 values, more than the sizes
            it lists have; 19 on images of 32×32 is the nearest.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, pooled: int = 4) -> None:
        super().__init__()
        self.pooled = pooled
        self.conv1 = nn.Conv2d(in_channels, 8, 7, padding=3)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 4, 3, padding=1)
        self.linear1 = nn.Linear(4 * pooled**2, 16)
        self.linear2 = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] → logits [B, classes]."""
        hidden = images
        for conv in (self.conv1, self.conv2, self.conv3):
            hidden = F.relu(conv(hidden))
            if hidden.shape[-1] > 4 and hidden.shape[-1] >= 2 * self.pooled:
                hidden = F.max_pool2d(hidden, 2)
        hidden = F.adaptive_avg_pool2d(hidden, self.pooled)
        return self.linear2(F.relu(self.linear1(hidden.flatten(1))))


class MLPMini(nn.Module):
    """p-diff's MLP-mini: linear layers of 64, 16 and the classes on the flattened image."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_channels * image_size**2, 64)
        self.linear2 = nn.Linear(64, 16)
        self.linear3 = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] → logits [B, classes]."""
        return self.linear3(F.relu(self.linear2(F.relu(self.linear1(images.flatten(1))))))


class ResidualBlock(nn.Module):
    """Bottleneck residual block with batch norm: 1×1 down, 3×3, 1×1 up, all at one resolution."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, bottleneck, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(bottleneck)
        self.conv2 = nn.Conv2d(bottleneck, bottleneck, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.conv3 = nn.Conv2d(bottleneck, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, S, S] → [B, C, S, S]."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        return F.relu(x + self.norm3(self.conv3(hidden)))


class ResNetMini(nn.Module):
    """p-diff's ResNet-mini: one convolution, two bottleneck blocks (8 channels, bottleneck 4), linear 16, classes.

    Args:
        pooled: height and width that ``linear1`` reads; 14 is nearest to the 25,138 values of the paper's table 6.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, pooled: int = 4) -> None:
        super().__init__()
        self.pooled = pooled
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.block1 = ResidualBlock(8, 4)
        self.block2 = ResidualBlock(8, 4)
        self.linear1 = nn.Linear(8 * pooled**2, 16)
        self.linear2 = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] → logits [B, classes]."""
        hidden = F.relu(self.norm1(self.conv1(images)))
        hidden = self.block2(self.block1(hidden))
        hidden = F.adaptive_avg_pool2d(hidden, self.pooled)
        return self.linear2(F.relu(self.linear1(hidden.flatten(1))))


class NarrowAttention(nn.Module):
    """Self-attention whose heads are together narrower than the token (timm's are exactly as wide)."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * num_heads * head_width)
        self.proj = nn.Linear(num_heads * head_width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, tokens, width] → [B, tokens, width]; the signature is the one timm's blocks call."""
        # [B, tokens, 3 · heads · head width] → three of [B, heads, tokens, head width]
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def _vit(channels: int, image_size: int, num_classes: int, *, patches: int = 4, **sizes: Any) -> nn.Module:
    """A timm VisionTransformer of ``patches``² tokens; of width 32, depth 3 and 4 heads without other sizes."""
    from timm.models.vision_transformer import VisionTransformer  # imported here: slow, and few networks need it

    sizes = sizes or {"embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
    patch_size = max(1, image_size // patches)
    return VisionTransformer(image_size, patch_size, in_chans=channels, num_classes=num_classes, **sizes)


def _convnext(in_channels: int, image_size: int, num_classes: int, size: str) -> nn.Module:
    """timm's ``convnext_large`` (196 M parameters) or ``convnext_tiny`` (28 M), made to be trained on few steps.

    timm scales every residual branch by 1e-6 at the start, which suits long schedules; here the branches count in full.
    Raises InputError if the image is too small for a stride of 32.
    """
    from timm import create_model

    if image_size < 32:
        raise InputError(f"convnext-{size} reads images from 32 pixels on, not {image_size}; set task.image_size to 32")
    return create_model(f"convnext_{size}", in_chans=in_channels, num_classes=num_classes, ls_init_value=1.0)


def _vit_mini(channels: int, image_size: int, num_classes: int) -> nn.Module:
    """p-diff's ViT-mini: 64 tokens of width 64, depth 4, 4 heads of width 8, feed-forward width 64."""
    network: Any = _vit(
        channels, image_size, num_classes, patches=8, embed_dim=64, depth=4, num_heads=4, mlp_ratio=1.0,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    for block in network.blocks:
        block.attn = NarrowAttention(64, num_heads=4, head_width=8)
    # a token is one pixel of 8×8 images: beside its embedding timm's 0.02 would hide where it lies for long
    nn.init.normal_(network.pos_embed, std=0.5)
    return network


def _convnext_mini(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """p-diff's ConvNeXt-mini: stage depths (1, 2, 2, 2), stage widths (16, 32, 32, 32)."""
    from timm.models.convnext import ConvNeXt

    shape: dict[str, Any] = {"depths": (1, 2, 2, 2), "dims": (16, 32, 32, 32), "patch_size": max(1, image_size // 8)}
    return ConvNeXt(in_chans=in_channels, num_classes=num_classes, **shape)


_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "cnn": SmallCNN,
    "vit": _vit,
    "vit-coarse": functools.partial(_vit, patches=2),
    "vit-tiny": functools.partial(_vit, embed_dim=192, depth=12, num_heads=3),  # 5.4 M values, vit_tiny_patch16_224
    "convnet-mini": ConvNetMini,
    "convnet-mini-24k": functools.partial(ConvNetMini, pooled=19),
    "mlp-mini": MLPMini,
    "resnet-mini": ResNetMini,
    "resnet-mini-25k": functools.partial(ResNetMini, pooled=14),
    "vit-mini": _vit_mini,
    "convnext-mini": _convnext_mini,
    "convnext-tiny": functools.partial(_convnext, size="tiny"),
    "convnext-large": functools.partial(_convnext, size="large"),
}


def build_network(name: str, *, in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """An untrained target network, drawn from torch's global random state. Raises InputError for an unknown name."""
    if name not in _BUILDERS:
        raise InputError(f"there is no network {name!r}; choose one of {', '.join(_BUILDERS)}")
    return _BUILDERS[name](in_channels, image_size, num_classes)


def timm_network(name: str, cure: str, **arguments: Any) -> nn.Module:
    """timm's network, from torch's global random state. Raises InputError, with the cure, if it cannot be made."""
    import timm

    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # timm and the hub raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"timm cannot make task.network {name} ({reason}); {cure}") from None


def own_network(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The module that a class or function of the user's makes. Raises InputError if it makes none."""
    try:
        network = load_callable(reference, "task.network")(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"task.network {reference} does not take task.network_arguments ({error})") from None
    if not isinstance(network, nn.Module):
        raise InputError(f"task.network {reference} makes a {type(network).__name__}; it has to make a torch module")
    return network


@dataclass(frozen=True)
class ImageSplits:
    """Images and labels by split (``train``, ``validation``, ``test``).

    Attributes:
        images: float32 [n, C, S, S], standardised with the statistics of the training images alone.
        labels: int64 [n].
        mean, std: of the training images' values before they were standardised.
    """

    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    num_classes: int
    mean: float = 0.0
    std: float = 1.0

    def check(self, split: str) -> str:
        """Return ``split`` if it exists. Raises InputError otherwise."""
        if split not in self.images:
            raise InputError(f"there is no split {split!r}; choose one of {', '.join(self.images)}")
        return split

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.images["train"].shape[1:]
        return channels, height, width


def predict_images(network: nn.Module, state_dicts: Iterable[Mapping[str, Tensor]], images: Tensor) -> Tensor:
    """The answers int64 ``[num, n]`` of networks of one structure on the same images ``[n, C, S, S]``.

    A plain loop: for networks of this size it is faster on CPU than ``vmap``, which turns convolutions into grouped
    ones, and it holds one network at a time. Errors as of `logits_of`.
    """
    predictions = [answers(logits_of(network, each, images, f"network {i}")) for i, each in enumerate(state_dicts)]
    return torch.stack(predictions) if predictions else torch.empty(0, len(images), dtype=torch.long)


def logits_of(network: nn.Module, state_dict: Mapping[str, Tensor], images: Tensor, where: str) -> Tensor:
    """Logits ``[n, classes]`` of one state dict, in the network's dtype.

    Raises InputError, naming the tensor, if it does not fit the network, whose own weights do not matter.
    """
    expected = network.eval().state_dict()
    if state_dict.keys() != expected.keys():  # pruned or quantised weights have tensors of their own
        state_dict = dense(state_dict)
    check_structure(state_dict, expected, where)
    weights = {name: state_dict[name].to(like.dtype) for name, like in expected.items()}
    with torch.no_grad():
        return functional_call(network, weights, (images,))


def answers(logits: Tensor) -> Tensor:
    """The class of the largest logit, [n, classes] → [n]; 0 where one is not finite, since nothing was decided."""
    return logits.argmax(1).where(logits.isfinite().all(1), 0)


def check_structure(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raise InputError, naming the first tensor at fault, unless names and shapes are as expected."""
    for name, like in expected.items():
        if name not in state_dict:
            raise InputError(
                f"{where} has no tensor {name!r} of shape {tuple(like.shape)}; give networks of the task's structure"
            )
        if state_dict[name].shape != like.shape:
            raise InputError(
                f"{where}: tensor {name!r} has the shape {tuple(state_dict[name].shape)} where the task's network has "
                f"{tuple(like.shape)}; give networks of its structure"
            )
    extra = [name for name in state_dict if name not in expected]
    if extra:
        raise InputError(
            f"{where} has a tensor {extra[0]!r}, which the task's network lacks; give networks of its structure"
        )


SHIFT, ANGLE, SCALE = 0.8, 12.0, 0.12
"""The largest alterations: pixels along each axis, degrees, and relative change of size along each axis."""


def augment(images: Tensor, generator: torch.Generator, *, fill: float = 0.0) -> Tensor:
    """Images ``[B, C, H, W]``, each moved, turned and scaled at random; ``fill`` is the value outside the image."""
    num, _, height, width = images.shape

    def draw(limit: float) -> Tensor:
        return (torch.rand(num, generator=generator) * 2 - 1) * limit

    turn = draw(math.radians(ANGLE))
    stretch_x, stretch_y = 1 + draw(SCALE), 1 + draw(SCALE)
    move_x, move_y = draw(2 * SHIFT / width), draw(2 * SHIFT / height)
    cos, sin = turn.cos(), turn.sin()
    rows = [cos * stretch_x, -sin * stretch_x, move_x], [sin * stretch_y, cos * stretch_y, move_y]
    matrices = torch.stack([torch.stack(row, 1) for row in rows], 1)  # [B, 2, 3]
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images - fill, grid, mode="bilinear", align_corners=False) + fill
