"""The commands that write, each on configurations of a second, in the folder that a process works in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SMALL: dict[str, Any] = {
    "model": {"backbone": {"kind": "lstm", "d_model": 16}, "denoiser": {"kind": "mlp", "width": 16, "hidden": 16}},
    "train": {"steps": 12, "batch_size": 4, "warmup_steps": 0, "save_every": 4, "precision": "fp32"},
    "generate": {"steps": 2, "tile_tokens": 16},
}
CONDITIONAL: dict[str, Any] = {
    **SMALL,
    "model": {**SMALL["model"], "state": {"of": "none"}, "condition": {"kind": "binary"}},
    "train": {**SMALL["train"], "splits": ["train", "validation"], "behaviour": {"images": 4}},
    "evaluate": {"linear_head": False},
}
DIGITS = {"name": "digits", "network": "mlp-mini", "runs": 2, "train_steps": 20, "steps": 3}
SUBSETS = {
    "name": "digits_subsets", "tasks": 20, "unseen": {"kind": "random", "num": 5}, "validation": 4, "group": 7,
    "base": {"steps": 30}, "finetune": {"stages": [{"steps": 6}], "batch_size": 32},
}  # fmt: skip
SYMBOLS = {
    "symbols": 4, "length": 3, "rows": 32, "hidden": 16, "intermediate": 24, "layers": 1, "heads": 2, "steps": 40,
    "learning_rate": 1e-2,
}  # fmt: skip
ADAPTERS = {
    "name": "language", "base": "base", "data": "tasks", "symbols": SYMBOLS, "unseen": 4, "validation": 3,
    "rows": {"validation": 8, "test": 12}, "adapter": {"r": 2}, "group": 5,
    "training": {"steps": 10, "batch_size": 8, "learning_rate": 0.05},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "digits": {**SMALL, "task": DIGITS, "evaluate": {"num_baseline": 2, "baselines": ["noise", "interpolation"]}},
    "unseen": {**CONDITIONAL, "task": SUBSETS},
    "lora": {**CONDITIONAL, "task": ADAPTERS, "tokens": {"size": 32}},
}


@dataclass(frozen=True)
class Case:
    """A command line, in which INPUT is a folder with ``zoo`` and ``run``, and what it refuses to write over."""

    arguments: str
    output: str = ""


CASES = {
    "collect": Case("collect digits.yaml"),
    "align": Case("align INPUT/zoo aligned", "aligned"),
    "train": Case("train digits.yaml --resume --set zoo=INPUT/zoo --ignore-memory"),
    "generate": Case("generate INPUT/run -n 40 --output new --device cpu"),
    "evaluate": Case("evaluate INPUT/run --num 4 --output scores --device cpu"),
    "export-torch": Case("export INPUT/run --to torch --output out.pth", "out.pth"),
    "export-timm": Case("export INPUT/run --to timm --output out.safetensors", "out.safetensors"),
    "unseen": Case("unseen unseen.yaml --device cpu"),
    "lora": Case("lora lora.yaml --device cpu"),
}


def write_configs(folder: Path) -> None:
    """Write the configurations; zoo, run and all else lie in ``folder``."""
    folder.mkdir(exist_ok=True)
    for name, tree in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"run": "run", "zoo": "zoo", **tree}))
