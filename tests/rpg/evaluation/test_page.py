from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from rpg.evaluation.page.gather import write_html_report
from rpg.evaluation.page.single_page import ReportData, write_page
from rpg.evaluation.results import EvaluationResult
from rpg.experiments.evaluating import evaluate_run
from rpg.generation.generator import Generator
from rpg.tasks import DigitsConfig, build_task
from rpg.training.loop import train
from tests.conftest import small_config
from tokenization.zoo.zoo import Zoo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# what the browser asks its maker for, whatever page is open
OWN_TRAFFIC = (".googleapis.com", ".google.com", ".gvt1.com", ".gstatic.com")


class Page(HTMLParser):
    """Collects what a page refers to and what its pictures say."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.headings = 0
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.references += [values[name] for name in ("src", "href") if name in values]
        self.headings += tag == "h2"
        if tag == "img" or (tag == "svg" and values.get("aria-hidden") != "true"):
            self.pictures.append(values)
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    task = DigitsConfig(network="mlp-mini", train_steps=100, steps=12, batch_size=64, runs=2)
    build_task(task).collect(folder / "zoo")
    config = small_config(folder, task=task.model_dump(), tokens={"size": 128}, evaluate={"num": 6})
    train(config)
    evaluate_run(config.run)
    return Path(config.run)


def test_the_page_is_whole_and_refers_to_nothing_outside(run):
    text = (run / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.headings == 10
    assert page.references and all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"url\(|@import|<script|http-equiv", text)
    assert len(page.pictures) == 7
    assert all(len(picture.get("alt") or picture.get("aria-label") or "") > 20 for picture in page.pictures)
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text


def test_originals_are_those_that_were_trained_on(run, monkeypatch):
    generator = Generator.from_pretrained(run)
    config, zoo = generator.config, Zoo.open(generator.config.zoo)
    generator.config = config.model_copy(update={"train": config.train.model_copy(update={"splits": ("validation",)})})
    for index in range(5):
        zoo.entries[index] = dataclasses.replace(zoo.entries[index], split="validation")
    result = EvaluationResult.model_validate_json((run / "evaluation.json").read_text())
    pages: list[ReportData] = []
    monkeypatch.setattr("rpg.evaluation.page.gather.write_page", lambda path, result, data: pages.append(data))
    write_html_report(
        run, result, generator, zoo, build_task(config.task), generator.generate(2, seed=0), num=2, seed=0
    )
    assert len(pages[0].components["original"]) == 5
    assert pages[0].provenance["zoo"].startswith(f"5 of {len(zoo)} checkpoints")


def test_the_same_figures_give_the_same_bytes_and_what_users_wrote_is_escaped(run, tmp_path):
    result = EvaluationResult.model_validate_json((run / "evaluation.json").read_text())
    data = ReportData(
        title="<script>alert(1)</script>",
        provenance={"zoo <b>": "a & b", "task": "name: <i>\nseed: 0"},
        heatmap=(['"><b>', "original"], torch.zeros(2, 3)),
    )
    for name in ("first", "second"):
        write_page(tmp_path / name, result, data)
    text = (tmp_path / "first").read_text()
    assert text == (tmp_path / "second").read_text()
    assert not re.search(r"<script|<b>|<i>", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "a &amp; b" in text and "<pre>name: &lt;i&gt;" in text


def test_charts_take_every_colour_from_the_style_sheet(run):
    charts = re.findall(r"<svg.*?</svg>", (run / "report.html").read_text(), flags=re.S)
    assert len(charts) == 6
    for chart in charts:
        assert not re.search(r"#[0-9a-f]{6}", chart)
    assert not re.search(r' id="\w+_\d+"', "".join(charts))


def test_its_figures_are_those_of_the_evaluation(run):
    scores = json.loads((run / "evaluation.json").read_text())
    text = (run / "report.html").read_text()
    assert f"{100 * scores['generated']['accuracy']['mean']:.1f} % accurate" in text
    assert set(scores["novelty"]) >= {"tau", "generated", "average_of_16", "noise_at_distance", "run_average"} or (
        set(scores["novelty"]) >= {"tau", "generated", "noise_at_distance", "run_average"}
    )
    assert all(len(curve) == len(scores["novelty"]["tau"]) for curve in scores["novelty"].values())
    assert Generator.from_pretrained(run).digest in text


def test_trajectories_end_at_what_is_generated(run):
    generator = Generator.from_pretrained(run)
    shown = generator.trajectories(3, seed=5, points=2)
    assert [step for step, _ in shown] == [2, 3]
    for last, network in zip(shown[-1][1], generator.generate(3, seed=5), strict=True):
        assert all((last[name] == network[name]).all() for name in network)
    assert len(Zoo.open(generator.config.zoo)) == 24


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("window", ["1000,1400", "390,844"])
def test_chromium_opens_it_without_an_error_or_a_request(run, tmp_path, window):
    log = tmp_path / "network.json"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={window}", f"--log-net-log={log}",
        "--enable-logging=stderr", "--v=0", f"--screenshot={tmp_path / 'page.png'}", (run / "report.html").as_uri(),
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert "CONSOLE" not in process.stderr
    hosts = set(re.findall(r'"url":"https?://([^/:"]+)', log.read_text()))
    assert {host for host in hosts if not host.endswith(OWN_TRAFFIC)} == set()
