"""The driver of every experiment: collect, train, generate, judge, report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from rpg.config import Config
from rpg.console import bar_in_notebook
from rpg.evaluation.report import Networks, Report
from rpg.evaluation.workers import Workers
from rpg.experiments.evaluating import Judge, evaluate_run, evaluate_zoo
from rpg.experiments.grouping_examples import evaluate_groupings
from rpg.experiments.single import collect, requested_condition
from rpg.experiments.tasks_page import requested_task
from rpg.experiments.unseen_tasks import evaluate_unseen, require_splits, task_family
from rpg.generation.folders import find_folder, load_config, require_files
from rpg.planning.proposal import asked
from rpg.tasks import build_task
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.config import TASKS
from rpg.tasks.language.config import LanguageConfig
from rpg.training.loop import train_to_the_end
from tokenization.errors import InputError
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.zoo.locks import locks

ProgressBars = Mapping[str, Callable[..., None]]


def train_anew(config: Config, **options: Any) -> Path:
    """Train, and replace an existing run."""
    return train_to_the_end(config, overwrite=True, **options)


@dataclass(frozen=True)
class Experiment:
    """What trains and judges the networks of a configuration.

    Attributes:
        name: as the report has it: ``networks``, ``tasks``, ``fields``, …
        evaluate: takes a run folder, and ``seed``, ``split`` (``test``, or ``validation`` to make choices by) and
            ``workers`` by name; returns the report, and writes it unless the split is ``validation``.
        train: takes a configuration, and ``progress`` and ``watch`` by name, as `rpg.training.loop.train` does.
        then: the command to run next; ``{run}`` stands for the run, ``{asked}`` for what its generator is asked for.
        further: options of ``evaluate`` for the generators of further seeds.
    """

    name: str
    evaluate: Callable[..., Report]
    train: Callable[..., Any] = train_anew
    then: str = "rpg generate {run}{asked} --num 10"
    further: Mapping[str, Any] = field(default_factory=dict)

    def next(self, config: Config, run: Path | str) -> str:
        """The command to run next."""
        return self.then.format(run=run, asked=asked(config.zoo, config.model.condition))


def experiment_of(
    config: Config, judge: Judge | None = None, *, path_condition: str | None = None, command: str = ""
) -> Experiment:
    """The experiment of a configuration: its task's own, else on unseen tasks if it has any, else on networks.

    Args:
        judge: who scores; tasks are scored by their family, networks by a function where there is one.
        path_condition: the condition whose networks the page shows on their way from noise.

    Raises:
        InputError: before anything long begins: tasks of some split are missing, or there is no such path_condition.
    """
    if config.task is not None and (own := TASKS[config.task.name].experiment):
        found: Experiment = resolve_name(own)(config)
        return found
    if config.model.condition.kind == "examples":
        return Experiment("groupings", evaluate_groupings, then="rpg generate {run} --examples FOLDER --num 1")
    function = judge.reference if judge is not None else None
    if function is None and compares_tasks(config):
        if judge is not None and (judge.lower or judge.higher):
            raise InputError("--lower and --higher need --score")
        task = task_family(config)
        require_splits(task)
        bits = requested_task(task, config, path_condition) if path_condition is not None else None
        return Experiment("tasks", partial(evaluate_unseen, command=command, path_condition=bits))
    if path_condition is not None and config.task is not None:
        task = build_task(config.task)
        requested_condition(config, getattr(task, "condition", None), path_condition)
    return Experiment("networks", partial(evaluate_run, judge=judge, path_condition=path_condition))


def evaluate(
    run: Path | str, score: Callable[..., Any] | str | None = None, *, num: int | None = None, seed: int = 0,
    lower: Collection[str] = (), higher: Collection[str] = (), changes: Sequence[str] = (), split: str | None = None,
    output: Path | str | None = None, path_condition: str | None = None, workers: Workers | None = None,
) -> Report:  # fmt: skip
    """Compare generated networks with originals and simple baselines; for a zoo, only originals and baselines.

    Args:
        run: a run, a generator's folder or a zoo.
        score: a function of a state dict or of a path that returns a number or a dict of numbers, or its place,
            ``module:function``; the task when None, and the weights alone where there is none.
        num: networks to generate; the configuration's number when None.
        lower, higher: metrics of which less or more is better, whatever their names say.
        changes: of the section ``evaluate``, for example ``evaluate.num_baseline=10``; of a zoo of any section.
        output: where ``evaluation.json`` and ``report.html`` go; the run's or the zoo's folder when None.
        path_condition: the condition whose networks are shown on their way from noise.

    Raises:
        InputError: there is neither a generator nor a zoo, the function refuses a network, the results would replace
            those of a function, or an option is not for what is judged.
    """
    run, judge = Path(run), Judge(score, lower, higher)
    with bar_in_notebook("scoring", workers and workers.report) as bar:
        workers = workers or Workers(report=bar)
        if (run / "zoo.json").is_file():
            if num is not None:
                raise InputError(f"{run} is a zoo, of which nothing is generated; leave --num out")
            if path_condition is not None:
                raise InputError("--denoising-path is for generators with conditions; a zoo generates nothing")
            more = [f"evaluate.split={split}"] if split is not None else []
            return evaluate_zoo(
                run, judge, Config.defaults([*changes, f"seed={seed}", *more]), output=output, workers=workers
            )
        if score is None and (own := experiment_of_sensors(run)) is not None:
            given = {"--num": num, "--lower": lower, "--higher": higher, "--set": changes, "--output": output}
            if refused := [name for name, value in {**given, "--denoising-path": path_condition}.items() if value]:
                raise InputError(
                    f"{refused[0]} is not for runs of sensors, which are judged in a way of their own; leave it out"
                )
            return own.evaluate(run, seed=seed, split=split or "test")
        return evaluate_run(
            run, judge, num=num, seed=seed, output=output, workers=workers, split=split, path_condition=path_condition,
            changes=changes,
        )  # fmt: skip


def experiment_of_sensors(run: Path) -> Experiment | None:
    """What judges a run of sensors: by settings, words or examples, or draws; None for other runs."""
    require_files(folder := find_folder(run))
    config = load_config(folder)
    return experiment_of(config) if config.task is not None and config.task.name == "sensors" else None


def next_command(run: Path) -> str:
    """The command to run after ``rpg evaluate``."""
    if (run / "zoo.json").is_file():
        return f"rpg inspect {run} --write-config mine.yaml"
    own = experiment_of_sensors(run) or Experiment("networks", evaluate_run)
    return own.next(load_config(find_folder(run)), run)


def compares_tasks(config: Config) -> bool:
    """Whether the task is a family of binary tasks, some of which stay unseen."""
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, TaskFamily) or config.model.condition.kind != "binary" or task.condition.kind != "binary":
        return False
    all_seen = isinstance(config.task, LanguageConfig) and config.task.unseen == 0 and config.task.conditions is None
    return isinstance(task, ImageTaskFamily) or not all_seen


def require_adapters(config: Config) -> None:
    """Raise InputError if there are neither adapters nor a task that trains them."""
    if config.task is None and not (Path(config.zoo) / CONFIG_NAME).is_file():
        raise InputError(
            f"{config.zoo} holds no adapters, and the configuration has no task that trains any; adopt yours with "
            "`rpg collect --from FOLDER --zoo ZOO`, or name a task"
        )
    if config.task is not None and not isinstance(config.task, LanguageConfig):
        raise InputError(f"task.name is {config.task.name}, which trains no adapters; see configs/lora/tiny.yaml")


@locks(lambda config, *_, **__: config.run)
def run_experiment(
    config: Config, experiment: Experiment, *, progress: ProgressBars | None = None, seeds: int = 1, **options: Any
) -> Report:
    """Complete the zoo, train (an existing run is replaced), and evaluate.

    Args:
        config: the experiment; without a task its zoo has to be there.
        progress: callbacks named ``collect`` (done, total), ``train`` (done, total, loss) and ``watch``, as
            `rpg.training.loop.train` takes it.
        seeds: generators to train: ``config.seed``, the next, …; all but the first in ``<run>/seed-N``.
        options: of ``experiment.evaluate``.

    Returns:
        The report of the first seed, with the facts of all seeds.
    """
    progress, started = progress or {}, time.perf_counter()
    if config.task is not None:
        collect(config, progress=progress.get("collect"))
    collected = time.perf_counter() - started
    reports = []
    for number in range(seeds):
        run = config.run if number == 0 else str(Path(config.run) / f"seed-{config.seed + number}")
        each = config.model_copy(update={"seed": config.seed + number, "run": run})
        if number and config.train.networks is not None:  # each seed's of the other run
            networks = str(Path(config.train.networks) / f"seed-{each.seed}")
            each = each.model_copy(update={"train": config.train.model_copy(update={"networks": networks})})
        experiment.train(each, progress=progress.get("train"), watch=progress.get("watch"))
        further = experiment.further if number else {}
        reports.append(experiment.evaluate(run, seed=each.seed, **{**options, **further}))
    facts: dict[str, Any] = {"collect_seconds": collected, "seconds": time.perf_counter() - started}
    if seeds > 1:
        facts["seeds"] = [{"seed": each.seed, "mean": each.mean("generated"), **each.facts} for each in reports]
    extras = {"over_seeds": over_seeds(reports)} if seeds > 1 else {}
    changes = {"facts": {**reports[0].facts, **facts}, "extras": {**reports[0].extras, **extras}}
    report = reports[0].model_copy(update=changes)
    workers = options.get("workers")
    if workers is None or workers.is_first:
        report.save(config.run)
    return report


def over_seeds(reports: Sequence[Report]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and 95 % interval (Student's t) over the reports of several seeds, by part, kind and metric.

    The metrics of sets of networks are called ``<metric> of <networks>``. Kinds that not all reports have are left out.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    parts = [{"": each.kinds, **each.parts} for each in reports]
    for part, kinds in parts[0].items():
        for kind in kinds:
            if not all(kind in each[part] for each in parts):
                continue
            values = [_means(each[part][kind]) for each in parts]
            found.setdefault(part, {})[kind] = {name: _interval([each[name] for each in values]) for name in values[0]}
    return found


def _means(kind: Networks) -> dict[str, float]:
    means = {name: each.mean for name, each in kind.summaries.items() if each is not None}
    return means | {f"{name} of {size}": each for name, sizes in kind.joint.items() for size, each in sizes.items()}


def _interval(values: list[float]) -> dict[str, Any]:
    from scipy.special import stdtrit  # imported here: only several seeds need it

    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return {"mean": mean, "ci95": [mean - half, mean + half], "values": values}
