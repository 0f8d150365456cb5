"""A loaded generator with its zoo and scorer, and the networks it makes; independent of the page."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.judges import TaskScorer
from rpg.evaluation.two_sample import error_iou
from rpg.experiments.single import find_task, parts_of, zoo_span
from rpg.generation.folders import SHIPPED_FOLDER
from rpg.generation.generator import Generator
from rpg.labs.fields.pictures import learned_originals
from rpg.labs.fields.task import FieldsTask
from rpg.tasks import build_task
from rpg.tasks.base import AdapterScorer, Classifier, ImageTask, ImageTaskFamily, MetricsTask, Task, TaskFamily
from tokenization.checkpoint.checkpoint import Checkpoint, StateDict
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.zoo import Zoo

MOST = 4096
"""Largest number of originals to compare with; of a larger zoo every n-th is taken."""

COLUMNS = 600
"""Values of a network shown in the picture of its parameters."""


@dataclass(frozen=True)
class Neighbour:
    """An original near a network."""

    index: int  # its entry in the zoo
    name: str  # its condition, run and step
    distance: float  # in the median distance of an original to its nearest neighbour


class Originals:
    """The checkpoints that a generator was trained on. Raises InputError if there are none, or one is broken."""

    def __init__(self, generator: Generator, zoo: Zoo, task: Task | None) -> None:
        config = generator.config
        self.fields = isinstance(task, FieldsTask)
        trained = learned_originals(zoo, config) if self.fields else parts_of(zoo, config)[0]
        if not trained:
            raise InputError(f"{zoo.path} holds no checkpoint that the generator learned from; put its zoo back")
        self.zoo, self.layout, self.total = zoo, generator.layout, len(trained)
        self.several_steps = len({entry.step for entry in zoo.entries}) > 1
        self.indices = trained[:: -(-len(trained) // MOST)]
        self.span = zoo_span(generator, zoo, self.indices)
        self.unit = self.span.unit() or 1.0

    def __len__(self) -> int:
        return len(self.indices)

    def state_dict(self, index: int) -> StateDict:
        """An entry's network, in the form that the layout gives it."""
        return self.layout.checkpoint(self.zoo, index).state_dict()

    def name(self, index: int) -> str:
        """An entry's condition, run, and step if runs have several."""
        entry = self.zoo.entries[index]
        run = self.zoo.runs[entry.run] if entry.run < len(self.zoo.runs) else f"run {entry.run}"
        step = f", step {entry.step}" if self.several_steps else ""
        where = f"image {entry.run}" if self.fields else f"{run}{step}"
        what = told(self.zoo.condition, entry.condition)
        return f"{what} ({where})" if what else where

    def nearest(self, networks: Sequence[StateDict]) -> list[list[Neighbour]]:
        """The three originals nearest to each of N networks, by all values, each layer in units of its spread."""
        distances = self.span.distances(self.span.project(networks)) / self.unit  # [N, n]
        least = distances.topk(min(3, len(self)), largest=False)
        return [
            [Neighbour(self.indices[i], self.name(self.indices[i]), each) for i, each in zip(row, far, strict=True)]
            for row, far in zip(least.indices.tolist(), least.values.tolist(), strict=True)
        ]

    def deviations(self, networks: Sequence[StateDict]) -> Tensor:
        """Evenly spaced values of networks ``[N, columns]``: deviations from the mean, in their layers' spread."""
        rows = []
        for network in networks:
            scales = self.span.scales.items()
            values = torch.cat([(network[each].flatten().float() - self.span.means[each]) / by for each, by in scales])
            rows.append(values[torch.linspace(0, len(values) - 1, min(COLUMNS, len(values))).round().long()])
        return torch.stack(rows).nan_to_num()


