"""Merged adapters against those that PEFT makes of the whole model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from rpg.merging.adapters import PEFT_DENSITY, PEFT_METHODS, PeftMerges
from rpg.merging.methods import NUM_MERGED, draw_shares
from tests.rpg.merging.test_merge_adapters import changes
from tests.tokenization.lora.test_collected import Net, save
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint

SHAPE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def product(adapter: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return adapter[name].double() @ adapter[name.replace("lora_B", "lora_A")].double()


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def adapters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Path]]:
    """A model with six adapters, and their folders."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **SHAPE))
    config = LoraConfig(
        r=3, lora_alpha=12, target_modules=["q_proj", "k_proj", "down_proj"], use_dora=request.param,
        init_lora_weights=False, alpha_pattern={"k_proj": 5},
    )  # fmt: skip
    adapted = get_peft_model(model, config, "a0")
    for number in range(1, 6):
        adapted.add_adapter(f"a{number}", config)
    for name, value in adapted.named_parameters():
        if "lora_magnitude" in name:
            value.data += torch.rand_like(value)
    adapted.save_pretrained(folder)
    return adapted, [folder / f"a{number}" for number in range(6)]


def opened(folders: list[Path]) -> PeftMerges:
    checkpoints = [Checkpoint.open(each / "adapter_model.safetensors") for each in folders]
    return PeftMerges((folders[0] / "adapter_config.json").read_text(), checkpoints)


@pytest.mark.parametrize("method", [each for each in PEFT_METHODS if "dare" not in each])
def test_a_merged_adapter_is_the_one_that_peft_makes_of_the_whole_model(adapters, method: str) -> None:
    model, folders = adapters
    weights = [0.4, 0.3, 0.2, 0.1]
    merges = opened(folders)
    found = merges.merge(method, torch.tensor([0.3, -0.5, 0.1, 0.4, 0.0, 0.2]))
    names = ["a3", "a0", "a5", "a2"]
    model.add_weighted_adapter(names, weights, method, method.removeprefix("peft_"), density=PEFT_DENSITY)
    theirs = get_peft_model_state_dict(model, adapter_name=method)
    first = merges.adapters[0]
    assert list(found) == first.order
    for name in first.order:
        assert found[name].dtype == first.info(name).dtype and tuple(found[name].shape) == first.info(name).shape
        if "lora_B" in name:
            scaling = (5 if "k_proj" in name else 12) / 3  # PEFT's merged adapters have a scaling of 1
            assert torch.allclose(scaling * product(found, name), product(theirs, name), atol=1e-5), name
        elif "magnitude" in name:
            own = [merges.adapters[int(each[1:])].tensor(name) for each in names]
            mean = sum(w * each for w, each in zip(weights, own, strict=True))
            assert torch.allclose(found[name], mean)


def test_dare_goes_by_its_seed_and_leaves_the_global_state(adapters) -> None:
    _, folders = adapters
    merges, shares = opened(folders), torch.ones(6) / 6
    state = torch.get_rng_state()
    one, again, other = (merges.merge("peft_dare_linear", shares, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = next(each for each in one if "lora_A" in each)
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])


def test_a_single_adapter_merges_to_itself(adapters) -> None:
    _, folders = adapters
    merges = opened(folders)
    own = merges.adapters[2].state_dict()
    shares = torch.eye(6)[2]
    for method in ("peft_linear", "peft_svd"):
        made = merges.merge(method, shares)
        assert all(
            torch.allclose(product(made, name), product(own, name), atol=1e-5) for name in own if "lora_B" in name
        )
    assert opened(folders[:1]).methods == ()


