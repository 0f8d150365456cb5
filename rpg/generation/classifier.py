"""A scikit-learn classifier whose fitting is one generation: from a few examples to the weights of a network.

n examples, P values of each, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from rpg.generation.examples import class_probabilities, example_task, examples_of
from rpg.generation.generator import Generator
from rpg.tasks.side_by_side import stack
from tokenization.checkpoint.checkpoint import save_checkpoint
from tokenization.errors import InputError


class AsTaken(nn.Module):
    """A generated network with what its task does to examples first: it takes them as the classifier does."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], offset: Tensor) -> None:
        super().__init__()
        self.network, self.shape = network, shape
        self.register_buffer("offset", offset)

    def forward(self, examples: Tensor) -> Tensor:
        """Logits ``[n, K]`` of examples ``[n, P]``."""
        return self.network(examples.unflatten(-1, self.shape) + self.offset)


class GeneratedClassifier(ClassifierMixin, BaseEstimator):
    """Fits by generating: a run that takes examples makes the network; nothing is trained.

    Args:
        run: a run or generator folder of ``model.condition.kind: examples``, or a repository id.
        num: networks to draw; more than one answer together.
        seed: decides the draws.

    Attributes:
        classes_: every class that the generator knows, also those without an example.
        networks_: the generated networks, stacked ``[num, *shape]``.
    """

    def __init__(self, run: str = "sensors", num: int = 1, seed: int = 0) -> None:
        self.run, self.num, self.seed = run, num, seed

    def fit(self, X: Any, y: Any) -> GeneratedClassifier:
        """Generate the network for examples ``X`` ``[n, P]`` of the classes ``y`` ``[n]``.

        Raises:
            InputError: a ValueError, too: the examples do not fit the generator, or a class is unknown to it.
        """
        X, y = self._checked(X, y, fitting=True)
        names = self._fit(X, y)
        self.classes_ = np.array(names) if y.dtype.kind in "OU" else np.array(names).astype(y.dtype)
        return self

    def _checked(self, X: Any, y: Any = None, fitting: bool = False) -> Any:
        """What scikit-learn requires of data: of ``X`` alone, or for fitting of both."""
        if not fitting:
            check_is_fitted(self)
            return validate_data(self, X, dtype=np.float32, reset=False)
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        return X, y

    def _fit(self, values: np.ndarray, classes: np.ndarray) -> Sequence[str]:
        """Generate; returns the names of all classes."""
        generator = Generator.from_pretrained(self.run)
        if generator.condition is None or generator.condition.kind != "examples":
            raise InputError(f"{self.run} takes no examples; train with model.condition.kind: examples")
        if len(generator.condition.names) < 2:
            raise InputError(f"{self.run} takes examples without classes; use `rpg generate {self.run} --examples`")
        rows = examples_of(values, list(classes), generator.condition, "X")
        self.networks_ = stack(generator.generate(self.num, seed=self.seed, condition=rows))  # type: ignore[arg-type]
        self.task_ = example_task(generator.config.task)
        return generator.condition.names

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities of examples ``[n, P]``: the networks' average, ``[n, K]``."""
        return self._probabilities(self._checked(X))

    def _probabilities(self, values: np.ndarray) -> np.ndarray:
        return class_probabilities(self.task_, self.networks_, torch.from_numpy(values)).mean(0).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of examples ``[n, P]``, ``[n]``."""
        places = self.predict_proba(X).argmax(1)
        return self.classes_[places]

    def module(self, index: int = 0) -> nn.Module:
        """Network ``index`` as a plain module: examples ``[n, P]`` to logits ``[n, K]``."""
        check_is_fitted(self)
        network = self.task_.build()
        network.load_state_dict({name: value[index] for name, value in self.networks_.items()})
        offset = self.task_.inputs(torch.zeros(1, int(np.prod(self.task_.example_shape))))[0]
        return AsTaken(network, self.task_.example_shape, offset).eval()

    def export(self, path: Path | str, index: int = 0) -> Path:
        """Write network ``index``: its weights as safetensors, or all of ``module()`` as ONNX, by the file's suffix.

        Raises:
            InputError: the file has another suffix, or the package ``onnx`` is missing.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            save_checkpoint(path, {name: value[index].clone() for name, value in self.networks_.items()})
        elif path.suffix == ".onnx":
            example = torch.zeros(1, int(np.prod(self.task_.example_shape)))
            batch = {0: torch.export.Dim("batch")}
            torch.onnx.export(self.module(index), (example,), path, dynamic_shapes=(batch,), dynamo=True)
        else:
            raise InputError(f"{path} has an unknown suffix; write .safetensors or .onnx")
        return path
