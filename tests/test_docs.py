"""The README and the documents name what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_has_a_line_for_every_file():
    subprocess.run([sys.executable, ROOT / "scripts" / "list_files.py", "--check"], check=True)
    lines = re.findall(r"^\| `([^`]+)` \| (.*) \|$", README, flags=re.MULTILINE)
    assert len(lines) > 40
    assert [file for file, text in lines if len(text) < 10] == []


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"`?\bmake ([a-z_-]+)`", document.read_text()):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (document.name, target)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_local_links_resolve(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
