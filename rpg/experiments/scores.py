"""Evaluation by figures of runs and zoos: those of a function, of a task, or of the weights alone."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.adapter_merges import PeftMerges
from rpg.evaluation.asking import Made
from rpg.evaluation.field_plots import save_image
from rpg.evaluation.network_merges import Merges, NetworkMerges
from rpg.evaluation.page.gather import losses_of, provenance_of, software
from rpg.evaluation.scores.made_for import Conditions
from rpg.evaluation.scores.measure import Options, evaluate_scores
from rpg.evaluation.scores.results import ScoreResult
from rpg.evaluation.scores.samples import SCALE, draw_samples
from rpg.evaluation.scores.scorer import Scorer, StoredScorer, TaskScorer, load_scorer
from rpg.evaluation.scores.show import ScorePage, draw_scores, write_score_page
from rpg.evaluation.span import ZooSpan
from rpg.evaluation.vectors import StateDict
from rpg.evaluation.workers import Workers
from rpg.experiments.score_conditions import conditions_asked
from rpg.experiments.single import existing, find_task, parts_of, require_for_choices, zoo_span
from rpg.experiments.trajectories import trajectory_of, wished_trajectory
from rpg.generation.folders import find_folder, load_config
from rpg.generation.generator import Generator
from rpg.tasks.base import Classifier, SampleTask
from tokenization.compressed.form import Compressed
from tokenization.errors import InputError
from tokenization.files import make_folder
from tokenization.layouts import Layout
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo


@dataclass(frozen=True)
class Judge:
    """Who scores, and how figures are read.

    Attributes:
        reference: the user's function, as ``package.module:function``; None for the task.
        lower, higher: figures of which less or more is better, whatever their names say.
    """

    reference: str | None = None
    lower: Collection[str] = ()
    higher: Collection[str] = ()


@locks(lambda run, judge, output=None, **_: output or existing(run))
def evaluate_run_by_scores(
    run: Path | str,
    judge: Judge,
    *,
    num: int | None = None,
    seed: int = 0,
    output: Path | str | None = None,
    workers: Workers | None = None,
    split: str | None = None,
    trajectory: str | None = None,
) -> ScoreResult:
    """Generate networks with the generator of a run and score them beside originals and baselines, one at a time.

    Of a generator that takes conditions, networks are made for those of the zoo's unseen tasks, without such for those
    of its held-out checkpoints, or of its training ones. Without anything that scores, networks are told apart by their
    distances. Writes ``evaluation.json``, ``scatter.png``, ``report.html``, and ``samples.png`` of networks that draw.

    Args:
        run: a run folder.
        judge: who scores.
        num: networks to generate; the configuration's number when None.
        seed: decides everything random.
        output: where the results go; the run folder when None.
        workers: the processes that share the work.
        split: of the task's data, the configuration's when None; of ``validation`` networks are made for its tasks.
        trajectory: the condition whose networks are shown on their way from noise.

    Raises:
        InputError: the run has no generator, its zoo is gone, or the scorer refuses a network.
    """
    run, workers = Path(run), workers or Workers()
    generator = Generator.from_pretrained(run)
    config, zoo = generator.config, Zoo.open(generator.config.zoo)
    num, split = num or config.evaluate.num, split or config.evaluate.split
    scorer = _scorer(judge, generator.adapter, config, zoo, split)
    wish = wished_trajectory(config, generator.condition, trajectory) if trajectory is not None else None
    require_for_choices(config, split if generator.condition is not None else "")
    trained, held_out = parts_of(zoo, config)
    conditions, requested = conditions_asked(generator, zoo, trained, held_out, num, split)
    made = generator.one_by_one(num, seed=seed, condition=requested, partition=workers.partition)
    scorer, networks = _in_form(scorer, generator.layout.compressed, made)
    span, asked = zoo_span(generator, zoo, trained), _stored(generator, num, seed)
    result = evaluate_scores(
        scorer,
        span,
        Made(num, generator.share(num, workers.partition), networks, asked),
        config.evaluate,
        held_out=[generator.layout.checkpoint(zoo, index) for index in held_out],
        conditions=conditions,
        options=Options(judge.lower, judge.higher, seed, _merges(generator.adapter, zoo, trained, generator.layout)),
        workers=workers,
    )
    if workers.is_first:
        command = _command(f"rpg evaluate {config.run} --num {num} --seed {seed}", judge)
        facts = provenance_of(generator, zoo, num, seed, result.seconds_per_network, command)
        page = ScorePage(f"Generated networks: {run.name}", facts, losses_of(run / "metrics.jsonl"))
        if wish is not None:
            page.condition, page.trajectory = str(trajectory), _trajectory(generator, scorer, span, wish, seed)
        write_results(Path(output or run), result, page, _drawn(scorer, generator, zoo, trained, requested, seed))
    return result


def _stored(generator: Generator, num: int, seed: int) -> list[int]:
    """The checkpoint that each network was asked to be, where states are those of checkpoints."""
    return generator.asked(num, seed) if generator.config.generate.state == "stored" else []


def goes_by_figures(run: Path | str) -> bool:
    """Whether a run is evaluated by figures even without a function: its task is no single classifier, or it has none.

    Raises:
        InputError: the run has no generator, its zoo is gone, or its task is broken.
    """
    folder = find_folder(run)
    if not (folder / "config.yaml").is_file():
        return False  # the evaluation says what is missing
    config = load_config(folder)
    zoo = Zoo.open(config.zoo)
    return (config.task is None and zoo.task is None) or not isinstance(find_task(config, zoo), Classifier)


@locks(lambda path, judge, config, output=None, **_: output or path)
def evaluate_zoo(
    path: Path | str,
    judge: Judge,
    config: Config,
    *,
    output: Path | str | None = None,
    workers: Workers | None = None,
) -> ScoreResult:
    """Score the checkpoints of a zoo beside the trivial baselines made of them; no generator is needed.

    The baselines are made of the checkpoints in ``train.splits``; the others count as held out.

    Args:
        path: the zoo.
        judge: who scores; the zoo's own task when it names no function.
        config: which baselines, how many, and which checkpoints they are made of.
        output: where the results go; the zoo's folder when None.
        workers: the processes that share the work.

    Raises:
        InputError: nothing scores the checkpoints, or the scorer refuses one.
    """
    path, workers, zoo = Path(path), workers or Workers(), Zoo.open(path)
    adapter = path / CONFIG_NAME
    text = adapter.read_text(encoding="utf-8") if adapter.is_file() else None
    scorer = _scorer(judge, text, config, zoo, config.evaluate.split)
    trained, held_out = parts_of(zoo, config)
    if not trained:
        raise InputError(f"{path} has no checkpoint of the splits {', '.join(config.train.splits)}; set train.splits")
    own, others = ([zoo.entries[index].condition for index in each] for each in (trained, held_out))
    wanted = [each for each in own if each is not None]
    form = Compressed.find(zoo.checkpoint(trained[0]), config.tokens.pruned)
    form = form and form.measured(zoo, trained)
    opened = zoo.checkpoint if form is None else functools.partial(form.checkpoint, zoo)
    first = opened(trained[0])
    names = [name for name, info in first.tensors.items() if info.averaged]
    result = evaluate_scores(
        _in_form(scorer, form)[0],
        ZooSpan([opened(index) for index in trained], names),
        None,
        config.evaluate,
        held_out=[opened(index) for index in held_out],
        conditions=Conditions(own, others, wanted),
        options=Options(judge.lower, judge.higher, config.seed, _merges(text, zoo, trained, form=form)),
        workers=workers,
    )
    if workers.is_first:
        facts = {
            "zoo": f"{len(trained)} of {len(zoo)} checkpoints, {zoo.num_runs} run(s), digest {zoo.digest()}",
            "command": _command(f"rpg evaluate {path} --seed {config.seed}", judge),
            "software": software(),
        }
        write_results(Path(output or path), result, ScorePage(f"A zoo and what is trivial: {path.name}", facts))
    return result


def _drawn(
    scorer: Scorer | None, generator: Generator, zoo: Zoo, trained: Sequence[int], requested: Any, seed: int
) -> Tensor | None:
    """What the first and last original and two generated networks draw; None of networks that do not."""
    if not isinstance(scorer, TaskScorer) or not isinstance(scorer.task, SampleTask):
        return None
    originals = [generator.layout.checkpoint(zoo, index).state_dict() for index in (trained[0], trained[-1])]
    made = generator.one_by_one(2, seed=seed, condition=requested and requested[:2])
    return draw_samples(scorer.task, [*originals, *made])


def write_results(folder: Path, result: ScoreResult, page: ScorePage, drawn: Tensor | None = None) -> None:
    """Write ``evaluation.json``, ``scatter.png`` and ``report.html``, and ``drawn`` as ``samples.png``.

    Raises InputError if the folder refuses.
    """
    make_folder(folder)
    result.save(folder / "evaluation.json")
    draw_scores(result, folder / "scatter.png")
    write_score_page(folder / "report.html", result, page)
    if drawn is not None:
        save_image(drawn, folder / "samples.png", SCALE)


def _scorer(judge: Judge, adapter: str | None, config: Config, zoo: Zoo, split: str) -> Scorer | None:
    """What gives figures; None where neither user nor configuration nor zoo says how."""
    if judge.reference is not None:
        return load_scorer(judge.reference, adapter)
    if judge.lower or judge.higher:
        raise InputError("--lower and --higher are for figures of your own; give --score, too")
    if config.task is None and zoo.task is None:
        return None
    names = zoo.condition.names if zoo.condition is not None and zoo.condition.kind in ("class", "text") else ()
    return TaskScorer(find_task(config, zoo), split, names)


def _in_form(
    scorer: Scorer | None, form: Compressed | None, networks: Iterable[StateDict] = ()
) -> tuple[Scorer | None, Iterator[StateDict]]:
    """Networks in the form of their tokens where they are stored otherwise, and the scorer of such."""
    if form is None:
        return scorer, iter(networks)
    return scorer and StoredScorer(scorer, form.compress), map(form.expand, networks)


def _merges(
    adapter: str | None, zoo: Zoo, trained: Sequence[int], layout: Layout | None = None, form: Compressed | None = None
) -> Merges:
    """Merges the zoo's networks; its adapters as they were saved, into the form that the layout gives them."""
    form = layout.compressed if layout is not None else form
    opened = zoo.checkpoint if form is None else functools.partial(form.checkpoint, zoo)
    if adapter is None:
        return NetworkMerges([opened(index) for index in trained], [zoo.entries[i].run for i in trained])
    finish = layout.canonical.apply if layout is not None and layout.canonical is not None else None
    return PeftMerges(adapter, [zoo.checkpoint(index) for index in trained], finish)


def _trajectory(
    generator: Generator, scorer: Scorer | None, span: ZooSpan, wish: Any, seed: int
) -> list[tuple[int, Tensor]]:
    """The first figure of networks for a condition on their way from noise, without figures their distance."""
    names = generator.condition.names if generator.condition is not None else ()
    asked = wish
    if isinstance(wish, str):  # a text that the zoo has is known to the scorer by its place
        asked = [float(names.index(wish))] if wish in names else None

    form = generator.layout.compressed

    def measure(networks: Sequence[StateDict]) -> Tensor:
        networks = networks if form is None else [form.expand(each) for each in networks]
        if scorer is None:
            return span.distances(span.place(networks)).amin(1) / (span.unit() or 1.0)
        every = [scorer(each, asked, f"network {place} on its way") for place, each in enumerate(networks)]
        return torch.tensor([next(iter(each.values())) for each in every])

    return trajectory_of(generator, wish, seed, measure, wanted=True)


def _command(command: str, judge: Judge) -> str:
    parts = [command, *(["--score", judge.reference] if judge.reference else [])]
    parts += [f"--lower {name}" for name in judge.lower] + [f"--higher {name}" for name in judge.higher]
    return " ".join(parts)
