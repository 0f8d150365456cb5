"""The rows that adapters are trained on and scored by: users' files, and the made-up language of symbols.

T tasks, B rows, S token positions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.devices import single_threaded
from rpg.packages import without_bars
from rpg.seeding import derive_seed, make_rng, permutation
from rpg.tasks.class_splits import all_tasks
from rpg.tasks.collecting import descend, warm_cosine
from rpg.tasks.language.config import RowsConfig, SymbolsConfig
from tokenization.checkpoint.safetensors import natural_key
from tokenization.errors import InputError
from tokenization.files import atomic_files, json_lines, write_text
from tokenization.zoo.condition import ConditionKind, ConditionSpec
from tokenization.zoo.locks import locked
from tokenization.zoo.metadata_table import Label, infer_condition, label_of, read_table, resolve_condition

IGNORED = -100
"""Target of a position that is not scored, as in torch's cross-entropy."""

SPLITS = ("train", "validation", "unseen")


@dataclass(frozen=True)
class TaskFile:
    """One task: its file, what it is conditioned on, and whether a generator may learn from it."""

    path: Path
    condition: tuple[float, ...]
    split: str


@dataclass(frozen=True)
class Rows:
    """Tokenised rows, padded on the right.

    Attributes:
        ids: ``[B, S]`` int64.
        targets: the token that follows each position ``[B, S]``; ``IGNORED`` but where a completion follows.
        end: the token that closes every completion.
    """

    ids: Tensor
    targets: Tensor
    end: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> Rows:
        return Rows(self.ids[rows], self.targets[rows], self.end)

    def to(self, device: torch.device) -> Rows:
        """The same on ``device``."""
        return Rows(self.ids.to(device), self.targets.to(device), self.end)

    @property
    def scored(self) -> Tensor:
        """Positions at which any row has a target, ``[K]`` ascending."""
        return (self.targets != IGNORED).flatten(0, -2).any(0).nonzero()[:, 0]


def stack_rows(parts: Sequence[Rows]) -> Rows:
    """Rows of T tasks, as many of each: ``[T, B, S]``, padded to the longest."""
    length = max(part.ids.shape[-1] for part in parts)

    def padded(tensor: Tensor, value: int) -> Tensor:
        return F.pad(tensor, (0, length - tensor.shape[-1]), value=value)

    ids = torch.stack([padded(part.ids, part.end) for part in parts])
    return Rows(ids, torch.stack([padded(part.targets, IGNORED) for part in parts]), parts[0].end)


def find_tasks(
    data: Path | str, table: Path | str | None, num_unseen: int, num_validation: int, seed: int,
    kind: ConditionKind | None = None,
) -> tuple[list[TaskFile], ConditionSpec]:  # fmt: skip
    """The tasks of a folder and what their conditions mean.

    Args:
        data: folder of ``*.jsonl``.
        table: CSV or JSONL with ``file`` (a name in the folder), ``condition`` or ``condition.NAME`` columns and
            perhaps ``split``. Without it a file's stem is its condition: bits if all are of 0 and 1, else a class.
        num_unseen, num_validation: tasks drawn for these splits where the table has no ``split``.
        kind: what conditions are; found out from the values when None.

    Raises:
        InputError: no files, a bad table, an unknown split, or none left to train on.
    """
    folder = Path(data)
    labelled = _from_table(folder, Path(table), kind) if table is not None else _from_stems(folder, kind)
    labels = [label for _, label, _ in labelled]
    spec = infer_condition(labels, kind)
    if spec is None:
        raise InputError(f"{table} gives no condition; add a column condition, or columns condition.NAME")
    given = any(has_split for _, _, has_split in labelled)
    splits = [label.split for label in labels] if given else _drawn(len(labels), num_unseen, num_validation, seed)
    tasks = []
    for (path, label, _), split in zip(labelled, splits, strict=True):
        if split not in SPLITS:
            raise InputError(f"{label.where} has the split {split!r}; write one of {', '.join(SPLITS)}")
        condition = resolve_condition(label, spec)
        assert condition is not None
        tasks.append(TaskFile(path, condition, split))
    return tasks, spec


