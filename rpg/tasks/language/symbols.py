"""A language task that needs no download: a small Llama that copies symbol strings, and tasks that change some symbols.

The base is pretrained here to copy strings. Each task replaces the symbols of a subset S by a marker; with C symbols
there are 2^C − 2 tasks, S neither empty nor everything. A task's condition is which symbols are in S.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rpg.packages import without_bars
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.class_splits import all_tasks
from rpg.tasks.collecting import cosine_decay, single_threaded
from rpg.tasks.language.config import SymbolsConfig
from tokenization.errors import InputError
from tokenization.files import atomic_files, write_text
from tokenization.zoo.locks import locked

MARKER, EQUALS, PAD, END = "*", "=", "<pad>", "<end>"
MADE_OF = "symbols.json"


def make_symbols(config: SymbolsConfig, base: Path, data: Path, seed: int) -> None:
    """Write the base model's folder, and the tasks' JSONL files with their table ``conditions.csv``.

    What is there already stays.

    Raises:
        InputError: there are files of other symbols.
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
    strings = random_strings(config.symbols, config.rows, config.length, seed)
    lines = ["file," + ",".join(f"condition.{name}" for name in names)]
    for bits in all_tasks(config.symbols).tolist():
        name = "".join(map(str, bits)) + ".jsonl"
        (data / name).write_text("".join(_row(string, bits, names) for string in strings.tolist()), encoding="utf-8")
        lines.append(",".join([name, *map(str, bits)]))
    (data / "conditions.csv").write_text("\n".join(lines) + "\n")


def symbols(config: SymbolsConfig) -> str:
    """The symbols, ``abc…``."""
    return "abcdefghijklmnopqrstuvwxyz"[: config.symbols]


def random_strings(num_symbols: int, num: int, length: int, seed: int) -> Tensor:
    """Random strings as numbers of symbols, ``[num, length]``."""
    return torch.randint(num_symbols, (num, length), generator=make_rng(seed, "strings"))


def _row(string: list[int], bits: list[int], names: str) -> str:
    prompt = "".join(names[each] for each in string)
    completion = "".join(MARKER if bits[each] else names[each] for each in string)
    return json.dumps({"prompt": prompt + EQUALS, "completion": completion}) + "\n"


def write_base(config: SymbolsConfig, base: Path, seed: int) -> None:
    """Pretrain the base and save it as transformers does, with its tokenizer."""
    tokenizer = make_tokenizer(config)
    with single_threaded():
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


def build_base(config: SymbolsConfig, tokenizer: Any) -> Any:
    """The untrained base, drawn from torch's global random state."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=config.hidden, intermediate_size=config.intermediate,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads,
            max_position_embeddings=4 * (config.length + 1), bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def pretrain(config: SymbolsConfig, tokenizer: Any, seed: int) -> Any:
    """A base that copies strings of all symbols and the marker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "base"))
        model = build_base(config, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01, fused=True)
    first, equals = tokenizer.convert_tokens_to_ids(MARKER), tokenizer.convert_tokens_to_ids(EQUALS)
    rng = make_rng(seed, "pretraining")
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / 50) * cosine_decay(step, config.steps)
        shape = (config.batch_size, config.length)
        strings = first + torch.randint(config.symbols + 1, shape, generator=rng)  # the marker and all symbols
        middle, end = torch.full((len(strings), 1), equals), torch.full((len(strings), 1), tokenizer.eos_token_id)
        ids = torch.cat([strings, middle, strings, end], 1)  # [B, 2·length + 2]
        logits = model(ids[:, :-1], use_cache=False).logits[:, config.length :]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, config.length + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
