"""Originals, trivial baselines and generated networks by the figures that a scorer gives them, one network at a time.

Memory is the zoo's mean, one network and what the scorer takes, whatever the number of networks. Distances are those of
`rpg.evaluation.span`; hidden units are not matched, as that needs the network and not its weights alone. n checkpoints,
N networks of a kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.asking import Made, Stopwatch, load
from rpg.evaluation.combinations import Cook, Recipe, cook
from rpg.evaluation.config import EvaluateConfig
from rpg.evaluation.metrics import summarize
from rpg.evaluation.network_merges import Merges
from rpg.evaluation.results import AT_DISTANCE
from rpg.evaluation.scores.made_for import NAMES, Conditions, more_baselines
from rpg.evaluation.scores.results import ScoredNetworks, ScoreResult
from rpg.evaluation.scores.scorer import Figures, Scorer, finite, less_is_better
from rpg.evaluation.span import Places, ZooSpan, measure_span
from rpg.evaluation.streamed import baseline_recipes, most_baselines
from rpg.evaluation.vectors import StateDict
from rpg.evaluation.workers import Workers
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError


@dataclass(frozen=True)
class Options:
    """How networks are judged.

    Attributes:
        lower, higher: figures of which less or more is better, whatever their names say.
        seed: decides the baselines' draws and the bootstrap.
        merges: merges the zoo's networks, or its adapters as PEFT does; none are merged when None.
    """

    lower: Collection[str] = ()
    higher: Collection[str] = ()
    seed: int = 0
    merges: Merges | None = None


@dataclass
class _Kind:
    figures: list[Figures]
    places: Places | None = field(default=None)
    own: Sequence[float] = ()  # distance of each to the checkpoint of its condition


_Found = tuple[Figures, Places, float | None]
"""Of a network its figures, its place and its distance to the checkpoint of its condition."""


def evaluate_scores(
    scorer: Scorer | None,
    zoo: ZooSpan,
    generated: Made | None,
    config: EvaluateConfig,
    *,
    held_out: Sequence[Checkpoint] = (),
    conditions: Conditions | None = None,
    options: Options | None = None,
    workers: Workers | None = None,
) -> ScoreResult:
    """Score a zoo's checkpoints, its trivial baselines and, if there are any, generated networks.

    Args:
        scorer: gives figures; None where nothing does, and networks are told apart by their weights alone.
        zoo: the checkpoints that a generator learned from, or would.
        generated: None of a zoo without a generator.
        config: baselines and distances.
        held_out: checkpoints that nothing was learned from.
        conditions: what networks are made for.
        options: how they are judged.
        workers: the processes that share the work; this one alone when None.

    Raises:
        InputError: the scorer refuses a network, or gives other figures for one than for another.
    """
    conditions, options, workers = conditions or Conditions(), options or Options(), workers or Workers()
    ask = partial(_ask, scorer, conditions)
    num = min(config.num_baseline, generated.num if generated else config.num_baseline)
    baselines = most_baselines(config, num) + (num * len(options.merges.methods) if options.merges else 0)
    workers.expect(len(zoo.checkpoints) + len(held_out) + (generated.num if generated else 0) + baselines)
    figures = workers.map(lambda place, checkpoint: ask("original", place, load(checkpoint)), zoo.checkpoints)
    kinds = {"original": _Kind(figures, Places(zoo.gram.diagonal(), zoo.gram))}
    if held_out:
        found = workers.map(lambda place, each: (*_place(ask, zoo, "held_out", place, load(each)), None), held_out)
        kinds["held_out"] = _placed(found)
    clock = Stopwatch(generated.networks if generated else ())
    if generated is not None:
        compute = partial(_place_own, ask, zoo, conditions, "generated")
        kinds["generated"] = _placed(workers.gather(compute, generated.places, clock, generated.num))
    batches = _recipes(zoo, kinds, config, num, conditions, options)
    for name, batch in batches.items():
        kinds[name] = _placed(workers.map(partial(_score_recipe, ask, zoo, conditions, name), batch))
    workers.finish()
    better = _directions(kinds, options, scorer) if scorer is not None else {}
    result = _summarized(zoo, kinds, better, config, options.seed)
    more: dict[str, Any] = {"scorer": scorer.name if scorer is not None else "weights alone"}
    if generated is not None and (places := kinds["generated"].places) is not None:
        more["span"] = measure_span(zoo, places, generated.asked)
        more["seconds_per_network"] = clock.mean if clock.count else None
        if zoo.mean_square > 0:
            more["deviation_ratio"] = finite(places.squares.mean().item() / zoo.mean_square)
    return result.model_copy(update=more)


def _ask(scorer: Scorer | None, conditions: Conditions, kind: str, place: int, network: StateDict) -> Figures:
    if scorer is None:
        return {}
    found = {"original": conditions.originals, "held_out": conditions.held_out}.get(kind, conditions.wanted)
    condition = found[place % len(found)] if found else None
    return scorer(network, condition, f"network {place} of kind {kind}")


def _place(
    ask: Callable[..., Figures], zoo: ZooSpan, kind: str, place: int, network: StateDict
) -> tuple[Figures, Places]:
    return ask(kind, place, network), zoo.place([network])


def _own(zoo: ZooSpan, conditions: Conditions, place: int, network: StateDict) -> float | None:
    targets = conditions.targets
    return zoo.distance(network, targets[place % len(targets)]) if targets else None


def _place_own(
    ask: Callable[..., Figures], zoo: ZooSpan, conditions: Conditions, kind: str, place: int, network: StateDict
) -> _Found:
    return *_place(ask, zoo, kind, place, network), _own(zoo, conditions, place, network)


def _score_recipe(
    ask: Callable[..., Figures], zoo: ZooSpan, conditions: Conditions, kind: str, place: int, recipe: Recipe | Cook
) -> _Found:
    if not isinstance(recipe, Recipe):
        return _place_own(ask, zoo, conditions, kind, place, recipe())
    network = cook(zoo, recipe)
    where = zoo.place([network]) if recipe.noise else zoo.place_combinations(recipe.weights[None])
    return ask(kind, place, network), where, _own(zoo, conditions, place, network)


def _placed(found: Sequence[_Found]) -> _Kind:
    own = [each for *_, each in found if each is not None]
    return _Kind([figures for figures, *_ in found], Places.join([places for _, places, _ in found]), own)


def _recipes(
    zoo: ZooSpan, kinds: dict[str, _Kind], config: EvaluateConfig, num: int, conditions: Conditions, options: Options
) -> Mapping[str, Sequence[Recipe | Cook]]:
    """The baselines; without generated networks none at their distance. Each condition has an average of its own."""
    made, distance = kinds.get("generated"), 0.0
    if made is not None and made.places is not None:
        distance = zoo.distances(made.places).amin(1).nanmedian().item()
    chosen = config.baselines
    if chosen is not None:
        chosen = tuple(name for name in chosen if name not in NAMES)
    common = config.model_copy(update={"baselines": chosen})
    every = {
        name: batch * num if name == "average" and conditions.wanted else batch
        for name, batch in baseline_recipes(zoo, common, num, distance, options.seed).items()
        if made is not None or not name.endswith(AT_DISTANCE)
    }
    return {**more_baselines(zoo, conditions, options.merges, config, num, options.seed), **every}


def _directions(kinds: dict[str, _Kind], options: Options, scorer: Scorer) -> dict[str, str]:
    """Of every figure whether more or less is better, in the order of the figures."""
    names = list(kinds["original"].figures[0])
    for kind, each in kinds.items():
        for place, figures in enumerate(each.figures):
            if set(figures) != set(names):
                raise _other_figures(scorer, kind, place, figures, names)
    less = less_is_better(names, options.lower, options.higher)
    return {name: "less" if name in less else "more" for name in names}


def _other_figures(scorer: Scorer, kind: str, place: int, figures: Figures, names: Sequence[str]) -> Exception:
    return InputError(
        f"{scorer.name} gave {', '.join(figures)} for network {place} of kind {kind}, but {', '.join(names)} for the "
        "first original; return the same figures for every network"
    )


def _summarized(
    zoo: ZooSpan, kinds: dict[str, _Kind], better: dict[str, str], config: EvaluateConfig, seed: int
) -> ScoreResult:
    first = next(iter(better), None)
    sign = 1.0 if first is None or better[first] == "more" else -1.0
    known = [value for each in kinds["original"].figures if first is not None and math.isfinite(value := each[first])]
    threshold = torch.tensor(known, dtype=torch.float64).median().item() if known else None
    unit = zoo.unit()
    axes, explained = zoo.principal_axes()
    sets, components = {}, {}
    for name, kind in kinds.items():
        near = _nearest(zoo, kind, name == "original") / unit if unit > 0 else torch.empty(0, dtype=torch.float64)
        shares: tuple[float, ...] = ()
        if len(near) and (first is None or threshold is not None):
            good = near == near
            if first is not None and threshold is not None:
                values = torch.tensor([each[first] for each in kind.figures], dtype=torch.float64)
                good = sign * values >= sign * threshold - 1e-9 * abs(threshold)
            shares = tuple((good & (near >= tau)).double().mean().item() for tau in config.taus)
        figures = {each: tuple(finite(one[each]) for one in kind.figures) for each in better}
        sets[name] = ScoredNetworks(
            count=len(kind.figures),
            figures=figures,
            summaries={each: _summary(found, seed) for each, found in figures.items()},
            distances=tuple(finite(each) for each in near.tolist()),
            own_distances=tuple(finite(each / unit) for each in kind.own) if unit > 0 else (),
            novel_and_performant=shares,
        )
        if explained and kind.places is not None:
            points = (kind.places.products @ axes).nan_to_num(0.0, 0.0, 0.0)
            components[name] = tuple((x, y) for x, y in points.tolist())
    return ScoreResult.model_validate(
        {
            "scorer": "",
            "seed": seed,
            "better": better,
            "threshold": threshold,
            "unit": unit or None,
            "taus": config.taus,
            "sets": sets,
            "components": components,
            "explained": explained,
        }
    )


def _summary(values: Sequence[float | None], seed: int) -> Any:
    known = [value for value in values if value is not None]
    return summarize(known, seed) if known else None


def _nearest(zoo: ZooSpan, kind: _Kind, among_themselves: bool) -> Tensor:
    """Distance of each network to the nearest (other) original; NaN where a network has values that are not finite."""
    if kind.places is None:
        return torch.empty(0, dtype=torch.float64)
    far = zoo.distances(kind.places)
    return (far.fill_diagonal_(float("inf")) if among_themselves else far).amin(1)
