"""Disk → tokens → disk for real architectures: the reloaded network computes the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.rows import CheckpointWriter
from tokenization.zoo.zoo import Zoo

LARGE = ("resnet18", "resnet50", "vit_small_patch16_224", "vit_base_patch16_224", "convnext_large")
TIMM_NETWORKS = [
    "test_resnet",
    "test_vit",
    "test_convnext",
    *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE),
]


def perturb(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """The state dict a little further on in training, batch statistics included."""
    noise = 0.01 * torch.randn(1021, generator=torch.Generator().manual_seed(seed))
    state_dict = network.state_dict()
    for tensor in state_dict.values():
        if tensor.is_floating_point():
            added = noise.repeat(-(-tensor.numel() // len(noise)))[: tensor.numel()].view(tensor.shape)
            tensor.add_(added.abs() if tensor.dim() == 1 else added)
    return state_dict


def through_tokens(zoo: Zoo, options: TokenOptions, index: int, path: Path, dtype: torch.dtype) -> TokenLayout:
    """Encode an entry of the zoo and stream it back to disk, by way of a saved layout."""
    TokenLayout.fit(zoo, options).save(path.parent)
    layout = TokenLayout.load(path.parent)
    tokens = layout.encode(zoo.checkpoint(index), dtype)
    with CheckpointWriter(path, layout) as writer:
        for first in range(0, layout.num_tokens, 300):
            writer.write(first, tokens[first : first + 300])
    return layout


def assert_same_bits(path: Path, expected: dict[str, Tensor]) -> None:
    loaded = load_file(path)
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert torch.equal(loaded[name], tensor), name


def assert_round_trips(
    tmp_path: Path, network: nn.Module, reload: Callable[[Path], Tensor], expected: Callable[[], Tensor], size: int
) -> None:
    """Bit exact through float64 tokens and without normalisation, the same outputs through float32 tokens."""
    zoo = Zoo.create(tmp_path / "zoo")
    zoo.append(perturb(network, 1), run=0, step=0)
    original = perturb(network, 2)
    zoo.append(original, run=0, step=1)
    outputs = expected()
    # Counters are constants of the zoo's first checkpoint; these networks have not counted anything.
    for number, (normalization, pack, dtype) in enumerate(
        [("residual", True, torch.float32), ("layer", False, torch.float64), ("none", True, torch.float32)]
    ):
        folder = tmp_path / f"out{number}"
        folder.mkdir()
        through_tokens(zoo, TokenOptions(size, normalization, pack=pack), 1, folder / "model.safetensors", dtype)
        if normalization == "residual":
            torch.testing.assert_close(reload(folder / "model.safetensors"), outputs, rtol=1e-5, atol=1e-5)
        else:
            assert_same_bits(folder / "model.safetensors", original)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", TIMM_NETWORKS)
def test_timm(tmp_path: Path, name: str):
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    images = torch.randn(1, *network.pretrained_cfg["input_size"])
    size = 16384 if name in ("vit_base_patch16_224", "convnext_large") else 8192 if name in LARGE else 500

    @torch.no_grad()
    def reload(path: Path) -> Tensor:
        fresh = timm.create_model(name).eval()
        fresh.load_state_dict(load_file(path), strict=True)
        return fresh(images)

    with torch.no_grad():
        assert_round_trips(tmp_path, network, reload, lambda: network(images), size)


def _transformer(kind: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **sizes)
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=99, **sizes))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4))


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_transformers(tmp_path: Path, kind: str):
    network = _transformer(kind).eval()
    ids = torch.arange(10)[None]

    @torch.no_grad()
    def reload(path: Path) -> Tensor:
        network.config.save_pretrained(path.parent)
        fresh, info = type(network).from_pretrained(path.parent, output_loading_info=True, dtype=network.dtype)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        return fresh.eval()(ids).logits.float()

    with torch.no_grad():
        assert_round_trips(tmp_path, network, reload, lambda: network(ids).logits.float(), 100)
    if kind == "gpt2":
        checkpoint = Zoo.open(tmp_path / "zoo").checkpoint(0)
        assert checkpoint.ties == {"lm_head.weight": "transformer.wte.weight"}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_peft_adapters(tmp_path: Path, use_dora: bool):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=use_dora, init_lora_weights=False)

    def base() -> nn.Module:
        return _transformer("llama").float()

    network = peft.get_peft_model(base(), config).eval()
    ids = torch.arange(10)[None]
    zoo = Zoo.create(tmp_path / "zoo")
    for step in range(3):
        for name, parameter in network.named_parameters():
            if "lora" in name:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
        network.save_pretrained(tmp_path / "adapter")
        zoo.append(Checkpoint.open(tmp_path / "adapter").state_dict(), run=0, step=step)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    original = load_file(path)
    with torch.no_grad():
        expected = network(ids).logits
    for form, dtype in (("svd", torch.float32), ("aligned", torch.float64), ("none", torch.float64)):
        layout = through_tokens(zoo, TokenOptions(64, pack=True, lora_canonical=form), 2, path, dtype)  # type: ignore[arg-type]
        assert {group.kind for group in layout.describe()} == {"adapter"}
        fresh = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(fresh(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert_same_bits(path, original)
