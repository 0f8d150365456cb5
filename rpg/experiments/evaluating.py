"""Evaluation of runs and zoos: by a task, by a function of the user's, or by the weights alone."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rpg.config import Config, overridden
from rpg.devices import single_threaded
from rpg.evaluation.combinations import Conditions, conditions_asked
from rpg.evaluation.engine import Made, Workers
from rpg.evaluation.field_measures import SCALE, draw_samples, save_image
from rpg.evaluation.judges import OwnScorer, Scorer, StoredScorer, TaskScorer, load_scorer
from rpg.evaluation.matching import Distances
from rpg.evaluation.measures import Evaluation, Options
from rpg.evaluation.page.page import Heatmap, Page, write_report
from rpg.evaluation.permutations import symmetries
from rpg.evaluation.report import FILE, Report, shown
from rpg.evaluation.span import ZooSpan
from rpg.evaluation.starts import finetuned_baselines
from rpg.evaluation.two_sample import distances
from rpg.experiments.single import (
    denoising_path_of,
    existing,
    find_task,
    merges_of,
    parts_of,
    requested_condition,
    require_for_choices,
    zoo_span,
)
from rpg.generation.generator import Generator
from rpg.packages import DISTRIBUTION, installed
from rpg.tasks.base import Classifier, SampleTask
from rpg.training.data import training_entries
from tokenization.checkpoint.checkpoint import StateDict
from tokenization.compressed.form import Compressed
from tokenization.errors import InputError
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

HEATMAP_COLUMNS = 240


@dataclass(frozen=True)
class Judge:
    """Who scores, and how metrics are read.

    Attributes:
        reference: the user's function, or its place as ``package.module:function``; None for the task.
        lower, higher: metrics of which less or more is better, whatever their names say.
    """

    reference: str | Callable[..., Any] | None = None
    lower: Collection[str] = ()
    higher: Collection[str] = ()

    def scorer(self, adapter: str | None, config: Config, zoo: Zoo, split: str) -> Scorer | None:
        """What computes metrics; None if neither the user nor the configuration nor the zoo says how."""
        if callable(self.reference):
            return OwnScorer(self.reference, getattr(self.reference, "__name__", "score"), adapter)
        if self.reference is not None:
            return load_scorer(self.reference, adapter)
        if self.lower or self.higher:
            raise InputError("--lower and --higher need --score")
        if config.task is None and zoo.task is None:
            return None
        names = zoo.condition.names if zoo.condition is not None and zoo.condition.kind in ("class", "text") else ()
        return TaskScorer(find_task(config, zoo), split, names)

    def words(self) -> str:
        """The options of a command line."""
        parts = ["", "--score", str(self.reference)] if self.reference else [""]
        parts += [f"--lower {name}" for name in self.lower] + [f"--higher {name}" for name in self.higher]
        return " ".join(parts)


def judges(judge: Callable[..., tuple[Report, Page]]) -> Callable[..., Report]:
    """An experiment's ``evaluate``: opens a run, has it judged, and writes report and page, but for choices.

    Args:
        judge: takes generator and zoo, and the folder ``run``, ``seed``, ``split`` and its own options by name; one
            thread works for it.

    Raises InputError if choices are to be made by what the run learned from.
    """

    @functools.wraps(judge)
    @locks(lambda run, split="test", **_: None if split == "validation" else existing(run))
    def evaluate(run: Path | str, *, seed: int = 0, split: str = "test", workers: Any = None, **options: Any) -> Report:
        generator = Generator.from_pretrained(run)
        require_for_choices(generator.config, split)
        with single_threaded():
            zoo = Zoo.open(generator.config.zoo)
            report, page = judge(generator, zoo, run=Path(run), seed=seed, split=split, **options)
        if split != "validation":
            write_report(run, report, page)
        return report

    return evaluate


@locks(lambda run, judge=None, output=None, **_: output or existing(run))
def evaluate_run(
    run: Path | str, judge: Judge | None = None, *, num: int | None = None, seed: int = 0,
    output: Path | str | None = None, workers: Workers | None = None, split: str | None = None,
    path_condition: str | None = None, changes: Sequence[str] = (),
) -> Report:  # fmt: skip
    """Generate networks with the generator of a run and judge them beside originals and simple baselines.

    With conditions, networks are made for the zoo's unseen tasks, else for its held-out or training checkpoints. Where
    nothing scores, networks are told apart by their weights. Writes ``evaluation.json``, ``scatter.png`` and
    ``report.html``, and ``samples.png`` of networks that draw.

    Args:
        judge: who scores; the task when None.
        num, split, output: networks, data, and where results go; the configuration's, and the run folder, when None.
        path_condition: the condition whose networks are shown on their way from noise.
        changes: of the section ``evaluate``, for example ``evaluate.split=validation``.

    Raises:
        InputError: there is no generator or zoo, the scorer refuses a network, the results would replace those of a
            function, or a change is one of another section.
    """
    run, workers, judge = Path(run), workers or Workers(), judge or Judge()
    generator = Generator.from_pretrained(run)
    config, zoo = _changed(generator.config, changes), Zoo.open(generator.config.zoo)
    num, split = num or config.evaluate.num, split or config.evaluate.split
    _keep_scores(Path(output or run), judge)
    require_for_choices(config, split if generator.condition is not None else "")
    scorer = judge.scorer(generator.adapter, config, zoo, split)
    asked_for = requested_condition(config, generator.condition, path_condition) if path_condition is not None else None
    trained, held_out = parts_of(zoo, config)
    conditions, requested = conditions_asked(generator, zoo, trained, held_out, num, split)
    runs = [zoo.entries[index].run for index in trained]
    made = generator.one_by_one(num, seed=seed, condition=requested, partition=workers.partition)
    scorer, networks = _in_form(scorer, generator.layout.compressed, made)
    task: Any = scorer.task if isinstance(scorer, TaskScorer) and isinstance(scorer.task, Classifier) else None
    span = zoo_span(generator, zoo, trained, runs, task is not None)
    # hidden units are matched of small networks that a single classifier judges
    matching = Distances(span, symmetries(task)) if task is not None and span.held and span.scales else None
    merges, control = merges_of(generator.adapter, zoo, trained, generator.layout), config.evaluate.control
    train = None if control is None else functools.partial(finetuned_baselines, task, config=control, seed=seed)
    options = Options(judge.lower, judge.higher, split, seed, merges, matching, train)
    evaluation = Evaluation(scorer, span, config.evaluate, conditions, options, workers)
    stored = generator.asked(num, seed) if config.generate.state == "stored" else []
    others = [generator.layout.checkpoint(zoo, index) for index in held_out]
    report = evaluation.run(Made.singly(num, generator.share(num, workers.partition), networks), others, stored)
    if not stored and (asked := generator.asked(num, seed)):
        measured = _stored_span(generator, scorer, zoo_span(generator, zoo, trained), asked, seed, workers)
        report = report.model_copy(update={"extras": {**report.extras, "span": measured}})
    if workers.is_first:
        command = f"rpg evaluate {config.run} --num {num} --seed {seed}{judge.words()}"
        facts = provenance_of(generator, zoo, num, seed, report.facts.get("seconds_per_network"), command)
        page = Page(f"Generated networks: {run.name}", facts, losses_of(run / "metrics.jsonl"))
        page.heatmaps = _heatmaps(span, evaluation.vectors_of("generated"))
        if asked_for is not None or (generator.condition is None and task is not None):
            page.condition = path_condition or ""
            page.denoising_path = _denoising_path(generator, scorer, span, asked_for, seed)
        write_report(output or run, report, page)
        if (drawn := _drawn(scorer, generator, zoo, trained, requested, seed)) is not None:
            save_image(drawn, Path(output or run) / "samples.png", SCALE)
    return report


@locks(lambda path, judge, config, output=None, **_: output or path)
def evaluate_zoo(
    path: Path | str, judge: Judge, config: Config, *, output: Path | str | None = None, workers: Workers | None = None
) -> Report:
    """Score the checkpoints of a zoo beside the simple baselines made of them; no generator is needed.

    The baselines are made of the checkpoints in ``train.splits``; the others count as held out.

    Args:
        judge: who scores; the zoo's own task when it names no function.
        config: which baselines, how many, and which checkpoints they are made of.
        output: where the results go; the zoo's folder when None.

    Raises:
        InputError: nothing scores the checkpoints, the scorer refuses one, or the results would replace those of a
            function.
    """
    path, workers, zoo = Path(path), workers or Workers(), Zoo.open(path)
    _keep_scores(Path(output or path), judge)
    adapter, split = path / CONFIG_NAME, config.evaluate.split
    text = adapter.read_text(encoding="utf-8") if adapter.is_file() else None
    scorer = judge.scorer(text, config, zoo, split)
    trained, held_out = parts_of(zoo, config)
    if not trained:
        raise InputError(f"{path} has no checkpoint of the splits {', '.join(config.train.splits)}; set train.splits")
    own, others = ([zoo.entries[index].condition for index in each] for each in (trained, held_out))
    wanted = [each for each in own if each is not None]
    form = Compressed.find(zoo.checkpoint(trained[0]), config.tokens.pruned)
    form = form and form.measured(zoo, trained)
    opened = zoo.checkpoint if form is None else functools.partial(form.checkpoint, zoo)
    merges = merges_of(text, zoo, trained, form=form)
    runs = [zoo.entries[index].run for index in trained]
    report = Evaluation(
        _in_form(scorer, form)[0],
        ZooSpan([opened(index) for index in trained], None, runs),
        config.evaluate,
        Conditions(own, others, wanted),
        Options(judge.lower, judge.higher, split, config.seed, merges),
        workers,
    ).run(None, [opened(index) for index in held_out])
    if workers.is_first:
        facts = {
            "zoo": f"{len(trained)} of {len(zoo)} checkpoints, {zoo.num_runs} run(s), digest {zoo.digest()}",
            "command": f"rpg evaluate {path} --seed {config.seed}{judge.words()}",
            "software": software(),
        }
        write_report(output or path, report, Page(f"A zoo and simple baselines: {path.name}", facts))
    return report


def _changed(config: Config, changes: Sequence[str]) -> Config:
    """The configuration of a run with other settings of its evaluation."""
    other = next((each for each in changes if not each.startswith("evaluate.")), None)
    if other is not None:
        raise InputError(
            f"--set {other} changes what is trained; of a run only --set evaluate.… can be changed, for the rest train "
            "another one"
        )
    return Config.parse(overridden(config.plain(), changes), "--set") if changes else config


def _keep_scores(folder: Path, judge: Judge) -> None:
    """Raise InputError if the scores of a user's function would be replaced by others."""
    if judge.reference is not None or not (folder / FILE).is_file():
        return
    try:
        name = Report.load(folder).judge
    except InputError:
        return  # of an earlier version, or broken
    if not any(each.isspace() for each in name):  # judges other than functions have a comma or a space
        raise InputError(
            f"{folder / FILE} holds what {name} scored, which this would replace; give --score {name}, or another "
            "folder with --output"
        )


