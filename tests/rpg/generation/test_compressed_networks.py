"""Pruned and quantised digits networks: collected, learned, generated at a wished share of zeros, scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rpg.config import Config
from rpg.experiments.evaluating import Judge, evaluate_run, evaluate_zoo
from rpg.tasks.images.config import DigitsConfig
from rpg.tasks.images.digits import DigitsTask
from rpg.training.loop import train
from tests.conftest import small_config
from tests.rpg.conftest import Run, refused
from tokenization.compressed.form import dense
from tokenization.errors import InputError
from tokenization.layouts import fit_layout
from tokenization.zoo.zoo import Zoo

EVALUATE = {"num": 2, "num_baseline": 2, "noise": [0.05], "baselines": ["noise"]}


def config_of(folder: Path, **compress: object) -> Config:
    task = {"name": "digits", "network": "mlp-mini", "train_steps": 8, "steps": 2, "runs": 2, "compress": compress}
    model = {"kind": "kernel_ridge", "condition": {"kind": "none"}}
    return small_config(folder, task=task, tokens={"size": 128}, model=model, evaluate=EVALUATE)


def collected(folder: Path, **compress: object) -> tuple[Config, Zoo, DigitsTask]:
    config = config_of(folder, **compress)
    assert isinstance(config.task, DigitsConfig)
    task = DigitsTask(config.task)
    return config, task.collect(folder / "zoo"), task


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on networks of which 80 % are zero."""
    folder = tmp_path_factory.mktemp("pruned")
    config, _, _ = collected(folder, kind="prune", sparsity=0.8, steps=4)
    train(config, say=lambda _: None)
    return folder


def zeros(network: dict[str, Tensor]) -> tuple[int, int]:
    weights = [value for value in dense(network).values() if value.ndim > 1]
    return sum(int((each == 0).sum()) for each in weights), sum(each.numel() for each in weights)


def test_masks_have_their_share_and_differ_between_runs(pruned: Path) -> None:
    zoo = Zoo.open(pruned / "zoo")
    networks = [zoo.state_dict(index) for index in range(4)]
    for network in networks:
        found, total = zeros(network)
        assert found == round(0.8 * total) and network["linear1.weight_values"].dtype == torch.float32
    masks = [dense(each)["linear1.weight"] != 0 for each in networks]
    assert not torch.equal(masks[1], masks[3])
    task = DigitsTask(DigitsConfig.model_validate(zoo.task))
    answers = task.predict(networks, "validation") == task.labels("validation")
    recorded = [entry.metrics["validation_accuracy"] for entry in zoo.entries]
    assert answers.double().mean(1).tolist() == pytest.approx(recorded)


@pytest.mark.parametrize("compress", [{"kind": "prune", "masks": "stored"}, {"kind": "quantise", "bits": 4}])
def test_a_zoo_that_was_cut_short_goes_on_as_it_was(compress: dict[str, object], tmp_path: Path) -> None:
    _, whole, task = collected(tmp_path / "a", steps=3, **compress)
    task.collect(tmp_path / "b", limit=3)
    assert task.collect(tmp_path / "b").digest() == whole.digest()
    layout = fit_layout(whole, config_of(tmp_path, **compress).tokens)
    assert layout.compressed is not None and len(layout.compressed.parts) == 3


def test_generated_files_have_the_zoos_size_or_the_wished_share(pruned: Path, tmp_path: Path, rpg: Run) -> None:
    original = Zoo.open(pruned / "zoo").checkpoint(0).path
    assert rpg("generate", pruned / "run", "-n", 1, "--output", tmp_path)[0] == 0
    path = tmp_path / "network-00000.safetensors"
    assert path.stat().st_size == pytest.approx(original.stat().st_size, rel=0.05)
    found, total = zeros(load_file(path))
    assert found == round(0.8 * total)
    sparser = ("generate", pruned / "run", "-n", 1, "--output", tmp_path, "--sparsity", 0.95)
    refused(rpg(*sparser), "network-00000.safetensors", "of another request", "--overwrite")
    assert zeros(load_file(path))[0] == found
    assert rpg("generate", pruned / "run", "-n", 1, "--output", tmp_path)[0] == 0  # the same once more
    assert rpg(*sparser, "--overwrite")[0] == 0
    assert zeros(load_file(path))[0] == round(0.95 * total)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["rpg.provenance"])["sparsity"] == 0.95
    refused(rpg("generate", pruned / "run", "--output", tmp_path, "--sparsity", 1.5), "sparsity is 1.5", "0 to 1")


def test_dense_and_quantised_networks_have_no_sparsity(tmp_path: Path, rpg: Run) -> None:
    config, _, _ = collected(tmp_path, kind="quantise", bits=8, steps=2)
    train(config, say=lambda _: None)
    refused(rpg("generate", tmp_path / "run", "--sparsity", 0.5), "not pruned")


def test_they_are_scored_dense_and_baselines_are_cut_as_they_are(pruned: Path) -> None:
    kinds = evaluate_run(pruned / "run").kinds
    assert kinds["original"].count == 4 and kinds["generated"].count == 2 and "noise_0.05" in kinds
    assert kinds["average"].summaries["accuracy"].mean > 0.2
    report = evaluate_run(pruned / "run", Judge(f"{__name__}:share_of_zeros"))
    for each in report.kinds.values():
        assert each.metrics["share_of_zeros"] == (pytest.approx(0.8, abs=1e-3),) * each.count
    config = config_of(pruned, kind="prune", sparsity=0.8, steps=4)
    alone = evaluate_zoo(pruned / "zoo", Judge(f"{__name__}:share_of_zeros"), config, output=pruned / "scores")
    assert alone.kinds["average"].metrics["share_of_zeros"] == (pytest.approx(0.8, abs=1e-3),)


def share_of_zeros(network: dict[str, Tensor]) -> float:
    found, total = zeros(network)
    return found / total


def test_losses_on_images_refuse_them(pruned: Path) -> None:
    layout = fit_layout(Zoo.open(pruned / "zoo"), config_of(pruned, kind="prune").tokens)
    with pytest.raises(InputError, match="losses on data need dense networks"):
        layout.decode_batch(torch.zeros(1, layout.num_tokens, layout.token_size))
