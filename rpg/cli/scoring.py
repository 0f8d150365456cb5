"""The commands that score networks."""

from __future__ import annotations

from typing import Any

from rpg.cli import parameters as o
from rpg.cli.reading import guard, load
from rpg.console import console, progress_bar
from tokenization.errors import InputError


def evaluate(
    run: o.Evaluated,
    num: o.NumScored = None,
    seed: o.Seed = 0,
    function: o.Function = None,
    lower: o.Lower = None,
    higher: o.Higher = None,
    overrides: o.Overrides = None,
    output: o.ResultFolder = None,
    trajectory: o.Trajectory = None,
    device: o.Device = "auto",
    ignore_memory: o.IgnoreMemory = False,
) -> dict[str, Any]:
    """Score generated networks beside originals and trivial baselines; of a zoo, those alone.

    With neither a task nor a function that scores, networks are compared by their weights alone.
    On several devices: accelerate launch -m rpg evaluate RUN
    """
    from rpg.evaluation import tables
    from rpg.evaluation.scores import show
    from rpg.evaluation.workers import Workers
    from rpg.experiments.scores import Judge, evaluate_run_by_scores, evaluate_zoo, goes_by_figures
    from rpg.experiments.single import MOST_VALUES, evaluate_run
    from rpg.generation.sampler import join_processes
    from rpg.planning.guard import evaluation_need

    partition, place = join_processes(device)
    judge, is_zoo = Judge(function, lower or (), higher or ()), (run / "zoo.json").is_file()
    by_figures = not is_zoo and (function is not None or goes_by_figures(run))
    if trajectory is not None and not by_figures:
        raise InputError("--trajectory is for generators with conditions; the report shows the others' as they are")
    if not is_zoo:
        limit = 0 if by_figures else MOST_VALUES  # figures are of one network after the other
        guard(lambda: evaluation_need(run, limit, num), ignore_memory)
    with progress_bar(f"scoring on {place}") as advance:
        workers = Workers(partition, advance)
        if is_zoo:
            from rpg.config import Config

            if num is not None:
                raise InputError(f"{run} is a zoo, of which nothing is generated; leave --num out")
            config = Config.defaults([*(overrides or []), f"seed={seed}"])
            scores = evaluate_zoo(run, judge, config, output=output, workers=workers)
        elif overrides:
            raise InputError("--set changes the evaluation of a zoo; a run is evaluated as its configuration says")
        elif by_figures:
            scores = evaluate_run_by_scores(
                run, judge, num=num, seed=seed, output=output, workers=workers, trajectory=trajectory
            )
        elif lower or higher:
            raise InputError("--lower and --higher are for figures of your own; give --score, too")
        else:
            scores = None
            result = evaluate_run(run, num=num, seed=seed, output=output, workers=workers)
    show.print_scores(scores, console) if scores is not None else tables.print_table(result, console)
    told = tables.means_of(result) if scores is None else show.means_of(scores)
    for kind, name in (("figures", "evaluation.json"), ("picture", "scatter.png"), ("report", "report.html")):
        console.print(f"{kind + ':':<8} {(output or run) / name}")
    return {"run": str(run), "figures": str((output or run) / "evaluation.json"), "networks": told}


def score(
    files: o.Scored,
    function: o.Function = None,
    overrides: o.Overrides = None,
    split: o.RowSplit = "test",
    device: o.Device = "auto",
) -> dict[str, Any]:
    """Score checkpoints of any kind, each by itself, with a task or a function of your own."""
    from rpg.evaluation.workers import Workers
    from rpg.experiments.score_files import print_figures, score_checkpoints
    from rpg.experiments.scores import Judge
    from rpg.generation.sampler import join_processes

    partition, place = join_processes(device)
    configs = [file for file in files if file.suffix in (".yaml", ".yml")]
    checkpoints = [file for file in files if file not in configs]
    if len(configs) > 1 or not checkpoints:
        found = f"{len(configs)} configurations and {len(checkpoints)} checkpoints"
        raise InputError(f"rpg score takes checkpoints and at most one CONFIG, but here are {found}")
    config = load(configs[0], overrides) if configs else None
    with progress_bar(f"scoring on {place}") as advance:
        workers = Workers(partition, advance)
        scores = score_checkpoints(checkpoints, Judge(function), config, split, workers)
    print_figures(scores, console)
    return {"checkpoints": scores}
