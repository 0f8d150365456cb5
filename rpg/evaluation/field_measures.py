"""How alike sets of samples, fields and drawn images are: 1-NNA, coverage, precision and recall, Fréchet distance.

Every datum is one vector, the values of a field on a grid. Reference data are held out of all training. M data of a
set, N reference data, F values of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from rpg.evaluation.two_sample import coverage, distances, evenly, minimum_matching_distance, nearest_neighbour_accuracy
from rpg.models.kernel_regression import square_root
from rpg.seeding import make_rng
from rpg.tasks.base import SampleTask
from tokenization.errors import InputError
from tokenization.files import atomic_file

NEIGHBOURS = 3
"""k of precision and recall, as in arXiv 1904.06991."""

Distances = Callable[[Tensor, Tensor], Tensor]
"""Data ``[A, F]`` and ``[B, F]`` → the distance of every pair, ``[A, B]``."""

Features = Callable[[Tensor], Tensor]
"""Data ``[M, F]`` as features of a classifier ``[M, K]``."""


def overlap_distances(first: Tensor, second: Tensor) -> Tensor:
    """1 - intersection over union of every pair of solid shapes, occupancies ``[A, F]`` and ``[B, F]`` of 0 and 1.

    Two empty shapes are equal.
    """
    both = first @ second.T
    either = first.sum(1)[:, None] + second.sum(1) - both
    return 1 - torch.where(either > 0, both / either.clamp(min=1), 1.0)


DISTANCES: dict[int, Distances] = {2: distances, 3: overlap_distances}
"""Between images (of brightness) and between solid shapes (of occupancy), by the dimensions of their grids."""


def shown_by(values: Tensor) -> Tensor:
    """What is compared of data on a grid ``[n, C, *grid]``, as vectors: brightness, or of shapes the occupancy."""
    return (values.flatten(1) > 0).float() if values.dim() == 5 else values.flatten(1)


def measure_samples(
    samples: Sequence[Tensor],
    held_out: Tensor,
    training: Tensor,
    features: Features | None,
    distances: Distances = distances,
) -> dict:
    """Every measure of some sets of one kind, each ``[M, F]``, as the mean over the sets.

    Args:
        samples: sets of M = N data.
        held_out: the reference, ``[N, F]``.
        training: what was learned from, ``[T, F]``.
        features: of a classifier that saw none of them; without, there is no ``frechet``.
        distances: between data; Euclidean unless told.

    Returns:
        ``one_nna`` (0.5 where samples and held-out data cannot be told apart), ``coverage``, ``mmd`` (mean distance of
        a held-out datum to the nearest sample), ``precision``, ``recall``, ``frechet``, ``nearest`` (median distance
        of a sample to the nearest training datum: near 0 where training data are repeated).
    """
    within = distances(held_out, held_out)
    found = []
    for each in samples:
        own, between = distances(each, each), distances(each, held_out)
        found.append(
            {
                "one_nna": nearest_neighbour_accuracy(own, within, between),
                "coverage": coverage(between),
                "mmd": minimum_matching_distance(between),
                "precision": within_reach(between, within),
                "recall": within_reach(between.T, own),
                "nearest": distances(each, training).amin(1).median().item(),
            }
        )
        if features is not None:
            found[-1]["frechet"] = frechet_distance(features(each), features(held_out))
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}


def within_reach(between: Tensor, reference: Tensor) -> float:
    """Share of data that lie nearer to some reference datum than its own k-th neighbour (arXiv 1904.06991).

    Precision: samples among held-out data; recall: held-out data among samples.

    Args:
        between: distances ``[data, reference data]``.
        reference: distances among the reference data; with at least k + 1 of them.
    """
    neighbours = min(NEIGHBOURS, len(reference) - 1)
    reach = reference.sort(1).values[:, neighbours]  # the first is the datum itself
    return (between <= reach).any(1).double().mean().item()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Fréchet distance of the normal distributions fitted to two sets of features ``[·, K]`` (1706.08500)."""
    first, second = first.double(), second.double()
    covariances = [each.T.cov() for each in (first, second)]
    root = square_root(covariances[0])
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    mean = (first.mean(0) - second.mean(0)).square().sum()
    return (mean + covariances[0].trace() + covariances[1].trace() - 2 * cross).item()


SYMBOLS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZabdefghijkmnpqrt"
DRAWN, STEPS, BATCH = 28, 600, 128
"""Side of the drawn letters; training steps of the classifier of letters, and its batch."""

MANY_VALUES, COMPONENTS = 512, 64
"""From how many values on the judge of classes takes principal components, and how many."""


