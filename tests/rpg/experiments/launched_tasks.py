"""Runs on unseen tasks scored by as many processes as are launched: torchrun … launched_tasks.py RUN…"""

from __future__ import annotations

import sys

from rpg.evaluation.workers import Workers
from rpg.experiments.unseen_tasks import evaluate_unseen
from rpg.generation.sampler import join_processes

if __name__ == "__main__":
    partition, _ = join_processes("cpu")
    for run in sys.argv[1:]:
        evaluate_unseen(run, workers=Workers(partition))