def _stored_span(
    generator: Generator, scorer: Scorer | None, zoo: ZooSpan, asked: Sequence[int], seed: int, workers: Workers
) -> dict[str, Any] | None:
    """The span of networks with stored states, which are made here for this measurement alone."""
    part, num = workers.partition, len(asked)
    made = generator.one_by_one(num, seed=seed, state="stored", partition=part)
    networks = Made.singly(num, generator.share(num, part), _in_form(None, generator.layout.compressed, made)[1])
    evaluation = Evaluation(scorer, zoo, generator.config.evaluate, workers=workers)
    return evaluation.span(evaluation.look("stored", networks), asked)


def _drawn(
    scorer: Scorer | None, generator: Generator, zoo: Zoo, trained: Sequence[int], requested: Any, seed: int
) -> Tensor | None:
    """Samples of the first and last original and of two generated networks; None for networks that draw none."""
    if not isinstance(scorer, TaskScorer) or not isinstance(scorer.task, SampleTask):
        return None
    originals = [generator.layout.checkpoint(zoo, index).state_dict() for index in (trained[0], trained[-1])]
    made = generator.one_by_one(2, seed=seed, condition=requested and requested[:2])
    return draw_samples(scorer.task, [*originals, *made])


def _in_form(
    scorer: Scorer | None, form: Compressed | None, networks: Iterable[StateDict] = ()
) -> tuple[Scorer | None, Iterator[StateDict]]:
    """Networks and scorer in the form of tokens, for networks that are stored in another form."""
    if form is None:
        return scorer, iter(networks)
    return scorer and StoredScorer(scorer, form.compress), map(form.expand, networks)


