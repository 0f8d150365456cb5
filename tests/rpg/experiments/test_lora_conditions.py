"""Adapters of texts, classes and no condition at all: `rpg lora` ends in a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rpg.merging.adapters import PEFT_METHODS
from tests.rpg.conftest import Run, refused
from tests.rpg.generation.test_texts import TEXTS, encoder_at
from tokenization.zoo.zoo import Zoo

SYMBOLS = {
    "symbols": 3, "length": 3, "rows": 32, "hidden": 16, "intermediate": 24, "layers": 1, "heads": 2, "steps": 5,
}  # fmt: skip
STEMS = ["001", "010", "011", "100", "101", "110"]
NAMES = (*TEXTS, "sort 3 numbers", "write to a dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conditions")


def written(folder: Path, kind: str, conditions: dict[str, object], split: bool) -> Path:
    """A configuration of six tasks whose conditions are of a kind, two of them unseen with ``split``."""
    names = NAMES if kind == "text" else [f"kind {number}" for number in range(6)]
    heads = "file,condition,split" if split else "file,condition"
    rows = [f'{stem}.jsonl,"{name}"' for stem, name in zip(STEMS, names, strict=False)]
    rows = [row + (f",{'unseen' if place > 3 else 'train'}" if split else "") for place, row in enumerate(rows)]
    (folder / f"{kind}.csv").write_text("\n".join([heads, *rows]) + "\n")
    task = {
        "name": "language", "base": str(folder / "base"), "data": str(folder / "tasks"), "symbols": SYMBOLS,
        "unseen": 0, "validation": 0, "rows": {"validation": 8, "test": 8}, "group": 6, "processes": 1,
        "adapter": {"r": 2, "kind": "dora"}, "training": {"steps": 3, "batch_size": 4, "learning_rate": 0.05},
        "conditions": str(folder / f"{kind}.csv"), "condition": "class" if kind == "none" else kind,
    }  # fmt: skip
    config = {
        "run": str(folder / f"run-{kind}"), "zoo": str(folder / f"zoo-{kind}"), "task": task, "tokens": {"size": 32},
        "model": {
            "state": {"of": "none"}, "condition": conditions,
            "backbone": {"kind": "lstm", "d_model": 16}, "denoiser": {"kind": "mlp", "width": 16, "hidden": 16},
        },
        "train": {"steps": 2, "batch_size": 4, "warmup_steps": 0, "precision": "fp32"},
        "generate": {"steps": 2},
        "evaluate": {"num": 2, "num_baseline": 2, "baselines": ["nearest_seen", "kernel_ridge", *PEFT_METHODS]},
    }  # fmt: skip
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(config))
    return folder / f"{kind}.yaml"


def test_texts_and_unseen_tasks_by_the_task_itself(folder: Path, rpg: Run) -> None:
    kind: dict[str, object] = {"kind": "text", "encoder": encoder_at(folder / "encoder")}
    config = written(folder, "text", kind, split=True)
    code, out, err = rpg("lora", config, "--device", "cpu", "--denoising-path", NAMES[4])
    assert code == 0, err
    assert "report:" in out
    found = json.loads((folder / "run-text" / "evaluation.json").read_text())
    assert list(found["kinds"]) == [
        "original", "generated", "held_out", "nearest_seen", "kernel_ridge", *PEFT_METHODS, "average",
    ]  # fmt: skip
    assert list(found["better"]) == ["symbol_accuracy", "exact_match", "perplexity"]
    assert found["better"]["perplexity"] == "less"
    for kind_, each in found["kinds"].items():
        assert len(each["distances"].get("own", [])) == (0 if kind_ in ("original", "held_out") else 2)
    assert f"Networks for {NAMES[4]} after" in (folder / "run-text" / "report.html").read_text()
    again = (folder / "run-text" / "evaluation.json").read_text()
    code, out, err = rpg("evaluate", folder / "run-text", "--device", "cpu")
    assert (code, err) == (0, "") and json.loads(again)["kinds"] == json.loads(
        (folder / "run-text" / "evaluation.json").read_text()
    )["kinds"]
    (folder / "mine.py").write_text("def score(path, condition):\n    return condition[0]\n")
    code, out, err = rpg(
        "lora", config, "--split", "test", "--score", f"{folder / 'mine.py'}:score", "--lower", "score"
    )
    assert (code, err) == (0, ""), err
    found = json.loads((folder / "run-text" / "evaluation.json").read_text())
    zoo = Zoo.open(folder / "zoo-text")
    unseen = [zoo.entries[index].condition[0] for index in zoo.subset("unseen")]  # type: ignore[index]
    assert found["kinds"]["generated"]["metrics"]["score"] == unseen == found["kinds"]["peft_svd"]["metrics"]["score"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "none"])
def test_classes_and_nothing_that_scores(kind: str, folder: Path, rpg: Run) -> None:
    config = written(folder, kind, {"kind": kind}, split=False)
    assert rpg("lora", config, "--device", "cpu")[0] == 0
    found = json.loads((folder / f"run-{kind}" / "evaluation.json").read_text())
    conditional = kind == "class"
    assert ("kernel_ridge" in found["kinds"]) == conditional and set(PEFT_METHODS) <= found["kinds"].keys()
    assert bool(found["kinds"]["generated"]["distances"].get("own")) == conditional
    adopted = yaml.safe_load(config.read_text()) | {"task": None, "zoo": str(folder / f"adopted-{kind}")}
    adopted["run"] = str(folder / f"run-adopted-{kind}")
    (folder / "adopted.yaml").write_text(yaml.safe_dump(adopted))
    refused(rpg("lora", folder / "adopted.yaml"), "rpg collect --from")
    lines = [f"{stem},{number}" for number, stem in enumerate(STEMS)] if conditional else STEMS
    table = folder / f"zoo-{kind}" / "checkpoints" / "table.csv"
    table.write_text("\n".join(["file,condition" if conditional else "file", *lines]) + "\n")
    assert rpg("collect", "--from", table.parent, "--table", table, "--zoo", adopted["zoo"])[0] == 0
    code, out, err = rpg("lora", folder / "adopted.yaml", "--device", "cpu")
    assert (code, err) == (0, "") and "weights alone" in out, err
    alone = json.loads((folder / f"run-adopted-{kind}" / "evaluation.json").read_text())
    assert alone["kinds"].keys() == found["kinds"].keys() and alone["better"] == {}
