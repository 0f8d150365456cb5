"""docs/formats.md is a contract: its tables name the very keys that the code writes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rpg.config import Config
from rpg.evaluation.report import Curve, Report, networks
from rpg.experiments.comparison import compare
from rpg.generation.folders import FILES, OPTIONAL_FILES
from rpg.generation.generator import Generator
from rpg.labs.sane.model import SaneConfig, TokenAutoencoder
from rpg.models.kernel_regression import KernelRidgeConfig, KernelRidgeGenerator
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.hub_server import HubServer
from tokenization.checkpoint.checkpoint import SUFFIXES, save_checkpoint
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layouts import fit_layout
from tokenization.zoo.locks import locked
from tokenization.zoo.manifest import ZooEntry
from tokenization.zoo.zoo import ConditionSpec, Zoo

DOCUMENT = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()


def documented(heading: str) -> list[str]:
    """The keys in the first column of the table under a heading."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert match, f"docs/formats.md has no section {heading!r}"
    return re.findall(r"^\| `([^`]+)` \|", match[1], re.MULTILINE)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def keys_of(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with conditions, a run with its generator, and a generated network."""
    folder = tmp_path_factory.mktemp("formats")
    make_zoo(folder / "zoo", condition_size=2)
    model = {"condition": {"kind": "binary"}}
    config = small_config(folder, model=model, train={"steps": 2}, tokens={"exclude": ["0.bias"]})
    generator = Generator.from_pretrained(train(config, say=lambda _: None))
    generator.generate(1, condition=[1, 0], output=folder / "generated")
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_zoo(folder: Path) -> None:
    content = read(folder / "zoo" / "zoo.json")
    assert list(content) == documented("zoo.json")
    assert sorted(content["condition"]) == sorted(documented("condition"))
    assert list(content["structure"]) == documented("structure")
    assert content["structure"]["tensors"][0].keys() == {"name", "dtype", "shape"}
    assert {path.name for path in (folder / "zoo").iterdir()} <= set(documented("Zoo folder"))
    every = ZooEntry("f", 0, 0, (1.0,), {"a": 1.0}, "test", 1, "0", "s", True)
    assert list(json.loads(every.to_line())) == documented("manifest.jsonl")
    optional = re.findall(r"^\| `(\w+)` \|.*; optional \|$", DOCUMENT, re.MULTILINE)
    least = list(json.loads(ZooEntry("f", 0, 0).to_line()))
    assert least == [key for key in documented("manifest.jsonl") if key not in optional]
    line = json.loads((folder / "zoo" / "manifest.jsonl").read_text().splitlines()[0])
    assert set(least) <= line.keys() <= set(documented("manifest.jsonl"))


def test_report() -> None:
    kind = networks({"accuracy": [0.5, float("nan")]})
    found = Report(
        experiment="networks", judge="j", split="test", seed=0, better={"accuracy": "more"},
        kinds={"original": kind, "generated": kind},
    )  # fmt: skip
    content = json.loads(json.dumps(found.model_dump(mode="json"), allow_nan=False))
    assert list(content) == documented("evaluation.json")
    assert list(content["kinds"]["original"]) == documented("evaluation.json kinds")
    assert set(Curve.model_fields) == {"x", "lines", "across", "up", "log"}


def test_lock_file(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert list(read(tmp_path / ".lock")) == documented("Lock file")


def test_checkpoint_metadata(folder: Path, tmp_path: Path) -> None:
    shared = torch.ones(2)
    save_checkpoint(tmp_path / "a.safetensors", {"b": shared, "a": shared})
    collected = metadata_of(tmp_path / "a.safetensors")
    generated = metadata_of(next((folder / "generated").iterdir()))
    assert collected.keys() == {"format", "rpg.order", "rpg.ties"}
    assert generated.keys() == {"format", "rpg.order", "rpg.provenance"}
    assert {*collected, *generated, "rpg.merge"} == set(documented("Checkpoint"))  # the last of merged ones
    assert json.loads(collected["rpg.order"]) == ["b", "a"] and json.loads(collected["rpg.ties"]) == {"a": "b"}
    assert list(json.loads(generated["rpg.provenance"])) == documented("rpg.provenance")


def test_generator_folder(folder: Path) -> None:
    generator = folder / "run" / "generator"
    assert documented("Generator folder") == [*FILES, "README.md", *OPTIONAL_FILES]
    assert {path.name for path in generator.iterdir()} == set(documented("Generator folder")) - set(OPTIONAL_FILES)
    layout = read(generator / "layout.json")
    assert list(layout) == documented("layout.json") and layout["version"] == 1
    tensors = {key for entry in layout["tensors"] for key in entry}
    assert tensors | {"of"} == set(documented("layout.json tensors"))
    names = [field.name for field in dataclasses.fields(TokenOptions)]
    assert list(layout["options"]) == names[: names.index("rank")]  # the rest is of directions
    statistics = generator / "statistics.safetensors"
    kinds = {re.sub(r"^(centre|constant)\..*", r"\1.NAME", key) for key in keys_of(statistics)}
    assert kinds | {"reference.NAME"} == set(documented("statistics.safetensors"))  # that is of aligned adapters only
    assert metadata_of(statistics) == {"format": "rpg.layout", "version": "1"}
    metadata = metadata_of(generator / "model.safetensors")
    assert sorted(metadata) == sorted(documented("model.safetensors metadata"))
    assert list(json.loads(metadata["rpg"])) == ["condition", "num_states", "facts", "metric"]
    assert Config.load(generator / "config.yaml").plain().keys() == Config.model_fields.keys()


def test_what_is_measured_in_closed_form() -> None:
    condition = {"kind": "binary"}
    model = {"condition": condition, "state": {"of": "code", "width": 2, "prior": {"width": 8}}}
    recurrent = small_config(Path("unused"), model=model).model
    positions = torch.zeros(4, 2, dtype=torch.long)
    names = RecurrentDiffusion(recurrent, positions, 3, num_states=5, condition_size=2, regress=True).state_dict()
    measured = [name for name in names if name.startswith(("state.", "centre."))]
    ridge = KernelRidgeGenerator(KernelRidgeConfig.model_validate({"condition": condition}), 4, 3, 2).state_dict()
    anchors = next(
        name for name, _ in TokenAutoencoder(SaneConfig(), positions, 3).named_buffers() if name != "position"
    )
    assert documented("model.safetensors") == [*measured, *ridge, anchors]
    assert any(name.startswith("prior.") for name in names)


def test_a_tie_in_a_layout(tmp_path: Path) -> None:
    shared = torch.randn(3, 2)
    zoo = Zoo.create(tmp_path / "zoo", condition=ConditionSpec("class", 2))
    zoo.append({"a": shared, "b": shared}, run=0, step=0, condition=[1])
    TokenLayout.fit(zoo, TokenOptions(size=4)).save(tmp_path)
    tie = read(tmp_path / "layout.json")["tensors"][1]
    assert tie == {"name": "b", "role": "tie", "of": "a"} and tie.keys() <= set(documented("layout.json tensors"))


def test_compressed_weights(tmp_path: Path) -> None:
    names = {"w" + suffix for suffixes in SUFFIXES.values() for suffix in suffixes}
    assert names == set(documented("Compressed weights"))
    zoo = Zoo.create(tmp_path / "zoo")
    zoo.append({"w": torch.ones(3, 2, dtype=torch.int8), "w_scale": torch.rand(3)}, run=0, step=0)
    TokenLayout.fit(zoo, TokenOptions(size=4)).save(tmp_path)
    layout = read(tmp_path / "layout.json")
    assert layout["version"] == 2
    assert [*layout["compressed"], *layout["compressed"]["weights"][0]] == documented("layout.json compressed")


def test_directions_on_disk(tmp_path: Path) -> None:
    layout = fit_layout(make_zoo(tmp_path / "zoo"), TokenOptions(size=16, rank=3))
    layout.save(tmp_path)
    assert set(keys_of(tmp_path / "basis.safetensors")) == set(documented("basis.safetensors"))
    assert {"rank", "basis", "centre"} <= json.loads((tmp_path / "layout.json").read_text())["options"].keys()


def test_a_comparison() -> None:
    same = torch.ones(2)
    made = compare("validation tasks", "recurrent", same, same, seed=0)
    assert list(made.model_dump(mode="json")) == documented("compare.json")
    assert list(made.configured.model_dump()) == ["mean", "max", "min", "std", "ci95"]


def test_a_repository_on_the_hub(folder: Path, hub: HubServer) -> None:
    run = folder / "run"
    (run / "evaluation.json").write_text("{}")
    (run / "scatter.png").write_bytes(b"")
    try:
        Generator.from_pretrained(run).push_to_hub("me/gen")
    finally:
        (run / "evaluation.json").unlink()
        (run / "scatter.png").unlink()
    more = {re.sub(r"/\w+\.png", "/NAME.png", name) for name in hub.files("me/gen")} - {*FILES, "README.md"}
    assert more == set(documented("Repository of a generator"))


def test_run_folder(folder: Path) -> None:
    run = folder / "run"
    assert {path.name for path in run.iterdir()} == set(documented("Run folder"))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert list(json.loads(line)) == documented("metrics.jsonl")
    save = run / "checkpoints" / "step-00000002"
    assert {path.name for path in save.iterdir()} == set(documented("checkpoints"))
    assert list(read(save / "complete.json")) == ["step", "seconds", "learned", "files"]
    parameters = keys_of(save / "model.safetensors")
    assert sorted(keys_of(save / "ema.safetensors")) == sorted([*parameters, "num_updates"])
    moments = [f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in parameters]
    assert sorted(keys_of(save / "optimizer.safetensors")) == sorted(moments)
    (step,) = (run / "checkpoints").iterdir()
    assert re.fullmatch(r"step-\d{8}", step.name)
    listed = read(step / "complete.json")["files"]
    assert {*listed, "complete.json"} == {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