def _denoising_path(
    generator: Generator, scorer: Scorer | None, span: ZooSpan, asked_for: Any, seed: int
) -> list[tuple[int, Tensor]]:
    """The first metric of networks along their denoising path; without metrics, their distance."""
    names = generator.condition.names if generator.condition is not None else ()
    asked = asked_for
    if isinstance(asked_for, str):  # a text that the zoo has is known to the scorer by its place
        asked = [float(names.index(asked_for))] if asked_for in names else None
    form = generator.layout.compressed

    def measure(networks: Sequence[StateDict]) -> Tensor:
        networks = networks if form is None else [form.expand(each) for each in networks]
        if scorer is None:
            return span.distances(span.project(networks)).amin(1) / (span.unit() or 1.0)
        every = [scorer(each, asked, f"network {place} on its way") for place, each in enumerate(networks)]
        return torch.tensor([next(iter(each.values())) for each in every])

    return denoising_path_of(generator, asked_for, seed, measure, wanted=asked_for is not None)


def _heatmaps(span: ZooSpan, generated: Tensor | None) -> list[Heatmap]:
    """Two generated networks, each over its three nearest originals; columns evenly spaced over the values."""
    if generated is None or len(span.checkpoints) < 2 or not span.scales:
        return []
    zoo = span.vectors()
    columns = torch.linspace(0, zoo.shape[1] - 1, min(HEATMAP_COLUMNS, zoo.shape[1])).round().long().unique()
    spread = zoo.square().mean().sqrt().clamp(min=1e-12)
    labels, rows = [], []
    for index in range(min(2, len(generated))):
        order = distances(generated[index : index + 1], zoo)[0].argsort()[:3]
        labels.append(f"generated {index + 1}")
        rows.append(generated[index, columns])
        for rank, row in enumerate(order.tolist()):
            labels.append(f"original {row} ({('nearest', '2nd', '3rd')[rank]})")
            rows.append(zoo[row, columns])
    caption = "Deviation from the zoo’s mean, in each layer’s spread: blue below, red above."
    return [Heatmap(labels, (torch.stack(rows) / spread).nan_to_num(), caption)]


