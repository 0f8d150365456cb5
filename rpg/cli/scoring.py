"""The commands that score networks."""

from __future__ import annotations

from rpg import options as o
from rpg.cli.reading import load
from rpg.console import console


def evaluate(run: o.RunFolder, num: o.NumScored = None, seed: o.Seed = 0) -> None:
    """Score generated networks beside originals and trivial baselines."""
    from rpg.evaluation.tables import print_table
    from rpg.experiments.single import evaluate_run

    print_table(evaluate_run(run, num=num, seed=seed))
    for kind, name in (("figures", "evaluation.json"), ("picture", "scatter.png"), ("report", "report.html")):
        console.print(f"{kind + ':':<8} {run / name}")


def score(
    config: o.ConfigFile, adapters: o.Adapters, overrides: o.Overrides = None, split: o.RowSplit = "test"
) -> None:
    """Score LoRA or DoRA adapters on the held-out rows of every task of a configuration."""
    from rpg.experiments.adapters import print_scores, score_folders

    print_scores(score_folders(load(config, overrides), adapters, split), console)