def _from_table(folder: Path, table: Path, kind: ConditionKind | None) -> list[tuple[Path, Label, bool]]:
    found = []
    for where, row in read_table(table):
        path = folder / row["file"]
        if not path.is_file():
            raise InputError(
                f"{where} names the file {row['file']!r}, which is not in {folder}; put it there or correct the name"
            )
        found.append((path, label_of(row, where, kind), "split" in row))
    return found


def _from_stems(folder: Path, kind: ConditionKind | None) -> list[tuple[Path, Label, bool]]:
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: natural_key(path.name))
    if not paths:
        raise InputError(
            f"{folder} has no *.jsonl; check that task.data is the folder with a file of prompts and completions a task"
        )
    stems = [path.stem for path in paths]
    binary = kind in (None, "binary") and all(set(stem) <= {"0", "1"} and len(stem) == len(stems[0]) for stem in stems)
    labels = [Label(str(path), condition=tuple(map(float, path.stem)) if binary else f"{path.stem}") for path in paths]
    return [(path, label, False) for path, label in zip(paths, labels, strict=True)]


def _drawn(num: int, num_unseen: int, num_validation: int, seed: int) -> list[str]:
    if num_unseen + num_validation >= num:
        raise InputError(
            f"of {num} tasks, {num_unseen} unseen and {num_validation} for validation leave none to train on; "
            "lower task.unseen or task.validation"
        )
    splits = ["train"] * num
    order = permutation(num, seed, "unseen tasks").tolist()
    for rank, place in enumerate(order[: num_unseen + num_validation]):
        splits[place] = "unseen" if rank < num_unseen else "validation"
    return splits


