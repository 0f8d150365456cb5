"""Adapters as people have them become one zoo: every one computes there what PEFT makes of it by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tokenization.checkpoint.checkpoint import save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 8) * 0.1)
        self.gate = nn.Parameter(torch.randn(3, 8, 8) * 0.1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 12), nn.Linear(8, 12)
        self.conv = nn.Conv2d(8, 16, 3, groups=2)
        self.words = nn.Embedding(9, 8)
        self.experts = Experts()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What convolution and embedding make of ``[B, 8, 3, 3]``."""
        found = [block.conv(x).flatten(1) + block.words(torch.arange(9)).sum() for block in self.blocks]
        return torch.cat(found, 1)


def save(folder: Path, seed: int, **options: Any) -> Path:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], **options}
    base = Net()  # which has a seed of its own
    torch.manual_seed(seed)
    network = get_peft_model(base, LoraConfig(**options))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    network.save_pretrained(folder)
    set_config(folder, base_model_name_or_path=options.get("base_model_name_or_path", "base"))
    return folder


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def merged(folder: Path) -> dict[str, torch.Tensor]:
    """The network with the adapter in it, as PEFT makes it, and what it computes; PEFT merges no grouped layers."""
    network = PeftModel.from_pretrained(Net(), folder)
    outputs = {"outputs": network(torch.ones(1, 8, 3, 3).cumsum(1) / 8).detach()}
    return outputs if "layers" in str(folder) else {**network.merge_and_unload().state_dict(), **outputs}


def stored(zoo: Zoo, index: int, folder: Path) -> Path:
    """An adapter of the zoo, under the zoo's configuration."""
    save_checkpoint((folder / "adapter_model.safetensors"), zoo.state_dict(index))
    shutil.copy(zoo.path / "adapter_config.json", folder)
    return folder


EXPERTS = {"target_modules": [], "target_parameters": ["experts.up"]}
EVERYWHERE = {"target_modules": ["q", "words", "conv"]}

ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {  # and whether any value had to change
    "targets": ({}, {"target_modules": r".*\.(q|v)"}, False),
    "named targets": ({}, {"target_modules": [f"blocks.{i}.{name}" for i in (1, 0) for name in "vq"]}, False),
    "excluded": ({}, {"target_modules": ["q", "v", "conv"], "exclude_modules": ["conv"]}, False),
    "patterns": (
        {"rank_pattern": {"^blocks.0.q": 2}, "alpha_pattern": {"^blocks.0.q": 4}},
        {"rank_pattern": {r"blocks\.0\.q": 2}, "alpha_pattern": {r".*\.0\.q": 4}},
        False,
    ),
    "ranks by pattern": ({"r": 2, "rank_pattern": {"v": 4}}, {"rank_pattern": {"^blocks.[01].q$": 2}}, False),
    "initial values": ({"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, False),
    "alpha": ({}, {"lora_alpha": 16}, True),
    "odd alpha": ({}, {"lora_alpha": 5}, True),
    "alpha pattern": ({}, {"alpha_pattern": {"^blocks.1.v": 32}}, True),
    "rslora": ({}, {"use_rslora": True}, True),
    "dora": ({"use_dora": True}, {"use_dora": True, "lora_alpha": 24}, True),
    "biases": ({"lora_bias": True}, {"lora_bias": True, "lora_alpha": 32}, True),
    "own biases": ({"bias": "lora_only"}, {"bias": "lora_only", "lora_alpha": 2}, True),
    "layers": (EVERYWHERE, {**EVERYWHERE, "lora_alpha": 12}, True),
    "experts": (EXPERTS, {**EXPERTS, "lora_alpha": 2, "target_parameters": ["blocks.0.experts.up", "up"]}, True),
    "saved modules": ({"modules_to_save": ["conv"]}, {"modules_to_save": ["conv"], "lora_alpha": 1}, True),
}


@pytest.mark.parametrize("name", ALIKE)
def test_adapters_mean_in_the_zoo_what_they_meant(tmp_path: Path, name: str) -> None:
    tmp_path /= name
    first, second, converted = ALIKE[name]
    folders = [save(tmp_path / "a" / "0", 1, **first), save(tmp_path / "a" / "1", 2, **second)]
    said: list[str] = []
    zoo = collect_from(tmp_path / "a", tmp_path / "zoo", say=said.append, find_runs=False)
    assert [entry.external for entry in zoo.entries] == [True, not converted]
    assert len(said) == converted
    if converted:
        assert ("exactly" in said[0]) == (name not in ("odd alpha", "dora", "layers"))  # ratios 5/8, 3 and 3/2
    for index, folder in enumerate(folders):
        (tmp_path / f"{index}").mkdir(parents=True)
        expected, found = merged(folder), merged(stored(zoo, index, tmp_path / f"{index}"))
        plain = {**Net().state_dict(), "outputs": Net()(torch.ones(1, 8, 3, 3).cumsum(1) / 8)}
        assert any(not torch.equal(value, plain[key]) for key, value in expected.items())
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=2e-7, rtol=2e-6)


APART: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pissa": ({}, {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', but 'plain'"),
    "olora": ({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, "is 'olora', but 'pissa'"),
    "alpha of olora": (
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "olora", "lora_alpha": 4},
        "lora_alpha / r of 'blocks.0.q' is 1.0, but 2.0",
    ),
    "ranks": ({}, {"r": 6}, "the rank of 'blocks.0.q' is 6, but 4"),
    "dora": ({}, {"use_dora": True}, "use_dora is True, but False"),
    "experts": (EXPERTS, {**EXPERTS, "target_parameters": ["experts.gate"]}, r"is \['gate'\], but \['up'\]"),
    "modules": ({}, {"target_modules": ["q"]}, r"tensor '\S+\.v\.lora_A\.weight' is missing"),
    "base": ({}, {"base_model_name_or_path": "other/base"}, "is 'other/base', but 'base' .*--base NAME"),
}


