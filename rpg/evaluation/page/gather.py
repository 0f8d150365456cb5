"""What ``report.html`` shows beside the scores, gathered from a run folder, its zoo and its generator."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rpg.evaluation.baselines import coordinate_gaussian, covariance_gaussian
from rpg.evaluation.metrics import accuracy
from rpg.evaluation.novelty import distances, gram, nearest_within, weight_vectors
from rpg.evaluation.page.single_page import ReportData, write_page
from rpg.evaluation.results import EvaluationResult
from rpg.evaluation.vectors import StateDict
from rpg.generation.generator import Generator
from rpg.packages import DISTRIBUTION, installed
from rpg.seeding import make_rng
from rpg.tasks.base import Classifier
from rpg.training.data import training_entries
from tokenization.compressed.form import dense
from tokenization.zoo.zoo import Zoo

NUM_TRAJECTORIES = 5
HEATMAP_COLUMNS = 240


def write_html_report(
    run: Path,
    result: EvaluationResult,
    generator: Generator,
    zoo: Zoo,
    task: Classifier,
    networks: Sequence[StateDict] | None,
    *,
    num: int,
    seed: int,
    output: Path | None = None,
) -> Path:
    """Write ``report.html``.

    Args:
        run: the run folder.
        result: what the evaluation measured.
        generator: of the run.
        zoo: what it learned from.
        task: scores the networks on their way from noise.
        networks: the generated ones; None where they are too large to be held, which leaves out what needs them.
        num, seed: how they were asked for.
        output: the folder to write it into; the run folder when None.
    """
    page = (output or run) / "report.html"
    data = ReportData(
        title=f"Generated networks: {run.name}",
        provenance=provenance_of(
            generator,
            zoo,
            num,
            seed,
            result.generated.seconds_per_network,
            f"rpg evaluate {generator.config.run} --num {num} --seed {seed}",
        ),
        losses=losses_of(run / "metrics.jsonl"),
    )
    if networks is None:
        write_page(page, result, data)
        return page
    data.trajectories = _trajectories(generator, task, result.split, seed)
    trained = training_entries(zoo, generator.config.train.splits)
    originals = [dense(zoo.state_dict(index)) for index in trained]
    if len(originals) > 1:
        zoo_vectors, vectors = weight_vectors(originals, networks)
        own = nearest_within(zoo_vectors)
        if result.novelty_details is not None:
            data.original_distances = (own / result.novelty_details.unit).tolist()
        data.components, data.explained = _components(originals, zoo_vectors, vectors, seed)
        data.heatmap = _heatmap(zoo_vectors, vectors)
    write_page(page, result, data)
    return page


def losses_of(path: Path) -> tuple[list[float], list[float]]:
    """Optimizer steps and losses that a run logged; empty without a log."""
    if not path.is_file():
        return [], []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def _trajectories(generator: Generator, task: Classifier, split: str, seed: int) -> list[tuple[int, Tensor]]:
    """Accuracies of networks on their way from noise; of a generator that takes a condition, none."""
    if generator.condition is not None:
        return []
    labels = task.labels(split)
    shown = generator.trajectories(NUM_TRAJECTORIES, seed=seed)
    return [(step, accuracy(task.predict(networks, split), labels)) for step, networks in shown]


def _components(
    originals: Sequence[StateDict], zoo: Tensor, generated: Tensor, seed: int
) -> tuple[dict[str, Tensor], float]:
    """First two principal components of the zoo, other networks projected on them, and what share they explain."""
    mean = zoo.mean(0)
    deviations = zoo - mean
    values, vectors = torch.linalg.eigh(gram(deviations))  # K × K, never values × values
    scaled = vectors[:, -2:].flip(1) / values[-2:].flip(0).clamp(min=1e-12).sqrt()
    axes = deviations.T @ scaled.float()  # [V, 2]
    kinds = {"original": zoo, "generated": generated, "average of all originals": mean[None]}
    gaussians = {"coordinate gaussian": coordinate_gaussian, "covariance gaussian": covariance_gaussian}
    for name, make in gaussians.items():
        kinds[name] = weight_vectors(originals, make(originals, 50, make_rng(seed, name)))[1]
    explained = float(values[-2:].sum() / values.clamp(min=0).sum().clamp(min=1e-12))
    return {name: (kind - mean) @ axes for name, kind in kinds.items()}, explained


def _heatmap(zoo: Tensor, generated: Tensor) -> tuple[list[str], Tensor]:
    """Two generated networks, each over its three nearest originals; columns evenly spaced over the values."""
    columns = torch.linspace(0, zoo.shape[1] - 1, min(HEATMAP_COLUMNS, zoo.shape[1])).round().long().unique()
    mean, spread = zoo.mean(0)[columns], (zoo - zoo.mean(0)).square().mean().sqrt().clamp(min=1e-12)
    labels, rows = [], []
    for index in range(min(2, len(generated))):
        order = distances(generated[index : index + 1], zoo)[0].argsort()[:3]
        labels.append(f"generated {index + 1}")
        rows.append(generated[index, columns])
        for rank, row in enumerate(order.tolist()):
            labels.append(f"original {row} ({('nearest', '2nd', '3rd')[rank]})")
            rows.append(zoo[row, columns])
    return labels, ((torch.stack(rows) - mean) / spread).nan_to_num()


def provenance_of(
    generator: Generator, zoo: Zoo, num: int, seed: int, seconds: float | None, command: str
) -> dict[str, str]:
    """Where the figures of a run come from, row by row."""
    config = generator.config
    num_trained = len(training_entries(zoo, config.train.splits))
    rows: dict[str, Any] = {
        "generator": f"{config.model.kind}, sha256 {generator.digest}",
        **{f"generator: {name}": value for name, value in generator.facts.items()},
        "zoo": f"{num_trained} of {len(zoo)} checkpoints, {zoo.num_runs} run(s), digest {zoo.digest()}",
        "task": yaml.safe_dump(zoo.task, sort_keys=False) if zoo.task else "none",
        "tokens": f"{generator.layout.num_tokens} of {generator.layout.token_size}, {generator.layout.num_values:,} "
        f"values, normalization {config.tokens.normalization}",
        "networks asked for": f"{num} with seed {seed}, {config.generate.steps} sampling steps",
        "seconds a network": seconds,
        "command": command,
        "configuration": yaml.safe_dump(config.plain(), sort_keys=False),
        "software": software(),
    }
    return {name: str(value) for name, value in rows.items() if value is not None}


def software() -> str:
    """Versions of what computed."""
    return f"rpg {installed(DISTRIBUTION)}, torch {torch.__version__}, Python {platform.python_version()}"
