"""Every kind of scoring, for one process or several: python launched_scores.py FOLDER OUTPUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rpg.evaluation.workers import Workers
from rpg.experiments.evaluating import Judge, evaluate_run, evaluate_zoo
from rpg.experiments.score_files import score_checkpoints
from rpg.generation.generator import Generator
from rpg.generation.sampler import join_processes


def score_everything(folder: Path, output: Path) -> None:
    """Write the results of every way of scoring."""
    partition, _ = join_processes("cpu")
    judge, run = Judge(f"{folder}/mine.py:norm"), folder / "run"
    config = Generator.from_pretrained(run).config
    evaluate_run(run, judge, num=3, output=output / "own", workers=Workers(partition))
    evaluate_zoo(config.zoo, judge, config, output=output / "zoo", workers=Workers(partition))
    evaluate_run(run, num=3, output=output / "task", workers=Workers(partition))
    found = score_checkpoints([Path(config.zoo)], None, None, "test", Workers(partition))
    if partition.rank == 0:
        (output / "files.json").write_text(json.dumps(found))


if __name__ == "__main__":
    score_everything(Path(sys.argv[1]), Path(sys.argv[2]))