def test_average_shares_are_equal_and_of_few() -> None:
    shares = draw_shares([0] * 10, 3, torch.Generator().manual_seed(0))
    assert (shares > 0).sum(1).tolist() == [NUM_MERGED] * 3 and torch.allclose(shares.sum(1), torch.ones(3).double())
    assert torch.allclose(draw_shares([0] * 2, 1, torch.Generator()), torch.full((1, 2), 0.5).double())


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "alpha_pattern": {"^blocks.0.q": 3}},
    "own biases": {"bias": "lora_only"},
    "biases": {"lora_bias": True},
    "whole modules": {"modules_to_save": ["conv"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merges_of_variants_are_those_of_the_merged_networks(tmp_path: Path, variant: str) -> None:
    """The mean update's largest components, and the mean of all else; PEFT's own of rsLoRA is √r too large."""
    folders = [save(tmp_path / str(number), number, **VARIANTS[variant]) for number in range(2)]
    weights = torch.tensor([0.25, 0.75]).double()
    found = changes(written(opened(folders).merge("peft_svd", weights), folders[0], tmp_path / "made"))
    own = [changes(folder) for folder in folders]
    for name, value in found.items():
        dense = sum(w * each[name] for w, each in zip(weights, own, strict=True))
        if "weight" in name and value.dim() == 2 and value.abs().max() > 0:  # of rank 8, of which 4 are kept
            left, values, right = torch.linalg.svd(dense, full_matrices=False)
            dense = left[:, :4] * values[:4] @ right[:4]
        torch.testing.assert_close(value, torch.as_tensor(dense), atol=1e-6, rtol=1e-5)


def test_pairs_of_embeddings_and_convolutions_are_merged_as_pairs(tmp_path: Path) -> None:
    folders = [save(tmp_path / str(number), number, target_modules=["words"]) for number in range(2)]
    merges, shares = opened(folders), torch.tensor([0.5, 0.5])
    made = merges.merge("peft_svd", shares)
    a = next(name for name in made if "lora_embedding_A" in name)
    pair = [
        (each[a.replace("_A", "_B")] @ each[a]).double() for each in (made, *(x.state_dict() for x in merges.adapters))
    ]
    left, values, right = torch.linalg.svd((pair[1] + pair[2]) / 2, full_matrices=False)
    torch.testing.assert_close(pair[0], left[:, :4] * values[:4] @ right[:4], atol=1e-6, rtol=1e-4)
    grouped = [save(tmp_path / f"g{number}", number, target_modules=["conv"]) for number in range(2)]
    assert opened(grouped).methods == ()


def test_how_far_dora_merges_are_from_the_merged_networks(tmp_path: Path) -> None:
    """Magnitudes are weighted means: nearer to the mean of the merged networks than PEFT's, which takes the base's.

    All adapters have the same A, so that nothing is lost with components.
    """
    folders = [save(tmp_path / str(number), number, use_dora=True, target_modules=["q"]) for number in range(2)]
    states = [Checkpoint.open(folder).state_dict() for folder in folders]
    shared = {name: value for name, value in states[0].items() if "lora_A" in name}
    save_checkpoint(folders[1] / "adapter_model.safetensors", {**states[1], **shared})
    merges = opened(folders)
    made = merges.merge("peft_svd", torch.tensor([0.5, 0.5]))
    first = merges.adapters[0].state_dict()
    theirs = {
        name: Net().state_dict()[f"blocks.{name.split('blocks.')[1][0]}.q.weight"].norm(dim=1)
        for name in made
        if "magnitude" in name
    }
    own = [changes(folder) for folder in folders]
    errors = []
    for tensors in (made, {**made, **theirs}):
        found = changes(written(tensors, folders[0], tmp_path / f"made{len(errors)}"))
        away = [(found[n] - (own[0][n] + own[1][n]) / 2).norm() / own[0][n].norm() for n in found if "q.weight" in n]
        errors.append(float(torch.stack(away).max()))
    assert list(made) == list(first) and errors[0] < 0.8 * errors[1], errors


def written(tensors: Mapping[str, torch.Tensor], like: Path, folder: Path) -> Path:
    folder.mkdir()
    save_checkpoint(folder / "adapter_model.safetensors", tensors)
    shutil.copy(like / "adapter_config.json", folder)
    return folder
