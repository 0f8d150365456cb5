"""The README and the documents name what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("folder", ["rpg", "tokenization", "scripts"])
def test_every_source_file_has_its_line_in_the_readme(folder):
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")]
    missing = [file for file in files if f"`{file}`" not in README and Path(file).name != "__init__.py"]
    assert not missing


def test_every_file_the_readme_lists_exists():
    listed = re.findall(r"^\| `([^`]+)` \|", README, flags=re.MULTILINE)
    assert len(listed) > 40
    assert [file for file in listed if not list(ROOT.glob(file))] == []


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
