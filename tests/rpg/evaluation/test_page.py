from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rpg.evaluation.report import Report
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
    config = small_config(
        folder, task=task.model_dump(), tokens={"size": 128}, evaluate={"num": 6, "num_baseline": 4, "baselines": None}
    )
    train(config)
    evaluate_run(config.run)
    return Path(config.run)


def test_the_page_is_whole_and_refers_to_nothing_outside(run):
    text = (run / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.headings == 11
    assert page.references and all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"url\(|@import|<script|http-equiv", text)
    assert len(page.pictures) == 7
    assert all(len(picture.get("alt") or picture.get("aria-label") or "") > 20 for picture in page.pictures)
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(charts) == 6
    for chart in charts:
        assert not re.search(r"#[0-9a-f]{6}", chart)  # every colour is the style sheet's
    assert not re.search(r' id="\w+_\d+"', "".join(charts))


def test_originals_are_those_that_were_trained_on(run, monkeypatch, tmp_path):
    generator = Generator.from_pretrained(run)
    config, zoo = generator.config, Zoo.open(generator.config.zoo)
    chosen = config.train.model_copy(update={"splits": ("validation",)})
    generator.config = config.model_copy(update={"train": chosen})
    for index in range(5):
        zoo.entries[index] = dataclasses.replace(zoo.entries[index], split="validation")
    monkeypatch.setattr(Zoo, "open", lambda path: zoo)
    monkeypatch.setattr(Generator, "from_pretrained", lambda path: generator)
    few = {"num": 2, "baselines": ("average_of_k",)}
    generator.config = generator.config.model_copy(update={"evaluate": config.evaluate.model_copy(update=few)})
    report = evaluate_run(run, output=tmp_path)
    assert report.kinds["original"].count == 5 == len(report.kinds["original"].components)
    assert report.kinds["held_out"].count == len(zoo) - 5 and "average_of_5" in report.kinds
    assert f"5 of {len(zoo)} checkpoints" in (tmp_path / "report.html").read_text()


def test_what_is_shown_is_what_was_found(run):
    report = Report.load(run)
    text = (run / "report.html").read_text()
    assert report.verdict in text and report.matched and report.judge == "DigitsTask, test data"
    assert set(report.kinds) >= {"generated", "noise_0.05", "noise_at_distance", "run_average", "merge_ties"}
    curves = [each.novel for name, each in report.kinds.items() if each.count]
    assert all(len(curve) == len(report.taus) for curve in curves)
    assert Generator.from_pretrained(run).digest in text


def test_denoising_paths_end_at_what_is_generated(run):
    generator = Generator.from_pretrained(run)
    shown = generator.denoising_paths(3, seed=5, points=2)
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
