"""The documentation as a site: it builds without a warning, links lead somewhere, nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr  # strict: a link or an anchor that leads nowhere, a page outside the menu
    return folder


def test_every_page_is_in_the_menu_and_has_its_html(site: Path) -> None:
    listed = re.findall(r": ([\w-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(page.stem for page in (ROOT / "docs").glob("*.md"))
    for name in listed:
        assert "<article" in (site / f"{name}.html").read_text(), name


def test_the_reference_is_made_of_docstrings(site: Path) -> None:
    page = (site / "reference.html").read_text()
    for name in ("Generator.from_pretrained", "generate", "Zoo.open", "TokenLayout.encode", "MetricsTask"):
        assert name.split(".")[-1] in page, name
    assert "Raises:" in page and "Parameters:" in page


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for address in re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\"\s>]+)", page.read_text()):
            raise AssertionError(f"{page.name} loads {address}")


def test_addresses_elsewhere_are_whole(site: Path) -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        for address in re.findall(r"\]\((http[^)\s]*)\)", page.read_text()):
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./#-]*)?", address), (page.name, address)
            if "arxiv.org" in address:
                assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", address), (page.name, address)
