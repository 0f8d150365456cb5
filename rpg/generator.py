"""The generator: layout, networks and averaged weights; loaded from a folder, sampled into checkpoints.

G networks of a tile, L tokens of a checkpoint, D token width, H model width, S state width, C condition values.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpg.config import Config
from rpg.model import RecurrentDiffusion
from rpg.seeding import derive_seed, generator
from tokenization.errors import InputError
from tokenization.layout import TokenLayout
from tokenization.writer import CheckpointWriter
from tokenization.zoo import ConditionSpec

FILES = ("config.yaml", "layout.json", "statistics.safetensors", "model.safetensors")
StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Tile:
    """Tokens that are computed together: networks ``network``… and tokens ``token``… of each."""

    network: int
    num_networks: int
    token: int
    num_tokens: int


@dataclass(frozen=True)
class Request:
    """What is asked of one call of ``generate``, every default filled in."""

    num: int
    seed: int
    sampler: str
    steps: int
    eta: float
    guidance_scale: float
    state: str
    conditions: Tensor | None  # [num, C]


class Generator:
    """A trained generator of checkpoints.

    Args:
        config: the experiment it was trained by.
        layout: how tokens become checkpoints.
        network: the networks, with the averaged weights.
        condition: what its conditions mean; None when it takes none.
        facts: how it was trained, for the model card.
    """

    def __init__(
        self,
        config: Config,
        layout: TokenLayout,
        network: RecurrentDiffusion,
        condition: ConditionSpec | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.network = network.eval().requires_grad_(False)
        self.condition = condition if config.model.condition.kind != "none" else None
        self.facts = facts or {}
        self.digest = ""

    # --- folder ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: Path | str, device: torch.device | str = "cpu") -> Generator:
        """Load a generator folder, a run folder that holds one, or a repository id on the Hugging Face hub.

        Raises:
            InputError: a file is missing or damaged, or does not fit the others.
        """
        folder = _find_folder(path)
        for name in FILES:
            if not (folder / name).is_file():
                raise InputError(str(folder), f"no {name}", f"a generator folder with {', '.join(FILES)}",
                                 "train again or copy the whole folder")
        config = Config.load(folder / "config.yaml")
        layout = TokenLayout.load(folder)
        weights = folder / "model.safetensors"
        try:
            with safe_open(weights, "pt") as file:
                metadata = json.loads((file.metadata() or {})["rpg"])
            state = load_file(weights)
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(str(weights), f"an unreadable file ({error})", "the weights of a generator",
                             "train again or copy the folder again") from None
        spec = metadata["condition"]
        condition = ConditionSpec(spec["kind"], spec["size"], tuple(spec["names"])) if spec else None
        network = RecurrentDiffusion(
            config.model, layout.positions, layout.token_size, metadata["num_states"], condition.size if condition else 0
        )
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(str(weights), str(error).splitlines()[-1].strip(), "the tensors that config.yaml describes",
                             "keep the folder's files together") from None
        loaded = cls(config, layout, network.to(device), condition, metadata["facts"])
        loaded.digest = _digest(folder)
        return loaded

    def save_pretrained(self, path: Path | str) -> Path:
        """Write the generator folder; one that is there already is replaced whole."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.config.save(temporary / "config.yaml")
        self.layout.save(temporary)
        metadata = {
            "condition": asdict(self.condition) if self.condition else None,
            "num_states": self.network.state.num_embeddings if self.network.state is not None else 1,
            "facts": self.facts,
        }
        tensors = {name: value.cpu().contiguous() for name, value in self.network.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors", {"format": "pt", "rpg": json.dumps(metadata)})
        (temporary / "README.md").write_text(_card(self))
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        self.digest = _digest(target)
        return target

    # --- sampling -------------------------------------------------------------------------------------------

    def generate(
        self,
        num: int = 1,
        *,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        condition: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
        state: str | None = None,
        output: Path | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[StateDict] | list[Path]:
        """Generate networks.

        Args:
            num: how many.
            seed: decides everything; network i of a seed is the same whatever ``num`` is.
            steps, sampler, eta, guidance_scale, state: override the ``generate`` section of the configuration.
            condition: one vector ``[C]`` for all networks or one each ``[num, C]``.
            output: a folder; networks then stream into safetensors files there, and their paths are returned.
            progress: called with (tokens done, tokens in all).

        Returns:
            State dicts in memory, or the paths of the files in ``output``.

        Raises:
            InputError: an impossible request.
        """
        request = self._request(num, seed, steps, sampler, eta, guidance_scale, condition, state)
        sink = FolderSink(self, request, Path(output)) if output is not None else MemorySink(self.layout, num)
        total = num * self.layout.num_tokens
        done = 0
        with sink:
            for tile, rows in self._sample(request):
                sink.take(tile, rows.cpu())
                done += tile.num_networks * tile.num_tokens
                if progress is not None:
                    progress(done, total)
        return sink.result()

    def _request(self, num, seed, steps, sampler, eta, guidance_scale, condition, state) -> Request:
        defaults = self.config.generate
        sampler = sampler or defaults.sampler or next(iter(self.network.objective.samplers))
        steps = defaults.steps if steps is None else steps
        if num < 1:
            raise InputError("num", str(num), "at least 1")
        if steps < 1:
            raise InputError("steps", str(steps), "at least 1")
        if sampler not in self.network.objective.samplers:
            raise InputError("sampler", repr(sampler), f"one of {', '.join(self.network.objective.samplers)}")
        return Request(
            num=num,
            seed=seed,
            sampler=sampler,
            steps=steps,
            eta=defaults.eta if eta is None else eta,
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            state=state or defaults.state,
            conditions=self._conditions(condition, num),
        )

    def _conditions(self, condition: Any, num: int) -> Tensor | None:
        if self.condition is None:
            if condition is not None:
                raise InputError("condition", "a condition", "none", "this generator was trained without one")
            return None
        width = 1 if self.condition.kind == "class" else self.condition.size
        if condition is None:
            raise InputError("condition", "none", f"{width} values ({self.condition.kind})", "say what to generate for")
        values = torch.as_tensor(condition, dtype=torch.float32)
        values = values.expand(num, -1) if values.ndim == 1 else values
        if values.shape != (num, width):
            raise InputError("condition", f"{list(values.shape)} values", f"[{num}, {width}]")
        if self.condition.kind == "binary" and not ((values == 0) | (values == 1)).all():
            raise InputError("condition", "values other than 0 and 1", "a binary vector")
        return values

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.network.position_embedding.device

    def tiles(self, num: int) -> Iterator[Tile]:
        """The tiles of ``num`` networks: whole networks side by side, or parts of one where it is larger than a tile."""
        length, size = self.layout.num_tokens, self.config.generate.tile_tokens
        group = max(1, size // length)
        for network in range(0, num, group):
            for token in range(0, length, size if group == 1 else length):
                yield Tile(network, min(group, num - network), token, min(size, length - token))

    @torch.inference_mode()
    def _sample(self, request: Request) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each tile with its denoised rows ``[G, n, D]``."""
        prototypes: list[Tensor] = []
        current = -1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.generate.precision == "bf16"):
            for tile in self.tiles(request.num):
                if tile.network != current:
                    prototypes, current = self._prototypes(request, tile.network), tile.network
                yield tile, self._sample_tile(request, tile, prototypes)[: tile.num_networks, : tile.num_tokens]

    def _group_size(self) -> int:
        return max(1, self.config.generate.tile_tokens // self.layout.num_tokens)

    def _prototypes(self, request: Request, first: int) -> list[Tensor]:
        """Prototypes ``[G or 1, L, H]`` of the tile's networks: with the condition and, under guidance, without.

        G is always the full tile, short ones repeat their last network: the arithmetic must not depend on ``num``.
        """
        group = [min(first + i, request.num - 1) for i in range(self._group_size())]
        vectors = self._state_vectors(request, group)
        if request.conditions is None:
            return [self.network.prototypes(vectors)]
        conditions = request.conditions[group].to(self.device)
        kept = torch.zeros(len(group), dtype=torch.bool, device=self.device)
        if request.guidance_scale == 1:
            return [self.network.prototypes(vectors, conditions, kept)]
        return [self.network.prototypes(vectors, conditions, drop) for drop in (kept, ~kept)]

    def _state_vectors(self, request: Request, networks: list[int]) -> Tensor | None:
        """Permutation states ``[G, S]``: drawn from the table, or from the Gaussian that fits it; one row if all share it."""
        if self.network.state is None:
            return None
        table = self.network.state.weight.detach()
        if len(table) == 1:
            return table
        streams = [generator(request.seed, "state", network) for network in networks]
        if request.state == "stored":
            drawn = torch.tensor([int(torch.randint(len(table), (), generator=stream)) for stream in streams])
            return table[drawn.to(table.device)]
        centred = table - table.mean(0)  # [K, S]
        # A combination of the table's own deviations with weights N(0, 1/K) has exactly their covariance.
        weights = torch.stack([torch.randn(len(table), generator=stream) for stream in streams]).to(table.device)
        return table.mean(0) + weights @ centred / len(table) ** 0.5

    def _sample_tile(self, request: Request, tile: Tile, prototypes: list[Tensor]) -> Tensor:
        """Denoise one tile, padded to its full shape: ``[G, n, D]``."""
        length, size = self.layout.num_tokens, self.config.generate.tile_tokens
        group, width = self._group_size(), self.layout.token_size
        num_tokens = length if group > 1 else min(size, length)
        # A short last tile repeats its last token, so that every tile has one shape.
        token_ids = torch.arange(tile.token, tile.token + num_tokens).clamp(max=length - 1)
        stream = torch.Generator(self.device).manual_seed(derive_seed(request.seed, "tile", tile.network, tile.token))
        noise = torch.randn(group * num_tokens, width, generator=stream, device=self.device)
        mask = self.layout.mask_rows(token_ids).to(self.device, torch.float32).repeat(group, 1)  # [G·n, D]
        contexts = []
        for each in prototypes:
            rows = each[:, token_ids.to(self.device)].expand(group, -1, -1).reshape(group * num_tokens, -1)
            contexts.append(self.network.denoiser.precompute(rows))
        scale = request.guidance_scale

        def predict(x: Tensor, time: Tensor) -> Tensor:
            times = time.expand(len(x))
            prediction = self.network.predict(x, times, contexts[0], mask)
            if len(contexts) == 1:
                return prediction
            free = self.network.predict(x, times, contexts[1], mask)
            return torch.lerp(free, prediction, scale)

        rows = self.network.objective.sample(
            predict, noise * mask, sampler=request.sampler, num_steps=request.steps, generator=stream, eta=request.eta
        )
        return (rows * mask).view(group, num_tokens, width)

    def provenance(self, request: Request, index: int) -> dict[str, str]:
        """The metadata of generated network ``index``."""
        facts: dict[str, Any] = {
            "generator": self.digest, "seed": request.seed, "index": index, "sampler": request.sampler,
            "steps": request.steps, "eta": request.eta, "guidance_scale": request.guidance_scale, "state": request.state,
            "condition": None if request.conditions is None else request.conditions[index].tolist(),
        }
        return {"format": "pt", "rpg.provenance": json.dumps(facts)}


class MemorySink:
    """Collects tiles and decodes them into state dicts."""

    def __init__(self, layout: TokenLayout, num: int) -> None:
        self.layout = layout
        self.tokens = torch.empty(num, layout.num_tokens, layout.token_size)

    def __enter__(self) -> MemorySink:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take(self, tile: Tile, rows: Tensor) -> None:
        """Keep the rows ``[G, n, D]`` of a tile."""
        self.tokens[tile.network : tile.network + tile.num_networks, tile.token : tile.token + tile.num_tokens] = rows

    def result(self) -> list[StateDict]:
        """One state dict a network."""
        return [self.layout.decode(tokens) for tokens in self.tokens]


class FolderSink:
    """Streams tiles into one safetensors file a network; a file appears when it is whole."""

    def __init__(self, source: Generator, request: Request, folder: Path) -> None:
        self.source, self.request, self.folder = source, request, folder
        self.paths: list[Path] = []
        self.open: dict[int, CheckpointWriter] = {}

    def __enter__(self) -> FolderSink:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        for writer in self.open.values():
            writer.__exit__(kind, error, trace)

    def take(self, tile: Tile, rows: Tensor) -> None:
        """Write the rows ``[G, n, D]`` of a tile to their places."""
        layout = self.source.layout
        for offset in range(tile.num_networks):
            index = tile.network + offset
            if index not in self.open:
                path = self.folder / f"network-{index:05d}.safetensors"
                self.open[index] = CheckpointWriter(path, layout, self.source.provenance(self.request, index))
                self.paths.append(path)
            self.open[index].write(tile.token, rows[offset])
            if tile.token + tile.num_tokens == layout.num_tokens:
                self.open.pop(index).close()

    def result(self) -> list[Path]:
        """The files, in the order of the networks."""
        return self.paths


def _find_folder(path: Path | str) -> Path:
    folder = Path(path)
    if (folder / "generator").is_dir():
        return folder / "generator"
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/")):
        raise InputError(str(path), "no such folder", "a run folder, a generator folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=[*FILES, "README.md"]))
    except Exception as error:  # the hub's many errors all mean: not to be had
        raise InputError(str(path), "neither a folder nor a repository of the hub that can be reached",
                         "a run folder, a generator folder or a hub id", type(error).__name__) from None


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _card(source: Generator) -> str:
    layout, config = source.layout, source.config
    facts = "\n".join(f"| {name} | {value} |" for name, value in source.facts.items())
    condition = f"{source.condition.kind}, {source.condition.size} values" if source.condition else "none"
    return f"""# Generator of neural-network weights

Writes checkpoints of {layout.num_values:,} values ({len(layout.layers)} layers, {layout.num_tokens:,} tokens of
{layout.token_size}). Condition: {condition}. Objective: {config.model.diffusion.kind},
backbone: {config.model.backbone.kind}, denoiser: {config.model.denoiser.kind}, normalization: {config.tokens.normalization}.

| training | |
| --- | --- |
{facts}

```python
from rpg import Generator
networks = Generator.from_pretrained("this/folder").generate(num=4, seed=0)
```

Whether these networks are new as well as good is measured by `rpg evaluate`, not promised here.
"""