def losses_of(path: Path) -> tuple[list[float], list[float]]:
    """Optimizer steps and losses that a run logged; empty without a log."""
    if not path.is_file():
        return [], []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def provenance_of(
    generator: Generator, zoo: Zoo, num: int, seed: int, seconds: float | None, command: str
) -> dict[str, str]:
    """Where the metrics of a run come from, row by row."""
    config = generator.config
    num_trained = len(training_entries(zoo, config.train.splits))
    rows: dict[str, Any] = {
        "generator": f"{config.model.kind}, sha256 {generator.digest}",
        **{f"generator: {k}": shown(v) if isinstance(v, float) else v for k, v in generator.facts.items()},
        "zoo": f"{num_trained} of {len(zoo)} checkpoints, {zoo.num_runs} run(s), digest {zoo.digest()}",
        "task": yaml.safe_dump(zoo.task, sort_keys=False) if zoo.task else "none",
        "tokens": f"{generator.layout.num_tokens} of {generator.layout.token_size}, {generator.layout.num_values:,} "
        f"values, normalization {config.tokens.normalization}",
        "networks asked for": f"{num} with seed {seed}, {config.generate.steps} sampling steps",
        "seconds a network": None if seconds is None else f"{seconds:.3g}",
        "command": command,
        "configuration": yaml.safe_dump(config.plain(), sort_keys=False),
        "software": software(),
    }
    return {name: str(value) for name, value in rows.items() if value is not None}


def software() -> str:
    """Versions of the software."""
    return f"rpg {installed(DISTRIBUTION)}, torch {torch.__version__}, Python {platform.python_version()}"
