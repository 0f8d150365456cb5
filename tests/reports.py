"""Every command's ``evaluation.json`` against the one form that docs/formats.md has."""

from __future__ import annotations

import json
from pathlib import Path

from rpg.evaluation.report import Report
from rpg.generation.model_card import scores_of
from tests.golden_record import check_report
from tests.test_formats import documented


def checked_report(folder: Path | str, experiment: str, record: str = "") -> Report:
    """The report in a folder, with the documented keys and no others, originals and generated networks among them.

    With the name of a ``record``, it is also what was recorded under that name.
    """
    content = json.loads((Path(folder) / "evaluation.json").read_text())
    assert content["format"] == 2 and content["experiment"] == experiment
    assert list(content) == documented("evaluation.json")
    for kinds in (content["kinds"], *content["parts"].values()):
        assert {"original", "generated"} <= kinds.keys()
        for each in kinds.values():
            assert list(each) == documented("evaluation.json kinds")
            assert each["summaries"].keys() == each["metrics"].keys()
    report = Report.load(folder)
    if report.mean("generated") is not None:  # what `rpg push` puts into a model card
        assert scores_of(content)["generated"][report.first] == report.mean("generated")
    if record:
        check_report(record, report)
    return report
