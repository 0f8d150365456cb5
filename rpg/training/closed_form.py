"""Training without steps: kernel ridge is fitted to the zoo in closed form."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rpg.config import Config
from rpg.training.data import all_tokens, check_zoo, training_conditions, training_entries
from rpg.training.distributed import DistributedContext
from rpg.training.run_folder import RunFolder
from rpg.training.trainer import build_network, trained_generator
from tokenization.layouts import fit_layout
from tokenization.zoo.zoo import Zoo


class ClosedFormTrainer:
    """A run without steps; the loop sees the interface of `rpg.training.trainer.Trainer`.

    Args:
        config, resume, overwrite, say: as of `rpg.training.loop.train`; a run that was interrupted is fitted again.
    """

    step = num_steps = 0

    def __init__(self, config: Config, *, resume: bool, overwrite: bool, say: Callable[[str], None]) -> None:
        self.started = time.monotonic()
        self.config = config
        self.folder = RunFolder(config.run)
        self.zoo = Zoo.open(config.zoo)
        check_zoo(self.zoo, config.train.splits, config.model.condition.kind)
        self.distributed = DistributedContext(config.train, str(self.folder.path))
        self.distributed.on_main(lambda: self.folder.check(config, resume=resume, overwrite=overwrite))
        self.distributed.on_main(lambda: self.folder.start(config, resume=resume))
        self.sampler = self

    def prefetch(self, first_step: int, last_step: int) -> Iterator[tuple[int, list[Any]]]:
        """No steps."""
        return iter(())

    def finish(self) -> Path:
        """Fit, and write the generator folder."""
        self.distributed.on_main(self._fit)
        return self.folder.generator

    def _fit(self) -> None:
        config, indices = self.config, training_entries(self.zoo, self.config.train.splits)
        layout = fit_layout(self.zoo, config.tokens, indices)
        network: Any = build_network(config, layout, self.zoo)
        conditions = training_conditions(self.zoo, indices, config.model.condition)
        error = network.fit(all_tokens(self.zoo, layout, indices), conditions, layout.token_weight)
        facts: dict[str, Any] = {
            "training seconds": round(time.monotonic() - self.started, 1),
            "training checkpoints": len(indices),
        }
        if conditions is not None:
            facts["leave-one-out error, part of the variance"] = round(error, 4)
        trained_generator(config, layout, network, self.zoo, facts).save_pretrained(self.folder.generator)
