"""Draws of whole networks for tasks that a few unlabelled images leave open, and their rivals.

Rivals map examples to networks directly, or retrieve those of known tasks. The single network is trained on its
answers' cross-entropy; the implicit generator on the joint score of several draws (`joint_score`), the
very measure that draws are compared by. Retrieval has a posterior over known tasks without any training: the likelihood
of shown images is a kernel density of each task's images.

T tasks, M draws, n images shown, K classes; V values of a network, N noise values, S known tasks, P values of an image.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rpg.devices import single_threaded
from rpg.evaluation.page.page import Page, PageTable
from rpg.evaluation.report import Curve, Networks, Report, label_of, shown
from rpg.evaluation.two_sample import joint_score
from rpg.experiments.by_examples import ExampleSets, error_by_distance
from rpg.experiments.evaluating import judges
from rpg.experiments.single import generate_for, stacked_networks, tasks_scored
from rpg.generation.generator import Generator
from rpg.models.conditioning import SetEncoder
from rpg.models.recurrent_diffusion import RecurrentDiffusion
from rpg.seeding import derive_seed, make_rng
from rpg.tasks import build_task
from rpg.tasks.processes import num_cores, share
from rpg.tasks.side_by_side import Stacked
from rpg.training.data import ExampleConditions, training_entries, zoo_conditions
from tokenization.layouts import Layout
from tokenization.zoo.zoo import Zoo

WIDTH, NUM_TASKS, NUM_IMAGES, LEARNING_RATE = 256, 32, 32, 2e-3
"""Of the networks and of their training: tasks and images of a step, peak of AdamW's one-cycle schedule."""


class DirectGenerator(nn.Module):
    """Examples and noise to a network's tokens.

    Args:
        noise: N; 0 makes one network of a set.
    """

    def __init__(self, size: int, num_classes: int, layout: Layout, noise: int = 0) -> None:
        super().__init__()
        self.layout, self.noise = layout, noise
        self.encoder = SetEncoder(size, num_classes, WIDTH)
        values = layout.num_tokens * layout.token_size
        self.network = nn.Sequential(
            nn.SiLU(), nn.Linear(WIDTH + noise, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, values),
        )  # fmt: skip

    def forward(self, sets: Tensor, num: int, rng: torch.Generator) -> Stacked:
        """``num`` networks of every set ``[T, n · size]``, stacked set by set ``[T · num, *shape]``."""
        encoded = self.encoder(sets).repeat_interleave(num, 0)
        noise = torch.randn(len(encoded), self.noise, generator=rng)
        tokens = self.network(torch.cat([encoded, noise], 1))
        return self.layout.decode_batch(tokens.view(-1, self.layout.num_tokens, self.layout.token_size), constants=True)


@single_threaded()
def train_direct(
    task: Any,
    examples: ExampleConditions,
    layout: Layout,
    steps: int,
    *,
    draws: int = 1,
    noise: int = 0,
    seed: int = 0,
    known: Tensor | None = None,
) -> DirectGenerator:
    """Train one by the joint score of its draws; of a single draw that is the cross-entropy.

    Args:
        task: shows and runs networks, a :class:`rpg.tasks.sensors.task.SensorsTask`.
        draws: M.
        noise: N.
        known: the tasks ``[K, C]`` to draw from; None: fresh ones in every step.
    """
    rng = make_rng(seed, "direct", draws)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DirectGenerator(examples.spec.size, examples.config.classes, layout, noise)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        if known is None:
            tasks = task.draw_tasks(NUM_TASKS, rng)
        else:
            tasks = known[torch.randint(len(known), (NUM_TASKS,), generator=rng)]
        networks = model(examples.draw(tasks, rng), draws, rng)
        images, classes = task.draw_for_each(NUM_TASKS, NUM_IMAGES, rng)
        seen = task.see(images, tasks).repeat_interleave(draws, 0)  # [T · M, B, C, S, S]
        answers = task.side(networks, seen).log_softmax(-1)
        chosen = classes.repeat_interleave(draws, 0)[..., None]
        right = answers.gather(-1, chosen).view(NUM_TASKS, draws, -1)  # [T, M, B]
        optimizer.zero_grad()
        joint_score(right).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


