"""Merged adapters against the sum of the networks that PEFT merges them into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from rpg.merging.adapters import merge_adapters
from rpg.merging.files import METADATA_KEY
from rpg.merging.methods import Merge, merge_values
from tests.tokenization.lora.test_collected import EVERYWHERE, EXPERTS, Net, merged, save
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError

X = torch.ones(1, 8, 3, 3).cumsum(1) / 8

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "other spelling": ({}, {"target_modules": r".*\.(q|v)"}),
    "alpha": ({}, {"lora_alpha": 3}),
    "rslora": ({"use_rslora": True}, {"lora_alpha": 5}),
    "ranks": ({"r": 2}, {"r": 3, "rank_pattern": {"^blocks.0.q": 1}, "alpha_pattern": {"v": 7}}),
    "biases": ({"lora_bias": True}, {"lora_bias": True, "lora_alpha": 2}),
    "own biases": ({"bias": "all"}, {"bias": "all"}),
    "experts": (EXPERTS, {**EXPERTS, "r": 2, "lora_alpha": 5}),
    "saved modules": ({"modules_to_save": ["conv"]}, {"modules_to_save": ["conv"]}),
}


def changes(folder: Path) -> dict[str, torch.Tensor]:
    """By how much PEFT's merged network differs from the base."""
    plain = Net().state_dict()
    return {name: value.double() - plain[name] for name, value in merged(folder).items() if name in plain}


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_makes_the_merged_network(tmp_path: Path, kind: str, method: str) -> None:
    folders = [save(tmp_path / str(number), number, **options) for number, options in enumerate(KINDS[kind])]
    merge = Merge(method, [1.0, 2.0] if method == "linear" else None, t=0.25 if method == "slerp" else None)
    found = changes(merge_adapters(folders, merge, tmp_path / "out"))
    weights, options = merge.settled(2)
    own = [changes(folder) for folder in folders]
    assert any(value.abs().max() > 1e-3 for value in found.values())
    for name, value in found.items():
        if method == "slerp" and ("bias" in name or "conv" in name):
            continue  # values that replace the base's are on the arc of values, not of changes
        values = torch.stack([each[name].flatten() for each in own])
        expected = merge_values(method, values, None, weights, **options)
        torch.testing.assert_close(value.flatten(), expected, atol=1e-6, rtol=1e-5)


def test_layers_that_peft_does_not_merge_compute_the_sum(tmp_path: Path) -> None:
    """Grouped convolutions and embeddings: outputs are linear in the update."""
    folders = [save(tmp_path / str(number), number, **EVERYWHERE, r=4 + 2 * number) for number in range(2)]
    out = merge_adapters(folders, Merge("linear", [1.0, -0.5], normalize=False), tmp_path / "out")
    one, other, both = (PeftModel.from_pretrained(Net(), each)(X).double() for each in (*folders, out))
    plain = Net()(X).double()
    torch.testing.assert_close(both - plain, (one - plain) - 0.5 * (other - plain), atol=1e-5, rtol=1e-5)


def test_model_stock_of_adapters_begins_at_the_base(tmp_path: Path) -> None:
    folders = [save(tmp_path / str(number), number) for number in range(3)]
    found = changes(merge_adapters(folders, Merge("model_stock"), tmp_path / "out"))
    own = [changes(folder) for folder in folders]
    for name, value in found.items():
        values = torch.stack([each[name].flatten() for each in own])
        expected = merge_values("model_stock", values, torch.zeros(values.shape[1]), torch.ones(3) / 3)
        torch.testing.assert_close(value.flatten(), expected, atol=1e-6, rtol=1e-4)


def test_the_folder_says_what_it_is_made_of(tmp_path: Path) -> None:
    folders = [save(tmp_path / str(number), number, base_model_name_or_path=f"b{number}") for number in range(2)]
    with pytest.raises(InputError, match="'b1', but 'b0' .*--base NAME"):
        merge_adapters(folders, Merge("linear"), tmp_path / "out")
    out = merge_adapters(folders, Merge("linear"), tmp_path / "out", base="mine")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("mine", 8, 8)
    record = json.loads(Checkpoint.open(out).metadata[METADATA_KEY])
    assert [(part["path"], part["weight"]) for part in record["parts"]] == [(str(each), 0.5) for each in folders]


REFUSED = {
    "ties": ({}, Merge("ties"), "full rank, which no adapter holds"),
    "dare_linear": ({}, Merge("dare_linear"), "full rank"),
    "dora": ({"use_dora": True}, Merge("linear"), "use_dora set, and a sum of such adapters is not an adapter"),
    "pissa": ({"init_lora_weights": "pissa"}, Merge("linear"), "init_lora_weights 'pissa'"),
    "stock": ({"modules_to_save": ["conv"]}, Merge("model_stock"), "replaces one of the base"),
    "modules": ({"target_modules": ["q"]}, Merge("linear"), "is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_by_name(tmp_path: Path, name: str) -> None:
    options, merge, message = REFUSED[name]
    folders = [save(tmp_path / "0", 0, **({} if name == "modules" else options)), save(tmp_path / "1", 1, **options)]
    with pytest.raises(InputError, match=message) as error:
        merge_adapters(folders, merge, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