@pytest.mark.parametrize("name", APART)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path, name: str) -> None:
    first, second, message = APART[name]
    save(tmp_path / "a" / "0", 1, **first)
    save(tmp_path / "a" / "1", 2, **second)
    with pytest.raises(InputError, match=message) as error:
        collect_from(tmp_path / "a", tmp_path / "zoo")
    assert "\n" not in str(error.value) and not (tmp_path / "zoo").exists()
    assert len(collect_from(tmp_path / "a" / "1", tmp_path / "zoo")) == 1  # the cure: a zoo of its own


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("fan_in_fan_out", (True, False)),
        ("trainable_token_indices", ([5, 6], [5, 7])),
        ("use_qalora", (True, False)),
        ("alora_invocation_tokens", ([1], None)),
        ("layer_replication", ([[0, 1], [0, 2]], None)),
    ],
)
def test_fields_that_change_the_meaning_of_equal_tensors(tmp_path: Path, field: str, values: tuple[Any, Any]) -> None:
    for number, value in enumerate(values):
        save(tmp_path / "a" / str(number), number)
        set_config(tmp_path / "a" / str(number), **{field: value})
    with pytest.raises(InputError, match=f"{field} is"):
        collect_from(tmp_path / "a", tmp_path / "zoo")


def test_one_base_under_several_paths(tmp_path: Path) -> None:
    cached = "/home/x/.cache/huggingface/hub/models--meta-llama--Llama-2/snapshots/0123abc"
    for number, base in enumerate(("meta-llama/Llama-2", "meta-llama/Llama-2/", cached)):
        save(tmp_path / "a" / str(number), number, base_model_name_or_path=base)
    assert len(collect_from(tmp_path / "a", tmp_path / "zoo")) == 3
    save(tmp_path / "b", 4, base_model_name_or_path="/data/llama")
    with pytest.raises(InputError, match="'/data/llama', but 'meta-llama/Llama-2'"):
        collect_from(tmp_path / "b", tmp_path / "zoo")
    with pytest.raises(InputError, match="say --base meta-llama/Llama-2"):
        collect_from(tmp_path / "b", tmp_path / "zoo", base="llama")
    assert len(collect_from(tmp_path / "b", tmp_path / "zoo", base="meta-llama/Llama-2")) == 4
    both = collect_from([tmp_path / "a", tmp_path / "b"], tmp_path / "zoo2", base="mine")
    config = json.loads((both.path / "adapter_config.json").read_text())
    assert (len(both), config["base_model_name_or_path"], config["r"]) == (4, "mine", 4)
    set_config(tmp_path / "b", base_model_name_or_path="meta-llama/Llama-2", revision="v2")
    with pytest.raises(InputError, match="'meta-llama/Llama-2@v2', but 'meta-llama/Llama-2'"):
        collect_from([tmp_path / "a", tmp_path / "b"], tmp_path / "zoo3")


@pytest.mark.parametrize("left", ["none", "some", "flat"])
def test_what_zero_3_leaves_is_said(tmp_path: Path, left: str) -> None:
    file = save(tmp_path / "a", 0) / "adapter_model.safetensors"
    weights = load_file(file)
    cut = list(weights) if left == "none" else list(weights)[:1]
    empty = {name: weights[name].flatten() if left == "flat" else torch.empty(0) for name in cut}
    save_file({**weights, **empty}, file)
    with pytest.raises(InputError, match=r"ZeRO-3 .*zero_to_fp32"):
        collect_from(tmp_path / "a", tmp_path / "zoo")


def test_untrained_adapters_are_said(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0", 0)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], base_model_name_or_path="base")
    get_peft_model(Net(), config).save_pretrained(tmp_path / "a" / "1")
    set_config(tmp_path / "a" / "1", base_model_name_or_path="base")
    said: list[str] = []
    collect_from(tmp_path / "a", tmp_path / "zoo", say=said.append, find_runs=False)
    assert len(said) == 1 and said[0].startswith("1 adapter(s) change nothing") and said[0].endswith("a/1")


def test_alphas_beside_the_factors(tmp_path: Path) -> None:
    """Adapters without a configuration, whose update is ``alpha / r · up · down``."""
    networks = []
    for number, alpha in enumerate((1.0, 8.0)):
        torch.manual_seed(number)
        weights = {
            "unet.down.alpha": torch.tensor(alpha),
            "unet.down.lora_down.weight": torch.randn(4, 6),
            "unet.down.lora_up.weight": torch.randn(5, 4),
        }
        networks.append(weights)
        save_file(weights, tmp_path / f"{number}.safetensors")
    zoo = collect_from(str(tmp_path / "*.safetensors"), tmp_path / "zoo")
    for index, own in enumerate(networks):
        found = zoo.state_dict(index)
        assert found["unet.down.alpha"] == 1
        products = [w["unet.down.alpha"] * w["unet.down.lora_up.weight"] for w in (own, found)]
        assert torch.equal(*products)  # the ratio is a power of two
