"""Every situation from `rpg collect` to networks that load: collect, inspect --verify, train as proposed, generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from tests.rpg.conftest import Run
from tests.tokenization.lora.test_collected import ALIKE, Net
from tests.tokenization.lora.test_collected import save as save_adapter
from tests.tokenization.test_constants import CONSTANTS, FORMS, LEARNED, PERMUTED, mlp, same, tied, write

NUM = 4


def made(rpg: Run, *collect: str, settings: tuple[str, ...] = ()) -> list[Path]:
    """What a user who follows the messages gets of the files in ``mine``: two networks, in the current folder."""
    options = [word for each in ("train.steps=5", *settings) for word in ("--set", each)]
    for command in (
        ("collect", "--from", "mine", "--zoo", "zoo", *collect),
        ("inspect", "zoo", "--verify", *options, "--write-config", "c.yaml"),
        ("train", "c.yaml"),
        ("generate", "runs/zoo", "--num", "2", "--output", "new"),
    ):
        code, out, err = rpg(*command)
        assert code == 0, f"{command}: {out}{err}"
    return sorted(Path("new").iterdir())


def everything_learned(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    values = {f"{place}.{name}": v for place, make in enumerate(LEARNED.values()) for name, v in make(seed).items()}
    return {**mlp(seed), **values}


def everything_constant(seed: int) -> dict[str, Tensor]:
    return {**mlp(seed), **{f"buffer{place}": value for place, value in enumerate(CONSTANTS.values())}}


NETWORKS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "numbers of every kind": everything_learned,
    "constants of every kind": everything_constant,
    "float64": lambda seed: {name: value.double() for name, value in mlp(seed).items()},
}


@pytest.mark.parametrize("case", NETWORKS)
def test_networks(rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for seed in range(NUM):
        torch.save(NETWORKS[case](seed), f"mine/seed{seed}.pth")
    for path in made(rpg):
        new, first = safetensors.torch.load_file(path), NETWORKS[case](0)
        assert {name: (t.dtype, t.shape) for name, t in new.items()} == {
            n: (t.dtype, t.shape) for n, t in first.items()
        }
        assert all(same(new[name], first[name]) == name.startswith("buffer") for name in new if first[name].numel() > 1)


def test_a_permutation_that_differs_is_the_firsts_where_it_is_excluded(
    rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for seed in range(NUM):
        torch.save({**mlp(seed), **PERMUTED(seed)}, f"mine/seed{seed}.pth")
    for path in made(rpg, settings=("tokens.exclude=[perm]",)):
        assert torch.equal(safetensors.torch.load_file(path)["perm"], PERMUTED(0)["perm"])
    card = Path("runs/zoo/generator/README.md").read_text()
    assert "`perm`" in card and "first checkpoint" in card


@pytest.mark.parametrize("case", ["memory, then copies", "left out first"])
def test_tied_weights(rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for seed, form in enumerate([*FORMS[case], "memory"]):
        write(Path("mine") / f"seed{seed}", tied(seed, form), form)
    for path in made(rpg):
        new = safetensors.torch.load_file(path)
        assert new.keys() == tied(0, "memory").keys() and torch.equal(new["head"], new["embed"])


@pytest.mark.parametrize("case", ALIKE)
def test_adapters(rpg: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(NUM):
        save_adapter(Path("mine") / f"task{seed}", seed, **ALIKE[case][seed % 2])
    inputs = torch.ones(1, 8, 3, 3).cumsum(1) / 8
    for folder in made(rpg):
        network = PeftModel.from_pretrained(Net(), folder)
        stored, loaded = (
            safetensors.torch.load_file(folder / "adapter_model.safetensors"),
            get_peft_model_state_dict(network),
        )
        assert stored.keys() == loaded.keys() and all(torch.equal(stored[name], loaded[name]) for name in stored)
        assert torch.isfinite(network(inputs)).all()
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
