"""One evaluation: originals, simple baselines and generated networks, judged and placed one network at a time.

Memory is the zoo's mean, one network and what the judge takes, whatever the number of networks; small zoos are held,
and there hidden units are matched, too. n checkpoints, N networks of a kind, B images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpg.config import EvaluateConfig
from rpg.evaluation.combinations import Combination, Conditions, Maker, combine, conditional_baselines, make_baselines
from rpg.evaluation.judges import Answer, Scorer, answer_of, less_is_better
from rpg.evaluation.matching import Distances
from rpg.evaluation.report import Networks, Report, bootstrap_interval, finite_values, networks
from rpg.evaluation.span import Projections, ZooSpan, measure_span
from rpg.evaluation.starts import START_NAMES
from rpg.evaluation.two_sample import distances, max_similarity, max_similarity_among, two_sample
from rpg.evaluation.workers import Workers
from rpg.merging.adapters import Merges
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.structure import StateDict
from tokenization.errors import InputError

DIVERSITY_VALUES = 1 << 25
"""Values of all generated networks together up to which they are compared with one another."""


@dataclass(frozen=True)
class Made:
    """Generated networks; each is made when it is asked for.

    Attributes:
        places: which of them this process makes.
        networks: makes them, in that order.
        asked: the checkpoint that each of all was asked to be, if any was.
    """

    num: int
    places: Sequence[int]
    networks: Iterable[StateDict]
    asked: Sequence[int] = ()


@dataclass(frozen=True)
class Options:
    """How networks are judged.

    Attributes:
        lower, higher: metrics of which less or more is better, whatever their names say.
        seed: decides the baselines' draws and the bootstrap.
        merges: merges the zoo's networks, or its adapters as PEFT does; none are merged when None.
        matching: matches hidden units; they stay unmatched when None.
        train: trains the baselines of `START_NAMES`, by name, for the control.
    """

    lower: Collection[str] = ()
    higher: Collection[str] = ()
    split: str = ""
    seed: int = 0
    merges: Merges | None = None
    matching: Distances | None = None
    train: Callable[[Mapping[str, Sequence[StateDict]]], Mapping[str, Sequence[StateDict]]] | None = None


@dataclass(frozen=True)
class _Seen:
    """The measurements of one network."""

    answer: Answer
    projections: Projections
    matched: Tensor | None = None  # [1, n]
    own: float | None = None  # distance to the checkpoint of its condition
    vector: Tensor | None = None  # normalised values


@dataclass
class _Kind:
    """The measurements of a kind of networks."""

    seen: list[_Seen]
    conditions: Sequence[Any] = ()
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def projections(self) -> Projections:
        return Projections.join([each.projections for each in self.seen])

    def stacked(self, name: str) -> Tensor | None:
        """The answers of all networks, stacked; None if one has none."""
        found = [getattr(each.answer, name) for each in self.seen]
        return None if not found or any(each is None for each in found) else torch.stack(found)


class Evaluation:
    """Measures networks of all kinds and reports them.

    Args:
        scorer: computes metrics; None to compare networks by their weights alone.
    """

    def __init__(
        self,
        scorer: Scorer | None,
        zoo: ZooSpan,
        config: EvaluateConfig,
        conditions: Conditions | None = None,
        options: Options | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.scorer, self.zoo, self.config = scorer, zoo, config
        self.conditions, self.options = conditions or Conditions(), options or Options()
        self.workers = workers or Workers()
        self.kinds: dict[str, _Kind] = {}
        self.notes: list[str] = []
        self.seconds: float | None = None
        self.asked: Sequence[int] = ()
        self.generated = 0

    def run(self, generated: Made | None, held_out: Sequence[Checkpoint] = ()) -> Report:
        """Score originals, held-out checkpoints, generated networks if there are any, and baselines.

        Raises:
            InputError: the scorer refuses a network, or gives other metrics for one than for another.
        """
        zoo, config = self.zoo, self.config
        count = generated.num if generated is not None else 0
        num = config.num_baseline if zoo.held or not count else min(config.num_baseline, count)
        kinds = len(config.baselines) if config.baselines is not None else 20
        self.workers.expect(len(zoo.checkpoints) + len(held_out) + count + num * kinds, self._num_images())
        known = self.workers.map(self._look_at_original, zoo.checkpoints)
        self.kinds["original"] = _Kind(known, self.conditions.originals)
        if held_out:
            found = self.workers.map(lambda place, each: self._look("held_out", place, each.load()), held_out)
            self.kinds["held_out"] = _Kind(found, self.conditions.held_out)
        if generated is not None:
            self._look_at_generated(generated)
        for name, batch in self._baselines(num).items():
            compute = lambda place, each, name=name: self._look_at_made(name, place, each)  # noqa: E731
            self.kinds[name] = _Kind(self.workers.map(compute, batch), self.conditions.wanted)
        self.workers.finish()
        return self._report()

    def vectors_of(self, kind: str) -> Tensor | None:
        """Normalised values of a kind's networks ``[N, values]``, where the zoo is small enough to be held."""
        found = [each.vector for each in self.kinds[kind].seen] if kind in self.kinds else []
        known = [each for each in found if each is not None]
        return torch.stack(known) if known and len(known) == len(found) else None

    def _num_images(self) -> int:
        labels = getattr(getattr(self.scorer, "task", None), "labels", None)
        return len(labels(self.options.split)) if labels else 0

    def _answer(self, kind: str, place: int, network: StateDict) -> Answer:
        found = {"original": self.conditions.originals, "held_out": self.conditions.held_out}
        conditions = found.get(kind, self.conditions.wanted)
        condition = conditions[place % len(conditions)] if conditions else None
        return answer_of(self.scorer, network, condition, f"network {place} of kind {kind}")

    def _look_at_original(self, place: int, checkpoint: Checkpoint) -> _Seen:
        row = slice(place, place + 1)
        places = Projections(self.zoo.gram.diagonal()[row], self.zoo.gram[row])
        return _Seen(self._answer("original", place, checkpoint.load()), places)

    def _look(self, kind: str, place: int, network: StateDict, places: Projections | None = None) -> _Seen:
        answer = self._answer(kind, place, network)
        places = self.zoo.project([network]) if places is None else places
        matching, targets, matched = self.options.matching, self.conditions.targets, None
        if matching is not None:
            matched = matching.matched([network], self.zoo.distances(places).float())
        own = None
        if targets and kind != "held_out":
            own = self.zoo.distance(network, targets[place % len(targets)])
        keep = (
            kind == "generated"
            and self.zoo.held
            and self.zoo.scales
            and self.zoo.num_values * self.generated <= DIVERSITY_VALUES
        )
        return _Seen(answer, places, matched, own, self.zoo.vector(network) if keep else None)

    def _look_at_generated(self, made: Made) -> None:
        self.generated, self.asked, spent = made.num, made.asked, [0.0]

        def timed() -> Iterator[StateDict]:
            remaining = iter(made.networks)
            for _ in made.places:
                started = time.perf_counter()
                network = next(remaining)
                spent[0] += time.perf_counter() - started
                yield network
                del network

        found = self.workers.gather(lambda *each: self._look("generated", *each), made.places, timed(), made.num)
        self.seconds = spent[0] / len(made.places) if len(made.places) else None
        self.kinds["generated"] = _Kind(found, self.conditions.wanted)

    def _look_at_made(self, kind: str, place: int, made: Combination | Maker) -> _Seen:
        if not isinstance(made, Combination):
            return self._look(kind, place, made())
        network = combine(self.zoo, made)
        return self._look(
            kind, place, network, None if made.noise else self.zoo.project_combinations(made.weights[None])
        )

    def _baselines(self, num: int) -> Mapping[str, Sequence[Combination | Maker]]:
        """Each condition has an average of its own."""
        options, generated = self.options, self.kinds.get("generated")
        distance = None
        if generated is not None:
            distance = self.zoo.distances(generated.projections).amin(1).nanmedian().item()
        made, self.notes = make_baselines(self.zoo, self.config, num, distance, options.seed)
        if self.conditions.wanted:
            made["average"] = made["average"] * num
        given = self.zoo, self.conditions, options.merges, self.config, num, options.seed
        every: dict[str, Sequence[Combination | Maker]] = {**conditional_baselines(*given), **made}
        if options.train is not None:
            starts = {name: batch for name, batch in made.items() if name in START_NAMES}
            ready = {name: [combine(self.zoo, each) for each in batch] for name, batch in starts.items()}
            for name, batch in options.train(ready).items():
                every[name] = [partial(dict, network) for network in batch]
        return every

    def _report(self) -> Report:
        zoo, options, config = self.zoo, self.options, self.config
        better = self._directions()
        first = next(iter(better), None)
        unit = options.matching.unit() if options.matching is not None and len(zoo.checkpoints) > 1 else zoo.unit()
        values = [each.answer.metrics[first] for each in self.kinds["original"].seen] if first is not None else []
        known = torch.tensor([each for each in values if each == each and abs(each) != float("inf")]).double()
        threshold = known.median().item() if len(known) else None
        self._compare()
        axes, explained = zoo.principal_axes()
        good = (first, 1.0 if first is None or better[first] == "more" else -1.0, threshold)
        kinds = {name: self._networks(name, unit, good, axes if explained else None) for name in self.kinds}
        kinds = {"original": kinds.pop("original"), "generated": kinds.pop("generated", networks({})), **kinds}
        extras, facts = self._spread(unit), {}
        if self.seconds is not None:
            facts["seconds_per_network"] = self.seconds
        if (images := self._num_images()) > 0:
            facts["images"] = images
        return Report(
            experiment="networks", judge=self.scorer.name if self.scorer is not None else "weights alone",
            split=options.split, seed=options.seed, better=better, kinds=kinds, threshold=threshold, unit=unit or None,
            matched=bool(options.matching and options.matching.groups), taus=config.taus, explained=explained,
            notes=tuple(self.notes), facts=facts, extras=extras,
        )  # fmt: skip

    def _directions(self) -> dict[str, Any]:
        """Whether more or less is better, for each metric in order."""
        if self.scorer is None:
            return {}
        names = list(self.kinds["original"].seen[0].answer.metrics)
        for kind, each in self.kinds.items():
            for place, seen in enumerate(each.seen):
                if set(seen.answer.metrics) != set(names):
                    raise InputError(
                        f"{self.scorer.name} gave {', '.join(seen.answer.metrics)} for network {place} of kind {kind}, "
                        f"but {', '.join(names)} for the first original; return the same metrics for every network"
                    )
        less = less_is_better(names, self.options.lower, self.options.higher)
        return {name: "less" if name in less else "more" for name in names}

    def _compare(self) -> None:
        """Compare the answers of classifiers with those of originals and held-out originals."""
        answers = {name: each.stacked("predictions") for name, each in self.kinds.items()}
        originals, task = answers["original"], getattr(self.scorer, "task", None)
        if originals is None or task is None:
            return
        labels = task.labels(self.options.split)
        for name, each in self.kinds.items():
            if (predictions := answers[name]) is None:
                continue
            alike = max_similarity(predictions, originals, labels)
            alike = max_similarity_among(originals, labels) if name == "original" else alike
            for seen, value in zip(each.seen, alike.tolist(), strict=True):
                seen.answer.metrics["similarity"] = value
            if name != "original":
                nearest = self._far(each).nan_to_num(float("inf")).argmin(1)
                each.extras["disagreement"] = (predictions != originals[nearest]).double().mean().item()
                each.extras["originals_met"] = len(nearest.unique()) / len(originals)
        probabilities = {name: each.stacked("probabilities") for name, each in self.kinds.items()}
        held_out = probabilities.pop("held_out", None)
        sets = {name: each for name, each in probabilities.items() if each is not None and name != "original"}
        if held_out is not None and probabilities["original"] is not None:
            for name, found in (two_sample(sets, probabilities["original"], held_out) or {}).items():
                self.kinds[name].extras.update(found)

    def _far(self, kind: _Kind) -> Tensor:
        """Distances to all originals ``[N, n]``, matched where hidden units are."""
        matched = [each.matched for each in kind.seen]
        known = [each for each in matched if each is not None]
        return (
            torch.cat(known).double() if known and len(known) == len(matched) else self.zoo.distances(kind.projections)
        )

    def _networks(self, name: str, unit: float, good: tuple[str | None, float, float | None], axes: Any) -> Networks:
        kind, (first, sign, threshold), seed = self.kinds[name], good, self.options.seed
        metrics = {each: [seen.answer.metrics[each] for seen in kind.seen] for each in kind.seen[0].answer.metrics}
        far: dict[str, Any] = {}
        more: dict[str, Any] = {}
        if unit > 0:
            plain = self.zoo.distances(kind.projections)
            every = {"nearest": self._far(kind), "plain": plain} if self.options.matching else {"nearest": plain}
            if name == "original":
                every = {"nearest": plain.fill_diagonal_(float("inf"))}
            far = {each: values.amin(1) / unit for each, values in every.items()}
            if any(seen.own is not None for seen in kind.seen):
                far["own"] = [(seen.own or 0.0) / unit for seen in kind.seen]
            if first is None or threshold is not None:
                near = far["nearest"].nan_to_num(0.0, 0.0, 0.0)  # what is not finite is nowhere, and counts as a copy
                hits = torch.ones(len(near), dtype=torch.bool)
                if first is not None and threshold is not None:
                    values = torch.tensor(metrics[first], dtype=torch.float64)
                    hits = sign * values >= sign * threshold - 1e-9 * max(1.0, abs(threshold))
                rows = torch.stack([hits & (near >= tau) for tau in self.config.taus]).double()
                more["novel"] = tuple(rows.mean(1).tolist())
                more["novel_ci95"] = tuple(bootstrap_interval(row, seed) for row in rows)
        if axes is not None:
            points = (kind.projections.products @ axes).nan_to_num(0.0, 0.0, 0.0)
            more["components"] = tuple((x, y) for x, y in points.tolist())
        wanted = [kind.conditions[i % len(kind.conditions)] for i in range(len(kind.seen))] if kind.conditions else []
        given = wanted if all(each is not None for each in wanted) else ()
        count = len(kind.seen)
        return networks(
            metrics, distances=far, conditions=given, count=count, seed=seed, extras=kind.extras, **more
        )  # fmt: skip

    def _spread(self, unit: float) -> dict[str, Any]:
        """The spread of generated networks, relative to the zoo's and to that of the requested checkpoints."""
        kind = self.kinds.get("generated")
        if kind is None or not unit > 0 or not kind.seen:
            return {}
        places, vectors = kind.projections, self.vectors_of("generated")
        ratios = {
            "mean_squared_deviation_ratio": places.squares.mean().item() / self.zoo.mean_square,
            "nearest_distance_ratio": self.zoo.distances(places).amin(1).median().item() / self.zoo.unit(),
        }
        if vectors is not None and len(vectors) > 1:
            apart = distances(vectors, vectors).fill_diagonal_(float("inf")).amin(1).median().item()
            ratios["diversity_ratio"] = apart / self.zoo.unit()
        found: dict[str, Any] = {"spread": dict(zip(ratios, finite_values(ratios.values()), strict=True))}
        right = [each.answer.metrics["accuracy"] for each in kind.seen if "accuracy" in each.answer.metrics]
        accuracy = sum(right) / len(right) if right else None
        if (span := measure_span(self.zoo, places, self.asked, accuracy)) is not None:
            found["span"] = span
        return found
