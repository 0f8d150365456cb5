"""What a layout, twenty training steps and two generated files are, recorded once: a change of structure changes none.

``python -m tests.test_golden`` writes the record anew, where a change of behaviour is wanted. Losses and values are
compared to a tolerance, since processors round differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.tasks.images.networks import build_network
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.rpg.generation.test_adapters import adapters_at
from tests.rpg.models.test_pdiff import pdiff_config
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo

RECORD = Path(__file__).parent / "golden" / "record.json"
STEPS = 20
DEMO = Path(__file__).parent.parent / "configs" / "digits.yaml"


def demo(folder: Path) -> tuple[Config, Any]:
    """The demo's own configuration, on untrained networks of its structure."""
    zoo = Zoo.create(folder / "zoo")
    for step in range(6):
        torch.manual_seed(step)
        zoo.append(build_network("cnn", in_channels=1, image_size=8, num_classes=10).state_dict(), run=0, step=step)
    settings = [f"run={folder / 'run'}", f"zoo={folder / 'zoo'}", f"train.steps={STEPS}", "task=null"]
    return Config.load(DEMO, [*settings, "train.log_every=1", "train.precision=fp32", "train.warmup_steps=5"]), None


def conditional(folder: Path) -> tuple[Config, Any]:
    make_zoo(folder / "zoo", num=8, num_runs=4, condition_size=3)
    model = {"condition": {"kind": "binary", "dropout": 0.3}, "state": {"of": "checkpoint", "noise": 0.3}}
    return small_config(folder, model=model, train={"steps": STEPS}), [1.0, 0.0, 1.0]


def pdiff(folder: Path) -> tuple[Config, Any]:
    make_zoo(folder / "zoo")
    stage = {"steps": STEPS // 2, "learning_rate": 1e-2, "batch_size": 4}
    return pdiff_config(folder, model={"autoencoder": stage, "latent": stage}), None


def adapter(folder: Path) -> tuple[Config, Any]:
    adapters_at(folder, "llama")
    collect_from(folder / "adapters", folder / "zoo")
    return small_config(folder, train={"steps": STEPS}), None


CASES: dict[str, Callable[[Path], tuple[Config, Any]]] = {
    "rpg": demo,
    "conditional": conditional,
    "pdiff": pdiff,
    "adapter": adapter,
}


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Layout, losses and generated files of a case."""
    folder.mkdir(parents=True, exist_ok=True)
    config, condition = CASES[case](folder)
    generator = Generator.from_pretrained(train(config, say=lambda _: None))
    lines = (Path(config.run) / "metrics.jsonl").read_text().splitlines()
    layout = json.loads((Path(config.run) / "generator" / "layout.json").read_text())
    paths = generator.generate(2, seed=7, condition=condition, output=folder / "new")
    files = [path / "adapter_model.safetensors" if path.is_dir() else path for path in paths]
    return {
        "layout": hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest(),
        "losses": [json.loads(line)["loss"] for line in lines],
        "values": [summary(file) for file in files],
    }


def summary(file: Path) -> dict[str, list[float]]:
    """Every tensor's first and last value, sum and sum of squares."""
    with safe_open(file, "pt") as opened:
        flat = {name: opened.get_tensor(name).flatten().double() for name in opened.keys()}  # noqa: SIM118
    return {n: [float(x) for x in (v[0], v[-1], v.sum(), v.square().sum())] for n, v in flat.items()}


@pytest.mark.parametrize("case", CASES)
def test_nothing_has_moved(case: str, tmp_path: Path) -> None:
    record = json.loads(RECORD.read_text())
    expected, found = record["cases"][case], measure(case, tmp_path)
    assert found["layout"] == expected["layout"]
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    for here, there in zip(found["values"], expected["values"], strict=True):
        assert list(here) == list(there)
        for name, values in here.items():
            assert values == pytest.approx(there[name], rel=1e-3, abs=1e-4), name


def record(folder: Path) -> None:
    """Write the record anew."""
    torch.set_num_threads(1)
    cases = {case: measure(case, folder / case) for case in CASES}
    RECORD.write_text(json.dumps({"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
