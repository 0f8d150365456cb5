"""bf16 where the device is faster so, and a word where it was asked for and is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rpg import devices
from rpg.config import Config
from rpg.devices import bf16_ratio, in_bf16, mixed_precision
from rpg.tasks.collecting import open_zoo
from tokenization.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("asked, slow, fast", [("auto", False, True), ("bf16", True, True), ("fp32", False, False)])
def test_auto_takes_what_the_device_is_faster_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str, slow: bool, fast: bool
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    devices._say_slower.cache_clear()
    monkeypatch.setattr(devices, "bf16_ratio", lambda device: 0.3)
    assert in_bf16(asked, CPU) == fast and mixed_precision(asked) == ("bf16" if fast else "no")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(devices, "bf16_ratio", lambda device: 61.0)
    assert [in_bf16(asked, CPU) for _ in range(3)] == [slow] * 3
    said = capsys.readouterr().out
    assert said.count("61 times as long") == said.count("\n") == said.count("precision to auto") == (asked == "bf16")


def test_the_ratio_is_measured_once() -> None:
    assert 0 < bf16_ratio() == bf16_ratio() < 1e4


def test_a_zoo_may_be_completed_in_another_precision(tmp_path: Path) -> None:
    tree = {"name": "digits_subsets", "base": {"precision": "bf16"}, "finetune": {"precision": "bf16"}}
    other = {**tree, "base": {"precision": "auto"}, "finetune": {"precision": "fp32"}}
    first, second = (Config.parse({"task": each}, "test").task for each in (tree, other))
    zoo = open_zoo(tmp_path / "zoo", first)
    assert open_zoo(tmp_path / "zoo", second).task == zoo.task
    changed = Config.parse({"task": {**other, "seed": 1}}, "test").task
    with pytest.raises(InputError, match="task.seed"):
        open_zoo(tmp_path / "zoo", changed)