WIDTHS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
"""Of the kernel, to choose from on validation tasks."""

CHUNK = 25
"""Known tasks whose images are compared at once."""


def log_likelihoods(task: Any, known: Tensor, shown: Tensor, widths: tuple[float, ...] = WIDTHS) -> Tensor:
    """Log-density of the requests' images among each known task's, up to a constant of each width: ``[W, T, S]``.

    Args:
        task: shows its training images, a :class:`rpg.tasks.sensors.task.SensorsTask`.
        known: tasks ``[S, C]``.
        shown: images ``[T, n, P]`` in 0 … 1.
        widths: W widths of the kernel.
    """
    images, queries = task.images("train"), task.inputs(shown).flatten(2).flatten(0, 1)  # [T · n, P]
    found = []
    for part in known.split(CHUNK):
        seen = task.see(images, part).flatten(2).flatten(0, 1)  # [CHUNK · images, P]
        distance = torch.cdist(queries, seen).square()
        distance = distance.view(len(queries), len(part), -1)
        logs = [(-distance / (2 * width**2)).logsumexp(-1) - math.log(distance.shape[-1]) for width in widths]
        found.append(torch.stack(logs))
    return torch.cat(found, -1).view(len(widths), *shown.shape[:2], len(known)).sum(2)


def drawn(log_likelihood: Tensor, networks: Stacked, num: int, seed: int) -> Stacked:
    """``num`` networks of known tasks for every request, by their posterior under equal odds, ``[T · num, *shape]``.

    Args:
        log_likelihood: ``[T, S]``.
    """
    rows = torch.multinomial(log_likelihood.softmax(-1), num, replacement=True, generator=make_rng(seed, "retrieved"))
    return {name: value[rows.flatten()] for name, value in networks.items()}


SHOWN, DRAWS, SIMULATED, LABELLED = (1, 3), (1, 4, 16, 64), 1000, 10
"""Images shown; sizes of sets; simulated tasks to retrieve from; labelled images to choose or fine-tune by."""

SAMPLING_STEPS = (1, 2, 4, 8, 16, 30, 60)

TUNING = tuple((steps, rate) for steps in (10, 30, 100) for rate in (1e-3, 3e-3, 1e-2))
"""Steps and peak learning rate of fine-tuning on ten labelled images, to choose from on validation tasks."""

IMPLICIT_DRAWS, IMPLICIT_NOISE = 6, 8


@judges
def evaluate_draws(
    generator: Generator, zoo: Zoo, *, run: Path, seed: int, split: str, compare: bool = True
) -> tuple[Report, Page]:
    """Score draws for unseen tasks, task by task, and everything that is compared with them.

    Args:
        generator: one of ``model.condition.kind: examples`` whose codes have a prior.
        split: ``test``: unseen tasks and test images; ``validation``: validation tasks and images, to choose by.
        compare: whether rivals are compared; else the draws, and the one that labelled images favour, are scored alone.
    """
    started = time.perf_counter()
    methods = Methods(generator, zoo, seed, compare)
    first, *others = SHOWN
    parts = {num: methods.kinds(split, num) for num in SHOWN}
    curves = methods.curves(split)
    wrong = 1 - torch.tensor(parts[first]["generated"].metrics["network_accuracy"])
    calibration, extras = error_by_distance(generator, methods.sets(split).rows(first, False), wrong)
    report = Report(
        experiment="draws", judge="sensors", split=split, seed=seed,
        better={"joint": "less", "accuracy": "more", "nll": "less"},
        kinds=parts[first], parts={f"{num} images": parts[num] for num in others},
        asked={"images": first, "labelled": False}, curves={**curves, **calibration}, extras=extras,
        notes=(
            "joint is -log of the mean over a set's networks of the probability of all right answers, an image: a set "
            "is good if it holds the right network. accuracy and nll are of the set's average answer.",
        ),
        facts={**generator.facts, "seconds": round(time.perf_counter() - started, 1), "chosen": methods.chosen},
    )  # fmt: skip
    return report, Page(f"Draws where a request leaves room: {run.name}", tables=tables_of_sets(report))