def told(spec: ConditionSpec | None, condition: Sequence[float] | str | None) -> str:
    """A condition in words; empty without one."""
    if condition is None or isinstance(condition, str):
        return condition or ""
    if isinstance(condition, Tensor):
        return f"{len(condition)} example{'s' * (len(condition) > 1)}"
    if spec is not None and spec.settings:
        return ", ".join(f"{each.name.replace('_', ' ')} {value:.4g}"
                         for each, value in zip(spec.settings, condition, strict=True) if value != each.default) or (
            "an upright sensor")  # fmt: skip
    if spec is None or spec.kind == "vector":
        name = f"{spec.names[0]} " if spec is not None and len(spec.names) == 1 else ""
        return name + ", ".join(f"{value:.4g}" for value in condition)
    if spec.kind == "binary":
        names = spec.names or tuple(str(place) for place in range(spec.size))
        return ", ".join(name for name, bit in zip(names, condition, strict=True) if bit) or "none"
    place = int(condition[0])
    return spec.names[place] if spec.names else f"class {place}"


MOST_NETWORKS = 16
MOST_SCORED_VALUES = 1 << 23
"""Networks with more values are not scored, since the user is waiting."""

CHEAP = ImageTask | TaskFamily | AdapterScorer | MetricsTask
"""Tasks whose data are in memory."""


@dataclass(frozen=True)
class PageRequest:
    """A request, with fields as `Generator.generate` takes them."""

    num: int = 1
    seed: int = 0
    steps: int | None = None
    state: str | None = None
    temperature: float | None = None
    condition: Any = None
    initial: Path | None = None


@dataclass
class PageResult:
    """Networks generated for a request, and the folder with their files.

    Attributes:
        files: a safetensors file or a PEFT folder a network.
        wanted: the condition in words.
        metrics: by name, of each network; empty if nothing scores them, or scoring would take too long.
        nearest: the originals nearest to each network; empty without a zoo.
        original_metrics: of the nearest original of each network, for its own condition.
        shared_errors: overlap (IoU) of each network's wrong answers with those of its nearest original, 0 … 1.
        seconds: generation time per network.
        distance: distance of the request from the training conditions, in one line; empty if never measured.
    """

    request: PageRequest
    folder: Path
    files: list[Path]
    networks: list[StateDict]
    wanted: str
    seconds: float
    distance: str = ""
    metrics: list[dict[str, float]] = field(default_factory=list)
    nearest: list[list[Neighbour]] = field(default_factory=list)
    original_metrics: list[dict[str, float]] = field(default_factory=list)
    shared_errors: list[float] = field(default_factory=list)

    def download(self) -> Path:
        """The file to download: the network's own, or a zip archive of several networks or of PEFT folders."""
        if len(self.files) == 1 and self.files[0].is_file():
            return self.files[0]
        path = self.folder / "networks"
        return Path(shutil.make_archive(str(path), "zip", self.files[0].parent))


