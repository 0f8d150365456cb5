"""Evaluation by figures of runs and zoos, and the figures of any checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpg.config import Config
from rpg.evaluation.asking import Made
from rpg.evaluation.report.gather import losses_of, provenance_of, software
from rpg.evaluation.scores.measure import Conditions, Options, evaluate_scores
from rpg.evaluation.scores.results import ScoreResult
from rpg.evaluation.scores.scorer import Scorer, TaskScorer, load_scorer
from rpg.evaluation.scores.show import ScorePage, draw_scores, write_score_page
from rpg.evaluation.span import ZooSpan
from rpg.evaluation.workers import Workers
from rpg.experiments.single import find_task, parts_of, zoo_span
from rpg.generation.generator import Generator
from tokenization.errors import InputError
from tokenization.files import make_folder
from tokenization.lora.adapter import CONFIG_NAME
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


def evaluate_run_by_scores(
    run: Path | str,
    judge: Judge,
    *,
    num: int | None = None,
    seed: int = 0,
    output: Path | str | None = None,
    workers: Workers | None = None,
) -> ScoreResult:
    """Generate networks with the generator of a run and score them beside originals and baselines, one at a time.

    Of a generator that takes conditions, networks are made for those of the zoo's held-out checkpoints, or of its
    training ones where none is held out. Writes ``evaluation.json``, ``scatter.png`` and ``report.html``.

    Args:
        run: a run folder.
        judge: who scores.
        num: networks to generate; the configuration's number when None.
        seed: decides everything random.
        output: where the results go; the run folder when None.
        workers: the processes that share the work.

    Raises:
        InputError: the run has no generator, its zoo is gone, or the scorer refuses a network.
    """
    run, workers = Path(run), workers or Workers()
    generator = Generator.from_pretrained(run)
    config, zoo = generator.config, Zoo.open(generator.config.zoo)
    num = num or config.evaluate.num
    scorer = _scorer(judge, generator.adapter, config, zoo)
    trained, held_out = parts_of(zoo, config)
    wanted = _wanted(zoo, held_out or trained, num) if generator.condition is not None else []
    requested: Any = None
    if wanted:
        requested = _texts(zoo, wanted) if zoo.condition and zoo.condition.kind == "text" else wanted
    networks = generator.one_by_one(num, seed=seed, condition=requested, partition=workers.partition)
    asked = generator.asked(num, seed) if config.generate.state == "stored" else []
    conditions = [zoo.entries[index].condition for index in range(len(zoo))]
    result = evaluate_scores(
        scorer,
        zoo_span(generator, zoo, trained),
        Made(num, generator.share(num, workers.partition), networks, asked),
        config.evaluate,
        held_out=[generator.layout.checkpoint(zoo, index) for index in held_out],
        conditions=Conditions([conditions[i] for i in trained], [conditions[i] for i in held_out], wanted),
        options=Options(judge.lower, judge.higher, seed),
        workers=workers,
    )
    if workers.is_first:
        command = f"rpg evaluate {config.run} --num {num} --seed {seed}"
        seconds = result.seconds_per_network
        facts = provenance_of(generator, zoo, num, seed, seconds, _command(command, judge))
        page = ScorePage(f"Generated networks: {run.name}", facts, losses_of(run / "metrics.jsonl"))
        write_results(Path(output or run), result, page)
    return result


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
    scorer = _scorer(judge, text, config, zoo)
    trained, held_out = parts_of(zoo, config)
    if not trained:
        raise InputError(f"{path} has no checkpoint of the splits {', '.join(config.train.splits)}; set train.splits")
    conditions = [zoo.entries[index].condition for index in range(len(zoo))]
    first = zoo.checkpoint(trained[0])
    names = [name for name, info in first.tensors.items() if info.dtype.is_floating_point and info.num_values]
    result = evaluate_scores(
        scorer,
        ZooSpan([zoo.checkpoint(index) for index in trained], names),
        None,
        config.evaluate,
        held_out=[zoo.checkpoint(index) for index in held_out],
        conditions=Conditions(
            [conditions[i] for i in trained], [conditions[i] for i in held_out], [conditions[i] for i in trained]
        ),
        options=Options(judge.lower, judge.higher, config.seed),
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


def write_results(folder: Path, result: ScoreResult, page: ScorePage) -> None:
    """Write ``evaluation.json``, ``scatter.png`` and ``report.html``. Raises InputError if the folder refuses."""
    make_folder(folder)
    result.save(folder / "evaluation.json")
    draw_scores(result, folder / "scatter.png")
    write_score_page(folder / "report.html", result, page)


def _scorer(judge: Judge, adapter: str | None, config: Config, zoo: Zoo) -> Scorer:
    if judge.reference is not None:
        return load_scorer(judge.reference, adapter)
    return TaskScorer(find_task(config, zoo), config.evaluate.split)


def _wanted(zoo: Zoo, indices: Sequence[int], num: int) -> list[tuple[float, ...]]:
    """Conditions of ``num`` entries, evenly spaced; again and again where there are fewer."""
    chosen = indices if len(indices) <= num else [indices[i * len(indices) // num] for i in range(num)]
    found = [zoo.entries[index].condition for index in chosen]
    return [condition for i in range(num) if (condition := found[i % len(found)]) is not None]


def _texts(zoo: Zoo, conditions: Sequence[Sequence[float]]) -> list[str]:
    names = zoo.condition.names if zoo.condition is not None else ()
    return [names[int(each[0])] for each in conditions]


def _command(command: str, judge: Judge) -> str:
    parts = [command, *(["--score", judge.reference] if judge.reference else [])]
    parts += [f"--lower {name}" for name in judge.lower] + [f"--higher {name}" for name in judge.higher]
    return " ".join(parts)