def tables_of_sets(report: Report) -> list[PageTable]:
    """Scores of sets by the number of networks, a table for each number of images shown."""
    tables = []
    for title, kinds in {f"{report.asked['images']} image": report.kinds, **report.parts}.items():
        rows = [
            [label_of(kind), str(size), *(shown(each[size], name) for name, each in found.joint.items())]
            for kind, found in kinds.items()
            for size in found.joint["joint"]
        ]
        heads = ["networks", "in a set", *(name.replace("_", " ") for name in next(iter(kinds.values())).joint)]
        tables.append(PageTable(f"Sets of networks: {title}", heads, rows))
    return tables


class Methods:
    """Everything that answers a request of some images with a set of networks.

    Args:
        compared: whether there are rivals at all.
    """

    def __init__(self, generator: Generator, zoo: Zoo, seed: int, compared: bool) -> None:
        config, behaviour = generator.config, generator.config.train.behaviour
        self.generator, self.zoo, self.seed = generator, zoo, seed
        self.task = cast(Any, build_task(config.task))  # type: ignore[arg-type]
        self.trained = stacked_networks(zoo, zoo.subset("train"))
        self.known = zoo_conditions(zoo, training_entries(zoo, config.train.splits))
        self.fresh = behaviour is not None and behaviour.tasks == "fresh"
        self.simulated = self.task.draw_tasks(SIMULATED, make_rng(seed, "simulated")) if self.fresh else None
        self.chosen: dict[str, Any] = {}
        self.compared = compared
        self.direct = self._train_direct() if compared else {}

    def sets(self, split: str) -> ExampleSets:
        """The tasks that are scored: unseen ones, or those to choose by."""
        return ExampleSets.of(self.task, self.zoo, split, self.seed)

    def kinds(self, split: str, num: int) -> dict[str, Networks]:
        """Every method's networks for tasks of which ``num`` images are shown, scored."""
        sets, made = self.sets(split), self._made(split, num)
        made["original"] = stacked_networks(self.zoo, self.zoo.subset(tasks_scored(split)))
        for name in [each for each in ("generated", "single") if each in made]:
            made[f"{name}_by_{LABELLED}_labelled"] = self._helped(name, sets, made[name], num)
        return {name: sets.scored(networks, DRAWS) for name, networks in made.items()}

    def draw(self, sets: ExampleSets, num: int, draws: int, steps: int | None = None) -> Stacked:
        """The generator's networks, ``draws`` for every task."""
        network = self.generator.network
        assert isinstance(network, RecurrentDiffusion) and network.prior is not None
        before = network.prior.config
        network.prior.config = before.model_copy(update={"steps": steps or before.steps})
        rows = sets.rows(num, False).repeat_interleave(draws, 0)
        try:
            return generate_for(self.generator, rows, derive_seed(self.seed, "draws"))
        finally:
            network.prior.config = before

    def curves(self, split: str) -> dict[str, Curve]:
        """Joint score of sixteen draws, and seconds, by the prior's sampling steps."""
        sets, scores, seconds = self.sets(split), [], []
        for steps in SAMPLING_STEPS:
            started = time.process_time()
            networks = self.draw(sets, 1, 16, steps)
            seconds.append((time.process_time() - started) / (16 * len(sets.conditions)))
            scores.append(sets.mean(networks, "joint"))
        curve = partial(Curve, x=SAMPLING_STEPS, across="sampling steps of the prior", log=True)
        return {
            "Sampling steps": curve(lines={"generated": tuple(scores)}, up="joint score of 16 draws, one image"),
            "Time": curve(lines={"generated": tuple(seconds)}, up="processor seconds a network"),
        }

    def _made(self, split: str, num: int) -> dict[str, Stacked]:
        """Networks of every method, stacked task by task."""
        sets, most = self.sets(split), max(DRAWS)
        rows, rng = sets.rows(num, False), make_rng(self.seed, "implicit")
        made = {"generated": self.draw(sets, num, most)}
        if not self.compared:
            return made
        for name, model in self.direct.items():
            made[name] = model(rows.flatten(1), 1 if name == "single" else most, rng)
        sources = {"retrieved_zoo": (self.known, self.trained)}
        if self.simulated is not None:
            sources["retrieved_simulated"] = (self.simulated, self._of_tasks(self.simulated))
        for name, (known, networks) in sources.items():
            width = self._width(name, known, networks, num)
            found = log_likelihoods(self.task, known, sets.shown(num)[0], (width,))[0]
            made[name] = drawn(found, networks, most, self.seed)
        known, networks = sources.get("retrieved_simulated", sources["retrieved_zoo"])
        equal = torch.zeros(len(sets.conditions), len(known))
        return {**made, "prior": drawn(equal, networks, most, derive_seed(self.seed, "prior"))}

    def _width(self, name: str, known: Tensor, networks: Stacked, num: int) -> float:
        """The width of the kernel that is best on validation tasks."""
        sets = self.sets("validation")
        found = log_likelihoods(self.task, known, sets.shown(num)[0])
        scores = [sets.mean(drawn(each, networks, max(DRAWS), self.seed), "joint") for each in found]
        best = WIDTHS[scores.index(min(scores))]
        self.chosen[f"{name}, {num} shown"] = best
        return best

    def _helped(self, name: str, sets: ExampleSets, networks: Stacked, num: int) -> Stacked:
        """The draw that ten labelled images favour, or the single network fine-tuned on them."""
        if name == "generated":
            best = sets.likelihoods(networks, LABELLED).argmax(1)
            rows = torch.arange(len(best)) * max(DRAWS) + best
            return {key: value[rows] for key, value in networks.items()}
        key = f"fine-tuning, {num} shown"
        if key not in self.chosen:
            own = self.sets("validation")
            start = self.direct[name](own.rows(num, False).flatten(1), 1, make_rng(self.seed, "implicit"))
            self.chosen[key] = list(max(TUNING, key=lambda way: own.mean(own.finetuned(start, LABELLED, *way))))
        return sets.finetuned(networks, LABELLED, *self.chosen[key])

    def _of_tasks(self, tasks: Tensor) -> Stacked:
        """The networks that the generator makes of what tasks are ``[S, C]``, without any prior."""
        network, layout = self.generator.network, self.generator.layout
        assert isinstance(network, RecurrentDiffusion) and self.zoo.condition is not None
        codes = network.state.codes(self.zoo.condition.inputs(tasks))  # type: ignore[union-attr, operator]
        noise = torch.randn(len(tasks), layout.num_tokens, layout.token_size, generator=make_rng(self.seed, "of tasks"))
        with torch.inference_mode():
            return layout.decode_batch(network.one_step(noise, layout.mask.float(), codes), constants=True)

    def _train_direct(self) -> dict[str, DirectGenerator]:
        """Generators that need no diffusion, trained on the same tasks, as long as the generator, side by side."""
        config = self.generator.config
        examples = ExampleConditions(self.task, config.model.condition, self.seed)
        known = None if self.fresh else self.known
        learn = partial(train_direct, self.task, examples, self.generator.layout, config.train.steps, seed=self.seed)
        options: dict[str, dict[str, int]] = {
            "implicit": {"draws": IMPLICIT_DRAWS, "noise": IMPLICIT_NOISE},
            "single": {},
        }
        made = share([partial(learn, known=known, **each) for each in options.values()], num_cores())
        return dict(zip(options, made, strict=True))
