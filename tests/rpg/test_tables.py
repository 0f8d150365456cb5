"""Every printed table at 80 columns: nothing is cut off, heads have two lines at most."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from rpg.config import TAUS
from rpg.console import FiguresTable
from rpg.evaluation.page.page import print_checkpoints, print_report
from rpg.evaluation.report import Report, networks
from rpg.experiments.sweep import _COLUMNS, print_sweep
from rpg.merging.methods import MERGES
from rpg.planning.inspect import inspect

KINDS = ("generated", "run_sharpened_gaussian_at_distance", "average_of_16", *MERGES)


def shown(show: Callable[[Console], object], width: int = 80) -> str:
    console = Console(file=(file := io.StringIO()), width=width)
    show(console)
    text = file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= width, text
    return text


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", [80, 60])
def test_a_wide_table_goes_on_below_with_the_same_names(width: int) -> None:
    heads = ("networks", *(f"mean of the figure {number}" for number in range(14)))
    rows = [[name, *(f"{number}.1234" for number in range(14))] for name in ("generated", "x" * 70)]
    text = shown(lambda console: console.print(FiguresTable(heads, rows, "a title", "a caption")), width)
    assert all(f"{number}.1234" in text for number in range(14)) and text.count("networks") > 1
    assert text.count("a title") == text.count("a caption") == 1
    for block in text.split("networks")[:-1]:
        assert len([line for line in block.splitlines()[-2:] if "mean" in line]) <= 2


def test_reports_of_many_metrics_and_kinds() -> None:
    names = ("average_precision_50", "mean_intersection_over_union", "exact_match", "negative_log_likelihood")
    each = networks(
        {name: [0.5, 0.25] for name in names}, distances={"nearest": [1.0, 1234.5], "own": [1.0, 2.0]},
        novel=(0.5,) * len(TAUS), extras={"one_nna": 0.5, "coverage": 0.25},
    )  # fmt: skip
    report = Report(
        experiment="networks", judge="module:function", split="test", seed=0, better={name: "more" for name in names},
        kinds=dict.fromkeys(("original", *KINDS), each), parts={"seen": dict.fromkeys(KINDS, each)}, threshold=0.5,
        unit=1.0, taus=TAUS,
    )  # fmt: skip
    console = Console(file=(file := io.StringIO()), width=80)
    print_report(report, console, full=True)
    text, (*tables, verdict) = file.getvalue(), file.getvalue().strip().splitlines()
    assert "…" not in text and max(map(len, tables)) <= 80 and verdict == report.verdict
    assert "run sharpened gaussian *" in text and "merge dare ties" in text and "to its" in text and "1-NNA" in text


def test_files_and_sweeps(tmp_path: Path) -> None:
    long = "runs/a-long-name-of-a-run/generated/another-folder/network-00000.safetensors"
    scores = {long: {"commonsense-reasoning": {"accuracy": 0.123456, "exact_match": 0.5, "loss_of_all_rows": 0.25}}}
    text = shown(lambda console: print_checkpoints({long: {"": {"accuracy": 0.5}}}, console))
    assert "".join(part for part in (text.split("─")[-1]).replace("0.5", "").split()) == long
    shown(lambda console: print_checkpoints(scores, console))
    rows = [{"name": "no-state-joint-denoiser", "set": []} | dict.fromkeys(_COLUMNS, 0.5)]
    rows += [{"name": "other", "set": [], "failure": "the loss is not finite"}]
    text = shown(lambda console: print_sweep(rows, console))
    assert "other: the loss is not finite" in text and text.count("no-state-joint-denoiser") == 2


def test_inspected_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / ("a-name-without-any-space-" * 4)
    folder.mkdir()
    save_file({f"layer.{index}.weight": torch.zeros(3, 300) for index in range(9)}, folder / "model.safetensors")
    text = shown(lambda console: console.print(*inspect(folder / "model.safetensors")))
    assert folder.name in squeezed(text).replace("││", "").replace("│", "")
