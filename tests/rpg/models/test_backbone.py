"""Backbones: one signature, causality, residuals, checkpointing."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from rpg.models.backbone import LSTMConfig, NoneConfig, TransformerConfig
from rpg.models.mamba2 import Mamba2Config
from rpg.models.recurrent_diffusion import BackboneConfig, build_backbone

MAMBA = {"d_model": 32, "d_state": 8, "headdim": 16, "chunk_size": 4}
CONFIGS = [
    LSTMConfig(d_model=32),
    LSTMConfig(d_model=32, norm=True, residual=False),
    TransformerConfig(d_model=32),
    NoneConfig(d_model=32),
    NoneConfig(d_model=32, linear=True),
    Mamba2Config(**MAMBA),
    Mamba2Config(**MAMBA, residual=False, norm=False),
]


def identity(config):
    return f"{config.kind}-{config.model_dump_json(exclude_defaults=True)}"


@pytest.mark.parametrize("config", CONFIGS, ids=identity)
def test_later_tokens_never_change_earlier_prototypes(config):
    torch.manual_seed(0)
    backbone = build_backbone(config)
    x = torch.randn(2, 11, 32)
    y = backbone(x)
    assert y.shape == (2, 11, backbone.d_output) and backbone.d_model == 32
    for j in (1, 5, 10):
        changed = x.clone()
        changed[:, j] = torch.randn(2, 32)
        difference = (backbone(changed) - y).abs().amax(dim=(0, 2))  # [L]
        assert difference[:j].max() < 1e-5
        assert difference[j] > 1e-3


@pytest.mark.parametrize("config", [LSTMConfig(d_model=32), TransformerConfig(d_model=32), Mamba2Config(**MAMBA)])
def test_recurrent_backbones_remember(config):
    torch.manual_seed(0)
    backbone = build_backbone(config)
    x = torch.randn(1, 9, 32, requires_grad=True)
    (backbone(x)[0, -1] * torch.randn(backbone.d_output)).sum().backward()  # of a layer norm the sum is constant
    assert x.grad is not None and (x.grad[0].abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("config", [LSTMConfig(d_model=32), TransformerConfig(d_model=32), Mamba2Config(**MAMBA)])
def test_checkpointing_changes_no_gradient(config):
    plain = build_backbone(config)
    recomputing = build_backbone(config.model_copy(update={"checkpointing": True}))
    recomputing.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, 32)
    for backbone in (plain, recomputing):
        backbone(x).square().sum().backward()
    for expected, found in zip(plain.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_lstm_residual_connection_passes_the_input():
    backbone = build_backbone(LSTMConfig(d_model=16))
    for parameter in backbone.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(backbone(x), x)


def test_transformer_is_attention_written_out():
    torch.manual_seed(0)
    block = build_backbone(TransformerConfig(d_model=8, num_layers=1, num_heads=2)).layers[0]
    x = torch.randn(1, 6, 8)
    q, k, v = block.qkv(block.attention_norm(x)).chunk(3, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[0, :, head] @ k[0, :, head].T / 2
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[0, :, head])
    y = x + block.attention_out(torch.cat(heads, dim=-1))
    y = y + block.mlp_out(torch.nn.functional.gelu(block.mlp_in(block.mlp_norm(y))))
    torch.testing.assert_close(block(x), y)


def test_widths_join_layers_of_different_width():
    config = Mamba2Config(d_model=32, widths=(32, 48), d_state=8, headdim=16)
    backbone = build_backbone(config)
    assert (backbone.d_model, backbone.d_output, config.d_output) == (32, 48, 48)
    assert backbone(torch.randn(2, 5, 32)).shape == (2, 5, 48)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"kind": "mamba2", "d_model": 32, "widths": [48, 32]}, "widths"),
        ({"kind": "mamba2", "d_model": 32, "headdim": 48}, "headdim"),
        ({"kind": "transformer", "d_model": 30, "num_heads": 4}, "num_heads"),
        ({"kind": "lstm", "num_layer": 3}, "num_layer"),
        ({"kind": "gru"}, "kind"),
    ],
)
def test_impossible_configurations_name_the_field(section, field):
    with pytest.raises(ValidationError, match=field):
        TypeAdapter(BackboneConfig).validate_python(section)
