"""Every code block of the documentation runs, or says why not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Sandbox, blocks_of, parse
from tests.docs.small import PREPARED, SMALL

PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks_of(page)]
SHELLS = ("sh", "bash")
QUICK = ("README", "sensors", "examples", "faq", "recipes", "formats", "design")
"""Pages whose blocks run in every ``make test``; the tests of what the others describe run their commands, and CI runs
the demo and the notebook of one's own checkpoints."""


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=() if page.stem in QUICK else pytest.mark.slow, id=page.stem) for page in PAGES]
)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("rpg.section.default_config", lambda name: tmp_path / "configs" / name)
    before = set(sys.modules)
    sandbox = Sandbox(tmp_path, SMALL)
    if page.stem in PREPARED:
        PREPARED[page.stem](sandbox, monkeypatch)
    try:
        for block in blocks_of(page):
            if block.not_run is None and block.language != "text":
                sandbox.run(block)
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_name_what_is_there(page: Path) -> None:
    for block in blocks_of(page):
        if block.language in SHELLS:
            for command in block.commands():
                if any(f" {word} " in f" {command} " for word in ("rpg", "accelerate", "torchrun", "srun")):
                    parse(command)
