from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from rpg.tasks.images.networks import NarrowAttention, build_network, pooled
from tokenization.errors import InputError


def build(name: str, **changes) -> nn.Module:
    return build_network(name, **{"in_channels": 1, "image_size": 8, "num_classes": 10, **changes})


@pytest.mark.parametrize(
    ("name", "num_values"),
    [
        ("cnn", 3658),
        ("vit", 26762),
        ("vit-tiny", 5345098),
        ("convnet-mini", 2486),
        ("mlp-mini", 5370),
        ("resnet-mini", 2802),
        ("vit-mini", 72714),
        ("convnext-mini", 74218),
    ],
)
def test_sizes_are_a_contract_and_every_parameter_is_used(name, num_values):
    torch.manual_seed(0)
    network = build(name)
    assert sum(parameter.numel() for parameter in network.parameters()) == num_values
    logits = network(torch.randn(4, 1, 8, 8))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_convnext_mini_has_the_papers_size_at_the_papers_images():
    # p-diff, table 6: 74,970 parameters
    network = build("convnext-mini", in_channels=3, image_size=32)
    assert sum(parameter.numel() for parameter in network.parameters()) == 74970


@pytest.mark.parametrize(
    "name", ["cnn", "vit", "vit-tiny", "convnet-mini", "mlp-mini", "resnet-mini", "vit-mini", "convnext-mini"]
)
def test_networks_take_colour_images_of_other_sizes(name):
    network = build(name, in_channels=3, image_size=32, num_classes=5)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_vit_tiny_is_timms():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, in_chans=1, num_classes=10)
    weights = theirs.state_dict()
    assert sum(value.numel() for value in weights.values()) == 5356618
    ours = build("vit-tiny", image_size=32)
    ours.load_state_dict(weights)
    images = torch.randn(3, 1, 32, 32)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(("size", "num_values"), [("tiny", 27_824_746), ("large", 196_239_562)])
def test_convnexts_are_timms_with_branches_in_full_and_need_large_images(size: str, num_values: int):
    with torch.device("meta"):  # without values: 785 MB otherwise
        ours = build(f"convnext-{size}", image_size=32)
        theirs = timm.create_model(f"convnext_{size}", in_chans=1, num_classes=10)
        logits = ours(torch.empty(2, 1, 32, 32))
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}
    assert sum(value.numel() for value in ours.state_dict().values()) == num_values
    assert logits.shape == (2, 10)
    with pytest.raises(InputError, match="set task.image_size to 32"):
        build(f"convnext-{size}")


def test_narrow_attention_equals_torchs_when_as_wide():
    torch.manual_seed(0)
    ours, theirs = NarrowAttention(16, num_heads=4, head_width=4), nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_unknown_network_is_refused():
    with pytest.raises(InputError, match="no network 'lenet'; choose one of cnn, vit"):
        build("lenet")


def test_pooling_without_gradients_is_torchs():
    images = torch.randn(3, 2, 8, 6, generator=torch.Generator().manual_seed(0))
    images[0, 0, :4] = 0.0
    images[1, 1, 3, 3] = float("nan")
    with torch.no_grad():
        torch.testing.assert_close(pooled(images), torch.max_pool2d(images, 2), rtol=0, atol=0, equal_nan=True)
    images = images.nan_to_num().requires_grad_()
    (own,) = torch.autograd.grad(pooled(images).square().sum(), images)
    (theirs,) = torch.autograd.grad(torch.max_pool2d(images, 2).square().sum(), images)
    assert torch.equal(own, theirs)
