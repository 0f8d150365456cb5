"""The generator: layout, networks and averaged weights; loaded from a folder, sampled into checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rpg.config import Config
from rpg.devices import Partition, chosen_device, parse_device
from rpg.generation.folders import (
    FolderSink,
    MemorySink,
    adapter_config_of,
    decoded_networks,
    find_folder,
    folder_digest,
    load_config,
    read_weights,
    require_files,
)
from rpg.generation.model_card import model_card, push_generator
from rpg.generation.request import (
    KNOWN_FILE,
    Distance,
    KnownRange,
    Request,
    condition_codes,
    requested_conditions,
    requested_initial,
    requested_texts,
)
from rpg.generation.sampler import Tile
from rpg.generation.text_encoder import TEXTS_FILE, TextTable, text_table
from rpg.models import Network, build_network, part_of
from tokenization.errors import InputError
from tokenization.files import atomic_folder
from tokenization.layouts import Layout, load_layout, with_sparsity
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.zoo.condition import MetricScale
from tokenization.zoo.zoo import ConditionSpec, Zoo

Asked = str | Sequence[str] | Sequence[float] | Sequence[Sequence[float]] | Mapping[str, Any] | Tensor | None
"""A condition as a caller gives it."""


class Generator:
    """A trained generator of checkpoints.

    Args:
        condition: what its conditions mean; None when it takes none.
        facts: how it was trained, for the model card.
        adapter: text of PEFT's ``adapter_config.json`` if it writes adapters; that in the zoo when None.
        texts: the texts it was trained with and their vectors, if its conditions are texts; those of the zoo when None.
        metric: the scale of the metric that is its condition, if one is.

    Attributes:
        known: which error validation tasks had by their distance from what was learned, where that was measured.
    """

    def __init__(
        self, config: Config, layout: Layout, network: Network, condition: ConditionSpec | None = None,
        facts: dict[str, Any] | None = None, adapter: str | None = None, texts: TextTable | None = None,
        metric: MetricScale | None = None,
    ) -> None:  # fmt: skip
        self.config, self.layout = config, layout
        self.network = network.eval().requires_grad_(False)
        self.condition = condition if config.model.condition.kind != "none" else None
        self.facts = facts or {}
        self.adapter = adapter if adapter is not None else adapter_config_of(Path(config.zoo), layout)
        self.texts, self.metric = texts, metric
        if texts is None and self.condition is not None and self.condition.kind == "text":
            self.texts = text_table(Zoo.open(config.zoo), config.model.condition.encoder)
        self.known: KnownRange | None = None
        self.digest, self.folder = "", Path()
        self._sampler: tuple[Any, Any] | None = None

    @classmethod
    def from_pretrained(cls, path: Path | str, device: torch.device | str | None = None, **hub: Any) -> Generator:
        """Load a generator folder, a run folder that holds one, or a repository id on the Hugging Face hub.

        Without a ``device`` it computes on that which the command chose, without a command on the CPU. ``hub`` is
        ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download`` of `tokenization.zoo.hub.pull`.

        Raises:
            InputError: a file is missing, damaged or does not fit the others, there is no such device or repository.
        """
        device = parse_device(device or chosen_device() or "cpu")
        folder = find_folder(path, **hub)
        require_files(folder)
        config = load_config(folder)
        layout = load_layout(folder)
        weights = folder / "model.safetensors"
        saved = read_weights(weights)
        condition = saved.condition
        texts = TextTable.load(folder / TEXTS_FILE) if condition is not None and condition.kind == "text" else None
        size = texts.num_inputs if texts is not None else condition.num_inputs if condition is not None else 0
        network = build_network(config.model, layout, saved.num_states, size)
        try:
            network.load_state_dict(saved.tensors)
        except RuntimeError as error:
            found = str(error).splitlines()[-1].strip()
            raise InputError(f"{weights} does not fit its config.yaml ({found}); copy the folder again.") from None
        adapter = adapter_config_of(folder, layout)
        loaded = cls(config, layout, network.to(device), condition, saved.facts, adapter, texts, saved.metric)
        loaded.known = KnownRange.load(folder / KNOWN_FILE) if (folder / KNOWN_FILE).is_file() else None
        loaded.digest, loaded.folder = folder_digest(folder), folder
        return loaded

    def save_pretrained(self, path: Path | str) -> Path:
        """Write the generator folder; an existing one is replaced whole."""
        target = Path(path)
        with atomic_folder(target) as temporary:
            self.config.save(temporary / "config.yaml")
            self.layout.save(temporary)
            metadata = {
                "condition": self.condition.to_json() if self.condition else None,
                "num_states": self.network.num_states,
                "facts": self.facts,
                "metric": asdict(self.metric) if self.metric else None,
            }
            tensors = {name: value.cpu().contiguous() for name, value in self.network.state_dict().items()}
            save_file(tensors, temporary / "model.safetensors", {"format": "pt", "rpg": json.dumps(metadata)})
            if self.adapter is not None:
                (temporary / CONFIG_NAME).write_text(self.adapter, encoding="utf-8")
            if self.texts is not None:
                self.texts.save(temporary / TEXTS_FILE)
            if self.known is not None:
                self.known.save(temporary / KNOWN_FILE)
            (temporary / "README.md").write_text(model_card(self), encoding="utf-8")
        self.digest = folder_digest(target)
        return target

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Publish it on the Hugging Face hub, with scores and pictures of the run it is from; gives the address.

        ``options`` are ``private``, ``branch``, ``token`` and ``message`` (`tokenization.zoo.hub.publish`).

        Raises:
            InputError: the hub refuses or cannot be reached; nothing is published then.
        """
        return push_generator(self, repo, self.folder.parent if self.folder.name == "generator" else None, **options)

    @property
    def takes_initial(self) -> bool:
        """Whether it improves checkpoints that it is given."""
        return self.config.model.initial is not None

    def distance(self, condition: Asked) -> Distance | None:
        """How far a condition is from what was learned, and the error to expect there.

        None where that was never measured: for conditions other than settings and examples, or without validation
        tasks. Raises InputError if the condition is impossible.
        """
        found = self.request(condition=condition).distances
        return found[0] if found else None

    def generate(
        self, num: int = 1, *, seed: int = 0, steps: int | None = None, sampler: str | None = None,
        eta: float | None = None, guidance_scale: float | None = None, condition: Asked = None,
        state: str | None = None, temperature: float | None = None, initial: Any = None, sparsity: float | None = None,
        output: Path | str | None = None, overwrite: bool = True,
        progress: Callable[[float, float], None] | None = None, partition: Partition | None = None,
    ) -> list[dict[str, Tensor]] | list[Path]:  # fmt: skip
        """Generate networks.

        Args:
            seed: decides everything; network i of a seed is the same whatever ``num`` is.
            steps, sampler, eta, guidance_scale, state, temperature: override the ``generate`` section of the
                configuration.
            condition: one vector ``[C]`` for all networks or one each ``[num, C]``; of a generator that takes texts
                also one text, or one each; of a metric its value as it is measured; settings also by name.
            initial: of a generator that takes one: a checkpoint to go on from, its path or state dict; or a list of
                ``num``.
            sparsity: of pruned networks: share of zeros among the pruned weights, 0 … 1; the zoo's when None.
            output: a folder; networks then stream into safetensors files (adapters: PEFT folders) there, and their
                paths are returned.
            overwrite: whether networks that are there and of another generator or request may be replaced.
            progress: called with (networks done, networks in all), of this process's part; a large one counts in part.
            partition: which of several processes this is, all of which call this alike and fill ``output`` together.

        Returns:
            State dicts in memory, or the paths of the files or folders in ``output``.

        Raises:
            InputError: an impossible request.
        """
        request = self.request(
            num, seed, steps=steps, sampler=sampler, eta=eta, guidance_scale=guidance_scale, state=state,
            temperature=temperature, condition=condition, initial=initial, sparsity=sparsity,
        )  # fmt: skip
        partition = partition or Partition()
        tokens = self.sampler()
        sink = self._sink(request, output, partition, tokens.shared(num, partition), overwrite)
        tiles, length = list(tokens.tiles(num, partition)), self.layout.num_tokens
        total, done = sum(tile.num_networks * tile.num_tokens for tile in tiles), 0
        with sink:
            for tile, rows in tokens.sample(request, partition=partition):
                sink.take(tile, rows.cpu())
                done += tile.num_networks * tile.num_tokens
                if progress is not None:
                    progress(done / length, total / length)
        return sink.result()

    def one_by_one(
        self, num: int, *, seed: int = 0, partition: Partition | None = None, **options: Any
    ) -> Iterator[dict[str, Tensor]]:
        """The networks of ``generate``, each given away before the next is made: no more than a tile's are held.

        ``options`` are as `request` takes them. Of several processes each makes those of its `share`.
        """
        request = self.request(num, seed, **options)
        part = replace(partition or Partition(), whole=True)
        tiles = self.sampler().sample(request, partition=part)
        return decoded_networks(with_sparsity(self.layout, request.sparsity), tiles)

    def share(self, num: int, partition: Partition) -> list[int]:
        """Which of ``num`` networks this process makes in `one_by_one`."""
        tiles = self.sampler().tiles(num, replace(partition, whole=True))
        return [tile.network + i for tile in tiles if tile.token == 0 for i in range(tile.num_networks)]

    def asked(self, num: int, seed: int = 0) -> list[int]:
        """Which of the checkpoints it was trained on each network of a seed is asked to be, given ``state="stored"``.

        None where its states are not those of checkpoints.
        """
        return self.sampler().asked(num, seed)

    def denoising_paths(
        self, num: int = 5, *, seed: int = 0, points: int = 20, condition: Any = None
    ) -> list[tuple[int, list[dict[str, Tensor]]]]:
        """Networks on their way from noise: (sampling steps taken, state dicts of the ``num`` networks so far).

        Network i is the one that ``generate`` makes of the same seed and condition. At most ``points`` steps are shown,
        spread evenly over the sampling, its last among them.

        Raises:
            InputError: the generator takes a condition and there is none, or it is impossible.
        """
        request = self.request(num, seed, condition=condition)
        shown = {round((i + 1) * request.steps / points) - 1 for i in range(points)} | {request.steps - 1}
        sinks: dict[int, MemorySink] = {}

        def watch(tile: Tile, step: int, rows: Callable[[], Tensor]) -> None:
            if step in shown:
                sinks.setdefault(step, MemorySink(self.layout, num)).take(tile, rows().cpu())

        for _ in self.sampler().sample(request, watch):
            pass
        return [(step + 1, sinks[step].result()) for step in sorted(sinks)]

    def request(
        self, num: int = 1, seed: int = 0, *, condition: Any = None, initial: Any = None, sparsity: float | None = None,
        sampler: str | None = None, steps: int | None = None, eta: float | None = None, state: str | None = None,
        guidance_scale: float | None = None, temperature: float | None = None,
    ) -> Request:  # fmt: skip
        """What ``num`` networks ask of the sampler, every default filled in; arguments are those of `generate`.

        Raises InputError if it is impossible.
        """
        settings, samplers = self.config.generate, self.network.samplers
        sampler = sampler or settings.sampler or samplers[0]
        if sampler not in samplers:
            raise InputError(f"There is no sampler {sampler!r} for this generator; choose {' or '.join(samplers)}.")
        given: Any = dict(steps=steps, eta=eta, guidance_scale=guidance_scale, state=state, temperature=temperature)
        how = {name: getattr(settings, name) if value is None else value for name, value in given.items()}
        conditions = requested_conditions(condition, num, self.condition, self.texts)
        values = None
        if conditions is not None and self.metric is not None:
            values, conditions = conditions, self.metric.asked(conditions)
        elif conditions is not None and self.condition is not None and self.condition.settings:
            values, conditions = conditions, self.condition.inputs(conditions)
        return Request(
            num=num, seed=seed, sampler=sampler, **how, sparsity=sparsity, conditions=conditions, values=values,
            texts=requested_texts(condition, num), distances=self._distances(conditions),
            of_examples=self.condition is not None and self.condition.kind == "examples",
            initial=requested_initial(initial, num, self.layout, self.takes_initial),
        )  # fmt: skip

    def _distances(self, conditions: Tensor | None) -> tuple[Distance, ...]:
        if self.known is None or self.condition is None or conditions is None:
            return ()
        distinct, places = conditions.unique(dim=0, return_inverse=True)
        codes = condition_codes(self.network, self.condition, distinct)
        found = [] if codes is None else self.known.of(codes)
        return tuple(found[place] for place in places.tolist()) if found else ()

    def sampler(self) -> Any:
        """What turns requests into tiles of tokens, as `rpg.generation.sampler.TokenSampler` does."""
        kept = (self.config.generate, next(self.network.buffers()).device)
        if self._sampler is None or self._sampler[0] != kept:
            made = part_of(self.config.model, "sampler")
            self._sampler = kept, made(self.network, self.layout, self.config.generate)
        return self._sampler[1]

    def _sink(
        self, request: Request, output: Path | str | None, partition: Partition, shared: range, overwrite: bool
    ) -> MemorySink | FolderSink:
        layout = with_sparsity(self.layout, request.sparsity)
        if output is not None:
            facts = partial(request.provenance, self.digest, layout.copied)
            return FolderSink(layout, Path(output), facts, request.num, self.adapter, partition, shared, overwrite)
        if partition.size > 1:
            raise InputError("several processes fill an output folder together; name one, or start a single process")
        return MemorySink(layout, request.num)