def read_rows(path: Path, tokenizer: Any, config: RowsConfig) -> dict[str, Rows]:
    """Tokenise a task's rows, by split: ``train``, ``validation`` and ``test``.

    Prompt and completion are tokenised apart and joined as they are; a completion ends with the end-of-text token.
    Raises InputError if a line is not a row, is too long, or there are too few.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("the tokenizer of task.base has no end-of-text token; choose a base that has one")
    rows = _tokenised(path, tokenizer, config)
    kept = config.validation + config.test
    if len(rows) <= kept:
        raise InputError(f"{path} has {len(rows)} rows, but {kept} are kept for scoring; add rows, or keep fewer")
    parts = {"train": rows[:-kept], "validation": rows[-kept : -config.test], "test": rows[-config.test :]}
    return {split: _padded(part, end) for split, part in parts.items()}


def rows_of(path: Path, tokenizer: Any, config: RowsConfig) -> Rows:
    """All rows of a file. Raises InputError as `read_rows` does."""
    rows = _tokenised(path, tokenizer, config)
    if not rows:
        raise InputError(f"{path} has no rows; write one with the texts prompt and completion")
    return _padded(rows, tokenizer.eos_token_id)


def _tokenised(path: Path, tokenizer: Any, config: RowsConfig) -> list[tuple[list[int], int]]:
    """The ids of each row and where its completion begins."""
    found = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is unreadable ({error}); write it as JSONL in UTF-8") from None
    for where, row in json_lines(text, path):
        for key in ("prompt", "completion"):
            if not isinstance(row.get(key), str):
                raise InputError(f"{where} has no text {key!r}; a row needs the texts prompt and completion")
        if not row["completion"]:
            raise InputError(f"{where} has an empty completion; give the right answer")
        prompt = tokenizer(row["prompt"]).input_ids
        ids = prompt + tokenizer(row["completion"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        if len(ids) > config.max_tokens:
            raise InputError(
                f"{where} has {len(ids)} tokens, but task.rows.max_tokens is {config.max_tokens}; raise it or shorten "
                "the row"
            )
        if not prompt:
            raise InputError(f"{where} has a prompt of no token; give at least one")
        found.append((ids, len(prompt)))
    return found


def _padded(rows: Sequence[tuple[list[int], int]], end: int) -> Rows:
    length = max(len(ids) for ids, _ in rows) - 1  # nothing follows the last token
    tokens = torch.full((len(rows), length), end)
    targets = torch.full((len(rows), length), IGNORED)
    for number, (ids, first) in enumerate(rows):
        tokens[number, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[number, first - 1 : len(ids) - 1] = torch.tensor(ids[first:])
    return Rows(tokens, targets, end)


MARKER, EQUALS, PAD, END = "*", "=", "<pad>", "<end>"
MADE_OF = "symbols.json"


def make_symbols(config: SymbolsConfig, base: Path, data: Path, seed: int) -> None:
    """Write the base model's folder, and the tasks' JSONL files with their table ``conditions.csv``.

    What is there already stays. Raises InputError if it is of other symbols.
    """
    for folder, write in ((data, write_tasks), (base, write_base)):
        made_of = json.dumps({"seed": seed, **config.model_dump(mode="json")})
        if not (folder / MADE_OF).is_file():
            with locked(folder, together=False):
                with atomic_files(folder) as made:
                    write(config, made, seed)
                write_text(folder / MADE_OF, made_of)  # last: what is half done is done again
        elif (found := (folder / MADE_OF).read_text()) != made_of:
            raise InputError(f"{folder / MADE_OF} says {found}, not {made_of}; remove the folder, or name another")


def write_tasks(config: SymbolsConfig, data: Path, seed: int) -> None:
    """One file a task, named by its bits, and the table of conditions."""
    names = symbols(config)
    strings = torch.randint(config.symbols, (config.rows, config.length), generator=make_rng(seed, "strings"))
    lines = ["file," + ",".join(f"condition.{name}" for name in names)]
    for bits in all_tasks(config.symbols).tolist():
        name = "".join(map(str, bits)) + ".jsonl"
        (data / name).write_text("".join(_row(string, bits, names) for string in strings.tolist()), encoding="utf-8")
        lines.append(",".join([name, *map(str, bits)]))
    (data / "conditions.csv").write_text("\n".join(lines) + "\n")


def symbols(config: SymbolsConfig) -> str:
    """The symbols, ``abc…``."""
    return "abcdefghijklmnopqrstuvwxyz"[: config.symbols]


def _row(string: list[int], bits: list[int], names: str) -> str:
    prompt = "".join(names[each] for each in string)
    completion = "".join(MARKER if bits[each] else names[each] for each in string)
    return json.dumps({"prompt": prompt + EQUALS, "completion": completion}) + "\n"


def write_base(config: SymbolsConfig, base: Path, seed: int) -> None:
    """Pretrain the base and save it as transformers does, with its tokenizer."""
    tokenizer = make_tokenizer(config)
    model = pretrain(config, tokenizer, seed)
    with without_bars():
        tokenizer.save_pretrained(base)
        model.save_pretrained(base)


def make_tokenizer(config: SymbolsConfig) -> Any:
    """One token a character."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = [PAD, END, EQUALS, MARKER, *symbols(config)]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


@single_threaded()
def pretrain(config: SymbolsConfig, tokenizer: Any, seed: int) -> Any:
    """A base that copies strings of all symbols and the marker."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=config.intermediate,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads,
        max_position_embeddings=4 * (config.length + 1), bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "base"))
        model = LlamaForCausalLM(sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01, fused=True)
    first, equals = tokenizer.convert_tokens_to_ids(MARKER), tokenizer.convert_tokens_to_ids(EQUALS)
    rng = make_rng(seed, "pretraining")
    for step in range(config.steps):
        shape = (config.batch_size, config.length)
        strings = first + torch.randint(config.symbols + 1, shape, generator=rng)  # the marker and all symbols
        middle, end = torch.full((len(strings), 1), equals), torch.full((len(strings), 1), tokenizer.eos_token_id)
        ids = torch.cat([strings, middle, strings, end], 1)  # [B, 2·length + 2]
        logits = model(ids[:, :-1], use_cache=False).logits[:, config.length :]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, config.length + 1 :].flatten())
        descend(optimizer, loss, config.learning_rate * warm_cosine(step, config.steps, 50))
    return model.eval()
