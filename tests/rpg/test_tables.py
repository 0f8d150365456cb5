"""Every printed table at 80 columns: nothing is cut off, heads have two lines at most."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from rpg.console import FiguresTable
from rpg.evaluation.config import TAUS
from rpg.evaluation.metrics import summarize
from rpg.evaluation.network_merges import MERGES
from rpg.evaluation.results import NoveltyReport, SetNovelty, TwoSample, TwoSampleScores
from rpg.evaluation.scores.results import ScoredNetworks, ScoreResult
from rpg.evaluation.scores.show import print_scores
from rpg.evaluation.tables import _novelty_table, _two_sample_table
from rpg.experiments.held_out_table import print_held_out
from rpg.experiments.score_files import print_figures
from rpg.experiments.sweep_table import _COLUMNS, print_sweep
from rpg.labs.fields.experiment import print_fields
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


def test_held_out() -> None:
    values = torch.rand(5)
    figures = {"symbol_accuracy": summarize(values, 0).model_dump(), "exact_match": summarize(values, 0).model_dump()}
    kinds = ("generated", "original", "no_condition", "kernel_ridge", "ridge_degree_3", *MERGES)
    report: dict[str, Any] = {split: dict.fromkeys(kinds, figures) for split in ("unseen", "seen")}
    report |= {"share_of_originals": 1.0, "seed": 0, "train_seconds": 12.0, "unseen_tasks": {"beats_kernel_ridge": 0.5}}
    text = shown(lambda console: print_held_out(report, console))
    assert "merge dare linear" in text and "interval" in text and text.count("exact") >= 2


def test_novelty_and_two_samples() -> None:
    curve = tuple(0.5 for _ in TAUS)
    novel = SetNovelty.model_construct(novel_and_performant=curve, matched_distances=(1.0, 1234.5))
    sets = dict.fromkeys(KINDS, novel)
    report = NoveltyReport.model_construct(unit=1.0, accuracy_threshold=0.97, groups=0, taus=TAUS, sets=sets)
    assert "run sharpened gaussian *" in shown(lambda console: console.print(_novelty_table(report)))
    each = TwoSampleScores.model_construct(
        nearest_neighbour_accuracy=0.5, coverage=0.5, minimum_matching_distance=0.25, nearest_training=0.125
    )
    both = TwoSample.model_construct(num=80, sets=dict.fromkeys(KINDS, each), held_out_nearest_training=0.1)
    assert "merge dare ties" in shown(lambda console: console.print(_two_sample_table(both)))


def test_scores_of_many_figures() -> None:
    names = ("average_precision_50", "mean_intersection_over_union", "exact_match", "negative_log_likelihood")
    each = ScoredNetworks(
        count=50,
        figures={name: (0.5, 0.25) for name in names},
        summaries={name: summarize([0.5, 0.25], 0) for name in names},
        distances=(1.0, 2.0),
        own_distances=(1.0, 2.0),
        novel_and_performant=tuple(0.5 for _ in TAUS),
    )
    result = ScoreResult(
        scorer="module:function", seed=0, better={name: "more" for name in names}, threshold=0.5, unit=1.0, taus=TAUS,
        sets=dict.fromkeys(KINDS, each), components={}, explained=0.0,
    )  # fmt: skip
    text = shown(lambda console: print_scores(result, console))
    assert "mean_intersection_over_union" in squeezed(text) or "intersection" in text
    assert ("run sharpened gaussian *" in text and "to its own" in text.replace("\n", " ")) or "own" in text


def test_files_fields_and_sweeps(tmp_path: Path) -> None:
    long = "runs/a-long-name-of-a-run/generated/another-folder/network-00000.safetensors"
    scores = {long: {"commonsense-reasoning": {"accuracy": 0.123456, "exact_match": 0.5, "loss_of_all_rows": 0.25}}}
    text = shown(lambda console: print_figures({long: {"": {"accuracy": 0.5}}}, console))
    assert "".join(part for part in (text.split("─")[-1]).replace("0.5", "").split()) == long
    shown(lambda console: print_figures(scores, console))
    columns = ("one_nna", "coverage", "mmd", "precision", "recall", "frechet", "class_accuracy", "nearest")
    kinds = ("held_out", "covariance_gaussian", "midpoints_of_two")
    report = {name: dict.fromkeys(columns, 123.456) | {"num": 300} for name in kinds}
    assert "covariance gaussian" in shown(lambda console: print_fields(report, console))
    rows = [{"name": "no-state-joint-denoiser", "set": []} | {key: 0.5 for key, *_ in _COLUMNS}]
    rows += [{"name": "other", "set": [], "failure": "the loss is not finite"}]
    text = shown(lambda console: print_sweep(rows, console))
    assert "other: the loss is not finite" in text and text.count("no-state-joint-denoiser") == 2


def test_inspected_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / ("a-name-without-any-space-" * 4)
    folder.mkdir()
    save_file({f"layer.{index}.weight": torch.zeros(3, 300) for index in range(9)}, folder / "model.safetensors")
    text = shown(lambda console: console.print(*inspect(folder / "model.safetensors")))
    assert folder.name in squeezed(text).replace("││", "").replace("│", "")
