"""The one shape of what evaluations find: written, read, refused, told in a few lines, shown as one page."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rpg.evaluation.page.page import Heatmap, Page, print_report, write_report
from rpg.evaluation.report import Curve, Report, networks
from tokenization.errors import InputError


def report(generated: float = 0.9, better: str = "more", **more) -> Report:
    values = {
        "original": 0.8, "generated": generated, "noise_0.05": 0.5, "noise_0.01": 0.7, "average": 0.85,
        "run_average": 0.84, "merge_ties": 0.6, "kernel_ridge": 0.2, "coordinate_gaussian_at_distance": 0.3,
    }  # fmt: skip
    kinds = {
        name: networks(
            {"accuracy": torch.tensor([value, value + 0.02]), "loss": [1.0, math.nan]},
            distances={"nearest": [1.0, 3.0]},
            novel=(0.5, 0.0),
        )
        for name, value in values.items()
    }
    return Report(
        experiment="networks", judge="planted", split="test", seed=0, better={"accuracy": better, "loss": "less"},
        kinds=kinds, unit=2.0, threshold=0.8, taus=(1.0, 2.0), **more,
    )  # fmt: skip


def printed(found: Report, **options) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_report(found, console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_kind_holds_each_network_and_no_nan():
    kind = report().kinds["generated"]
    assert kind.count == 2 and kind.metrics == {"accuracy": pytest.approx((0.9, 0.92)), "loss": (1.0, None)}
    assert kind.summaries["accuracy"].mean == pytest.approx(0.91) and kind.summaries["loss"].mean == 1.0
    assert networks({"loss": [math.inf]}).summaries == {"loss": None}


def test_what_is_written_is_read_again_and_other_files_are_refused_in_one_line(tmp_path: Path):
    found = report(curves={"by": Curve(x=(1.0, 2.0), lines={"generated": (0.1, None)}, across="M", up="accuracy")})
    assert Report.load(found.save(tmp_path)) == Report.load(tmp_path) == found
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["format"] == 2 and {"original", "generated"} <= content["kinds"].keys()
    for text, words in (("{}", "earlier version"), ('{"generated": 1}', "earlier version"), ("{", "broken"),
                        ('{"format": 2}', "unexpected value")):  # fmt: skip
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(InputError, match=words) as caught:
            Report.load(tmp_path)
        assert "\n" not in str(caught.value) and "again" in str(caught.value)
    with pytest.raises(InputError, match="rpg evaluate"):
        Report.load(tmp_path / "none")


def test_the_verdict_says_good_and_bad_news_alike():
    assert "91.0 %, originals 81.0 %; they are better than the best simple baseline, average (86.0 %)" in (
        report().verdict
    )
    assert "they are worse than the best simple baseline, average" in report(0.6).verdict
    assert "worse than the best simple baseline, kernel ridge (21.0 %)" in report(0.6, "less").verdict


def test_a_notebook_shows_the_means():
    found = report()
    assert found.means()["average"] == {"accuracy": pytest.approx(0.86), "loss": 1.0, "distance": 2.0}
    text = found._repr_html_()
    assert "<td>average</td><td>86.0 %</td><td>1</td><td>2</td>" in text and "better than" in text


def test_a_report_ends_in_a_dozen_lines_and_the_rest_is_there_when_asked_for(tmp_path: Path):
    text = printed(report(), folder=tmp_path, then="rpg generate runs/mine")
    lines = text.rstrip().splitlines()
    assert len(lines) <= 12 and max(map(len, lines[:-3])) <= 80, text
    for kind in ("generated", "original", "average", "noise 0.01", "merge ties"):
        assert any(line.startswith(kind) for line in lines), kind
    assert not any(line.startswith(("run average", "noise 0.05")) for line in lines)  # the best of each family
    full = printed(report(notes=("Mind the gap.",), parts={"seen": report().kinds}), full=True)
    assert all(words in full for words in ("run average", "noise 0.05", "Mind the gap.", "seen:", "loss"))


def test_the_page_shows_everything_and_escapes_what_users_wrote(tmp_path: Path):
    found = report(curves={"vote": Curve(x=(1.0, 2.0), lines={"generated": (0.1, 0.2)}, across="M", up="accuracy")})
    page = Page(
        "<script>alert(1)</script>", {"zoo <b>": "a & b"}, denoising_path=[(1, torch.zeros(2)), (2, torch.ones(2))],
        heatmaps=[Heatmap(['"><b>', "original"], torch.zeros(2, 3), "colours")],
    )  # fmt: skip
    for name in ("first", "second"):
        write_report(tmp_path / name, found, page)
    text = (tmp_path / "first" / "report.html").read_text()
    assert text == (tmp_path / "second" / "report.html").read_text()
    assert not any(each in text for each in ("<script", "<b>")) and "a &amp; b" in text
    assert found.verdict in text and "Vote" in text and "From noise to network" in text
    assert (tmp_path / "first" / "scatter.png").read_bytes().startswith(b"\x89PNG")


def test_a_zoo_alone_and_networks_that_nobody_scores_have_a_verdict():
    alone = report().model_copy(update={"kinds": {**report().kinds, "generated": networks({})}})
    assert alone.verdict.startswith("Originals have accuracy 81.0 %, the best baseline, average, 86.0 %")
    assert "generated" not in printed(alone).splitlines()[3]
    kinds = {name: networks({}, count=2, distances={"nearest": [1.0, 2.0]}) for name in ("original", "generated")}
    bare = Report(experiment="networks", judge="weights alone", split="", seed=0, better={}, kinds=kinds)
    assert "1.5 nearest-neighbour distances" in bare.verdict
    assert "generated" in printed(bare)