class LoadedRun:
    """A generator, with its zoo and task if they are available.

    Args:
        run: a run folder, a generator folder, or a repository id on the Hugging Face hub.
        prompt_model: path of the sentence encoder, for generators with text conditions.

    Attributes:
        missing: reasons why there are no originals or metrics, one sentence each.
        is_large: whether scoring is left out because it would take too long.

    Raises:
        InputError: there is no generator, or a file of it is broken.
    """

    def __init__(self, run: Path | str, device: Any = None, prompt_model: str | None = None) -> None:
        self.name = str(run)
        self.generator = Generator.from_pretrained(run, device)
        self.config, self.condition = self.generator.config, self.generator.condition
        if self.generator.texts is not None:
            self.generator.texts = self.generator.texts.with_encoder(prompt_model)
        self.zoo: Zoo | None = None
        self.task: Task | None = None
        self.originals: Originals | None = None
        self.scorer: TaskScorer | None = None
        self.missing: list[str] = []
        self.is_large = False
        for step in (self._open_zoo, self._open_task, self._open_originals):
            try:
                step()
            except InputError as error:
                self.missing.append(str(error))

    def _open_zoo(self) -> None:
        if self.generator.folder.parent != SHIPPED_FOLDER:  # which came without its zoo
            self.zoo = Zoo.open(self.config.zoo)

    def _open_task(self) -> None:
        if self.config.task is not None and self.config.task.name == "sensors":  # whose images do not lie in the zoo
            self.task = build_task(self.config.task)
            if self.condition is not None and self.condition.settings:
                self.scorer = TaskScorer(self.task, self.config.evaluate.split, self.condition.names)
            return
        if self.zoo is None or (self.config.task is None and self.zoo.task is None):
            return  # reported already, or checkpoints of the user's own, which no task scores
        self.task = find_task(self.config, self.zoo)
        if not isinstance(self.task, MetricsTask | Classifier | AdapterScorer | TaskFamily):
            return
        self.is_large = self.generator.layout.num_values > MOST_SCORED_VALUES or not isinstance(self.task, CHEAP)
        if not self.is_large:
            names = self.zoo.condition.names if self.zoo.condition is not None else ()
            self.scorer = TaskScorer(self.task, self.config.evaluate.split, names)

    def _open_originals(self) -> None:
        if self.zoo is not None:
            self.originals = Originals(self.generator, self.zoo, self.task)

    @cached_property
    def fixed_network(self) -> StateDict | None:
        """The network for an upright sensor, of generators conditioned on settings or words."""
        if (spec := self.condition) is None or spec.kind == "examples":
            return None
        asked = "upright" if spec.kind == "text" else [each.default for each in spec.settings]
        return self.generator.generate(1, condition=asked)[0]  # type: ignore[return-value]

    def make(
        self, request: PageRequest, folder: Path, progress: Callable[[float, float], None] | None = None
    ) -> PageResult:
        """Generate networks into a new folder in ``folder``, score them and find the originals nearest to them.

        Raises:
            InputError: the request is impossible.
        """
        if not 1 <= request.num <= MOST_NETWORKS:
            raise InputError(f"{request.num} networks are asked for; this page makes 1 to {MOST_NETWORKS} at a time")
        own = Path(tempfile.mkdtemp(prefix="networks-", dir=folder))
        try:
            started = time.perf_counter()
            files: Any = self.generator.generate(**vars(request), output=own / "generated", progress=progress)
            seconds = (time.perf_counter() - started) / request.num
            networks: list[StateDict] = [Checkpoint.open(file).state_dict() for file in files]
            made = PageResult(request, own, files, networks, told(self.condition, request.condition), seconds)
            if (far := self.generator.distance(request.condition) if self.generator.known else None) is not None:
                made.distance = str(far)
            self._judge(made)
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise
        return made

    def _judge(self, made: PageResult) -> None:
        values = self._values(made.request.condition)
        if self.scorer is not None:
            made.metrics = [self.scorer(each, values, "a generated network") for each in made.networks]
        if self.originals is None:
            return
        made.nearest = self.originals.nearest(made.networks)
        originals = [self.originals.state_dict(each[0].index) for each in made.nearest]
        if self.scorer is not None and self.zoo is not None:
            conditions = [self.zoo.entries[each[0].index].condition for each in made.nearest]
            made.original_metrics = [
                self.scorer(each, wanted, "an original") for each, wanted in zip(originals, conditions, strict=True)
            ]
            labels = self._labels(values)
            if labels is not None and isinstance(self.task, Classifier | ImageTaskFamily):
                split = self.config.evaluate.split
                first, second = (self.task.predict(each, split) for each in (made.networks, originals))  # type: ignore[union-attr]
                made.shared_errors = error_iou(first, second, labels).diagonal().tolist()

    def _values(self, condition: Any) -> Sequence[float] | None:
        """A condition in the zoo's form; None for a text that the zoo does not contain."""
        if isinstance(condition, Tensor):
            return None
        if not isinstance(condition, str):
            return condition if self.generator.metric is None else None
        names = self.condition.names if self.condition is not None else ()
        return [float(names.index(condition))] if condition in names else None

    def _labels(self, values: Sequence[float] | None) -> Tensor | None:
        """Correct classes of the scored images, if the task has them."""
        split = self.config.evaluate.split
        if isinstance(self.task, ImageTaskFamily) and values is not None and hasattr(self.task, "predict"):
            return self.task.targets(Tensor([list(values)]), split)[0]
        return self.task.labels(split) if isinstance(self.task, Classifier) else None
