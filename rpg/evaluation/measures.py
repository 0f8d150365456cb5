"""An evaluation of single networks: originals, generated networks and simple baselines, judged and placed in the zoo.

Memory is the zoo's mean, one network and what the judge takes; small zoos are held, and there hidden units are matched,
too. n checkpoints, N networks of a kind, B images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rpg.config import EvaluateConfig
from rpg.evaluation.combinations import Combination, Conditions, Maker, combine, conditional_baselines, make_baselines
from rpg.evaluation.engine import Engine, Kind, Made, Seen, Workers
from rpg.evaluation.judges import Answer, Scorer
from rpg.evaluation.matching import Distances
from rpg.evaluation.report import Networks, Report, bootstrap_interval, finite_values, networks
from rpg.evaluation.span import Projections, ZooSpan, measure_span
from rpg.evaluation.starts import START_NAMES
from rpg.evaluation.two_sample import distances, max_similarity, max_similarity_among, two_sample
from rpg.merging.adapters import Merges
from tokenization.checkpoint.checkpoint import Checkpoint, StateDict

DIVERSITY_VALUES = 1 << 25
"""Values of all generated networks together up to which they are compared with one another."""


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


class Evaluation(Engine):
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
        super().__init__(scorer, workers)
        self.zoo, self.config = zoo, config
        self.conditions, self.options = conditions or Conditions(), options or Options()
        self.notes: list[str] = []
        self.generated = 0

    def run(self, generated: Made | None, held_out: Sequence[Checkpoint] = (), asked: Sequence[int] = ()) -> Report:
        """Score originals, held-out checkpoints, generated networks if there are any, and baselines.

        Args:
            asked: the checkpoint that each generated network was asked to be, if any was.

        Raises:
            InputError: the scorer refuses a network, or gives other metrics for one than for another.
        """
        zoo, config, given = self.zoo, self.config, self.conditions
        self.generated = generated.num if generated is not None else 0
        num = config.num_baseline if zoo.held or not self.generated else min(config.num_baseline, self.generated)
        kinds = len(config.baselines) if config.baselines is not None else 20
        total = len(zoo.checkpoints) + len(held_out) + self.generated + num * kinds
        self.workers.expect(total, self._num_images())
        squares, gram = zoo.gram.diagonal(), zoo.gram
        known = {place: Projections(squares[place : place + 1], gram[place : place + 1]) for place in range(len(gram))}
        self.look("original", self._made(zoo.checkpoints, known), given.originals)
        if held_out:
            self.look("held_out", self._made(held_out), given.held_out)
        if generated is not None:
            self.look("generated", generated, given.wanted)
        for name, batch in self._baselines(num).items():
            own = {place: batch[place] for place in self.workers.places(len(batch))}
            sums = {place: each for place, each in own.items() if isinstance(each, Combination) and not each.noise}
            known = {place: zoo.project_combinations(each.weights[None]) for place, each in sums.items()}
            self.look(name, self._made(batch, known), given.wanted)
        self.workers.finish()
        return self._report(asked)

    def vectors_of(self, kind: str) -> Tensor | None:
        """Normalised values of a kind's networks ``[N, values]``, where the zoo is small enough to be held."""
        found = [each.vector for each in self.kinds[kind].seen] if kind in self.kinds else []
        known = [each for each in found if each is not None]
        return torch.stack(known) if known and len(known) == len(found) else None

    def _made(
        self, batch: Sequence[Checkpoint | Combination | Maker], known: Mapping[int, Projections] | None = None
    ) -> Made:
        """This process's part of some networks, which it makes one at a time."""
        places = self.workers.places(len(batch))
        return Made.singly(len(batch), places, (self._network(batch[place]) for place in places), known)

    def _network(self, each: Checkpoint | Combination | Maker) -> StateDict:
        if isinstance(each, Checkpoint):
            return each.load()
        return combine(self.zoo, each) if isinstance(each, Combination) else each()

    def _num_images(self) -> int:
        labels = getattr(getattr(self.scorer, "task", None), "labels", None)
        return len(labels(self.options.split)) if labels else 0

    def _seen(self, kind: str, place: int, answer: Answer, network: StateDict, known: Projections | None) -> Seen:
        if kind == "original":
            return Seen(answer, known)
        zoo, matching, targets, matched, own = self.zoo, self.options.matching, self.conditions.targets, None, None
        places = zoo.project([network]) if known is None else known
        if matching is not None:
            matched = matching.matched([network], zoo.distances(places).float())
        if targets and kind != "held_out":
            own = zoo.distance(network, targets[place % len(targets)])
        keep = kind == "generated" and zoo.held and zoo.scales and zoo.num_values * self.generated <= DIVERSITY_VALUES
        return Seen(answer, places, matched, own, zoo.vector(network) if keep else None)

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

    def _report(self, asked: Sequence[int]) -> Report:
        zoo, options, config = self.zoo, self.options, self.config
        better = self.directions(options.lower, options.higher)
        first = next(iter(better), None)
        unit = options.matching.unit() if options.matching is not None and len(zoo.checkpoints) > 1 else zoo.unit()
        known = self.kinds["original"].first if first is not None else torch.empty(0)
        known = known[known.isfinite()]
        threshold = known.median().item() if len(known) else None
        self._compare()
        axes, explained = zoo.principal_axes()
        good = (first, 1.0 if first is None or better[first] == "more" else -1.0, threshold)
        kinds = {name: self._networks(name, unit, good, axes if explained else None) for name in self.kinds}
        kinds = {"original": kinds.pop("original"), "generated": kinds.pop("generated", networks({})), **kinds}
        facts: dict[str, Any] = {}
        if "generated" in self.kinds and (seconds := self.kinds["generated"].seconds) is not None:
            facts["seconds_per_network"] = seconds
        if (images := self._num_images()) > 0:
            facts["images"] = images
        return Report(
            experiment="networks", judge=self.scorer.name if self.scorer is not None else "weights alone",
            split=options.split, seed=options.seed, better=better, kinds=kinds, threshold=threshold, unit=unit or None,
            matched=bool(options.matching and options.matching.groups), taus=config.taus, explained=explained,
            notes=tuple(self.notes), facts=facts, extras=self._spread(unit, asked),
        )  # fmt: skip

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

    def _far(self, kind: Kind) -> Tensor:
        """Distances to all originals ``[N, n]``, matched where hidden units are."""
        known = [each.matched for each in kind.seen if each.matched is not None]
        matched = known and len(known) == len(kind.seen)
        return torch.cat(known).double() if matched else self.zoo.distances(kind.projections)

    def _networks(self, name: str, unit: float, good: tuple[str | None, float, float | None], axes: Any) -> Networks:
        kind, (first, sign, threshold), seed = self.kinds[name], good, self.options.seed
        far: dict[str, Any] = {}
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
                    hits = sign * kind.metrics[first] >= sign * threshold - 1e-9 * max(1.0, abs(threshold))
                rows = torch.stack([hits & (near >= tau) for tau in self.config.taus]).double()
                kind.more["novel"] = tuple(rows.mean(1).tolist())
                kind.more["novel_ci95"] = tuple(bootstrap_interval(row, seed) for row in rows)
        if axes is not None:
            points = (kind.projections.products @ axes).nan_to_num(0.0, 0.0, 0.0)
            kind.more["components"] = tuple((x, y) for x, y in points.tolist())
        kind.distances.update(far)
        return kind.reported(seed)

    def _spread(self, unit: float, asked: Sequence[int]) -> dict[str, Any]:
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
        if (span := self.span(kind, asked)) is not None:
            found["span"] = span
        return found

    def span(self, kind: Kind, asked: Sequence[int]) -> dict[str, float | None] | None:
        """`measure_span` of networks that were asked to be checkpoints of the zoo, with their accuracy."""
        right = kind.metrics["accuracy"].tolist() if "accuracy" in kind.metrics else []
        return measure_span(self.zoo, kind.projections, asked, sum(right) / len(right) if right else None)