def class_judge(data: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A support-vector machine of data ``[n, F]`` and classes ``[n]``: other data ``[M, F]`` → classes ``[M]``.

    Of data of many values it takes the leading principal components.
    """
    # imported here: slow, and only needed by this experiment
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    many = [PCA(COMPONENTS, random_state=0)] if data.shape[1] > MANY_VALUES and len(data) > COMPONENTS else []
    machine = make_pipeline(*many, SVC(C=10.0)).fit(data.numpy(), labels.numpy())
    return lambda others: torch.from_numpy(machine.predict(others.numpy()))


class _Classifier(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.third = nn.Linear(64 * (-(-size // 2)) ** 2, 64)
        self.last = nn.Linear(64, len(SYMBOLS))

    def features(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.second(F.relu(self.first(images))))
        return F.relu(self.third(F.max_pool2d(hidden, 2, ceil_mode=True).flatten(1)))


@cache
def letter_features(size: int, channels: int) -> Features:
    """Features ``[M, 64]`` of a classifier of printed letters and digits, for images ``[M, C · size²]`` in 0 … 1.

    It saw drawings of matplotlib's fonts, turned and moved, and no image of any data set: features of a classifier
    that saw the training data rate copies of those too well, or too badly.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _Classifier(size)
    drawings, labels = _drawings()
    rng = make_rng(0, "letters")
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, fused=True)
    for _ in range(STEPS):
        rows = torch.randint(len(drawings), (BATCH,), generator=rng)
        images = F.interpolate(_turned(drawings[rows], rng), size=size, mode="area")
        loss = F.cross_entropy(network.last(network.features(images)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return network.features(images.view(len(images), channels, size, size).mean(1, keepdim=True))

    return features


def _drawings() -> tuple[Tensor, Tensor]:
    """Every symbol in every font of matplotlib's, filling the frame: ``[n, 1, S, S]`` in 0 … 1, and which symbol."""
    import matplotlib  # imported here: slow, and only needed by this experiment

    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVuS*.ttf"))
    images, labels = [], []
    for font in fonts:
        if "Display" in font.name:  # has formulas' symbols alone
            continue
        letters = ImageFont.truetype(str(font), 40)
        for number, symbol in enumerate(SYMBOLS):
            left, top, right, bottom = letters.getbbox(symbol)
            drawn = Image.new("L", (int(right - left), int(bottom - top)))
            ImageDraw.Draw(drawn).text((-left, -top), symbol, font=letters, fill=255)
            values = torch.frombuffer(bytearray(drawn.resize((DRAWN, DRAWN)).tobytes()), dtype=torch.uint8)
            images.append(values.view(1, DRAWN, DRAWN).float() / 255)
            labels.append(number)
    return torch.stack(images), torch.tensor(labels)


def _turned(images: Tensor, rng: torch.Generator) -> Tensor:
    matrix = torch.eye(2, 3).expand(len(images), 2, 3) + 0.15 * torch.randn(len(images), 2, 3, generator=rng)
    return F.grid_sample(images, F.affine_grid(matrix, list(images.shape), align_corners=False), align_corners=False)


LINE, PAPER = 1, 0.6
"""Pixels between images, and their shade."""


def save_image(image: Tensor, path: Path | str, scale: int = 1) -> None:
    """Write ``[C, H, W]`` in 0 … 1, grey or RGB, as a PNG; every pixel becomes ``scale``² of them."""
    values = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    values = values.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0)
    with atomic_file(path) as temporary:
        Image.fromarray(values.squeeze(-1).numpy()).save(temporary, format="PNG")


def grid(images: Tensor, columns: int) -> Tensor:
    """Images ``[M, C, S, S]`` row by row in one ``[C, H, W]``, ink dark on light where they are grey."""
    num, channels, size = images.shape[:3]
    shown = 1 - images if channels == 1 else images
    rows, cell = -(-num // columns), size + LINE
    sheet = torch.full((channels, rows * cell + LINE, columns * cell + LINE), PAPER)
    for place, image in enumerate(shown):
        top, left = place // columns * cell + LINE, place % columns * cell + LINE
        sheet[:, top : top + size, left : left + size] = image
    return sheet


def beside(sheets: Sequence[Tensor], gap: int) -> Tensor:
    """Sheets of one height side by side."""
    channels, height = sheets[0].shape[:2]
    parts = [part for sheet in sheets for part in (torch.ones(channels, height, gap), sheet)][1:]
    return torch.cat(parts, 2)


ROWS, COLUMNS, GAP, SCALE = 6, 8, 4, 4
"""Of a picture of samples: images of a network, pixels between two networks, and pixels a pixel is enlarged to."""


def sample_metrics(task: SampleTask, network: Mapping[str, Tensor], split: str) -> dict[str, float]:
    """Metrics by name: ``one_nna`` first, 0.5 where samples cannot be told from as many held-out images.

    Args:
        split: whose images it is held against; ``train`` is what it learned from.

    Raises:
        InputError: the network does not fit, or the split has fewer images than the task draws.
    """
    drawn, held_out, training = task.samples(network), task.images(split), task.images("train")
    if len(held_out) < len(drawn):
        raise InputError(f"split {split} has {len(held_out)} images, fewer than task.samples {len(drawn)}; lower that")
    features = letter_features(drawn.shape[-1], drawn.shape[1])
    own, others, known = (shown_by(each) for each in (drawn, evenly(held_out, len(drawn)), training))
    return measure_samples([own], others, known, features)


def draw_samples(task: SampleTask, networks: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """What networks draw from the same noise, side by side: ``[C, H, W]``. Raises InputError if one does not fit."""
    return beside([grid(task.samples(each, ROWS * COLUMNS), COLUMNS) for each in networks], GAP)
