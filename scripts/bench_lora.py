"""Adapters of bases of some hundred million values through every command: Llama's and Qwen2's shapes, LoRA and DoRA.

The bases have random values, so that nothing is learned that would be of use; what is measured are seconds and memory.
PEFT itself fine-tunes one adapter for each of five tasks that are described by a text; `configs/lora/folder.yaml` then
goes from that folder to new adapters that PEFT loads, and `configs/lora/dora_r4.yaml` from the base itself to a table.
Generators have the configured sizes, but for that of dora_r4, whose 0.8 billion values are for a GPU.

python scripts/bench_lora.py [--bases llama,qwen2] [--kinds lora,dora] [--json FILE]
"""

from __future__ import annotations

import json
import resource
import shutil
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import Parser, run_command, write_figures
from bench_adapters import measured
from bench_scale import alone

from rpg.options import default_config
from tokenization.errors import InputError

TASKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "backwards": ("write it backwards", lambda text: text[::-1]),
    "capitals": ("write it in capital letters", str.upper),
    "vowels": ("leave the vowels out", lambda text: "".join(each for each in text if each not in "aeiou")),
    "twice": ("write it twice", lambda text: text + text),
    "dashes": ("put dashes between the letters", "-".join),
}
UNSEEN = ("twice",)
ROWS, KEPT, SCORED = 96, 16, 4

BASES = {
    "llama": {"intermediate_size": 2048, "num_key_value_heads": 4, "vocab_size": 16000},
    "qwen2": {"intermediate_size": 2048, "num_key_value_heads": 2, "vocab_size": 16000},
}
SIZES = {"hidden_size": 768, "num_attention_heads": 12, "tie_word_embeddings": True}
BASELINES = "[nearest_seen, kernel_ridge, peft_linear, peft_svd, peft_ties, peft_dare_linear, peft_dare_ties]"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

SCORE = '''"""Loss of an adapter on the rows of its task, by PEFT alone."""
import json
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE, DATA, ZOO = {base!r}, {data!r}, {zoo!r}


@cache
def rows():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    found = {{}}
    table = [line.split(",") for line in Path(DATA, "conditions.csv").read_text().splitlines()[1:]]
    for name, text, _ in table:
        lines = [json.loads(line) for line in Path(DATA, name).read_text().splitlines()[-{kept}:]]
        ids = [tokenizer(each["prompt"] + each["completion"]).input_ids for each in lines]
        longest = max(map(len, ids))
        padded = torch.tensor([each + [tokenizer.pad_token_id] * (longest - len(each)) for each in ids])
        found[text] = padded, padded.where(padded != tokenizer.pad_token_id, -100)
    return found, json.loads(Path(ZOO, "zoo.json").read_text())["condition"]["names"]


def loss(path: Path, condition):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), path).eval()
    found, names = rows()
    ids, labels = found[names[int(condition[0])]]
    with torch.inference_mode():
        return {{"loss": model(ids, labels=labels).loss}}
'''


def make_base(kind: str, folder: Path, layers: int) -> int:
    """A base of random values and its tokenizer, one token a character; how many values it has."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    characters = ["<pad>", "<end>", *string.ascii_letters, " ", "-", "=", ":"]
    tokenizer = Tokenizer(WordLevel({each: place for place, each in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, **SIZES, **BASES[kind], **ends)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return sum(each.numel() for each in model.parameters())


def make_encoder(folder: Path) -> None:
    """A sentence encoder of random values: texts that share words get vectors that are alike."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({word for text, _ in TASKS.values() for word in text.split()})
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    BertModel(config).save_pretrained(folder)


def make_data(folder: Path) -> None:
    """One JSONL file a task, and the table of their texts and splits."""
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    letters = torch.randint(26, (ROWS, 6), generator=rng).tolist()
    texts = ["".join(string.ascii_lowercase[each] for each in row) for row in letters]
    lines = ["file,condition,split"]
    for name, (text, change) in TASKS.items():
        rows = [json.dumps({"prompt": f"{text}: {each}=", "completion": change(each) or "-"}) for each in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        lines.append(f"{name}.jsonl,{text},{'unseen' if name in UNSEEN else 'train'}")
    (folder / "conditions.csv").write_text("\n".join(lines) + "\n")


def fine_tune(base: Path, data: Path, output: Path, kind: str, steps: int) -> dict[str, Any]:
    """An adapter for each task, trained and saved by PEFT alone: the last loss of each, seconds, peak memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, started = AutoTokenizer.from_pretrained(base), time.perf_counter()
    losses: dict[str, float] = {}
    for name in TASKS:
        lines = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()[:-KEPT]]
        torch.manual_seed(len(losses))
        config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, use_dora=kind == "dora", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        for step in range(steps):
            rows = [lines[(4 * step + place) % len(lines)] for place in range(4)]
            batch = tokenizer([each["prompt"] + each["completion"] for each in rows], padding=True, return_tensors="pt")
            labels = batch.input_ids.where(batch.attention_mask.bool(), -100)
            loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = round(loss.item(), 3)
        model.save_pretrained(str(output / name))
    values = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return {"seconds": round(time.perf_counter() - started, 1), "values": values, "losses": losses, **peak()}


def load_by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    """PEFT loads an adapter: every tensor finds its place, and the base answers otherwise with it."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.arange(2, 26)[None]
    with torch.inference_mode():
        before = model(ids).logits
        adapted = PeftModel.from_pretrained(model, adapter)
        moved = (adapted(ids).logits - before).abs().max().item()
    stored, loaded = load_file(adapter / "adapter_model.safetensors"), get_peft_model_state_dict(adapted)
    if stored.keys() != loaded.keys() or not all(torch.equal(stored[name], loaded[name]) for name in stored):
        sys.exit(f"PEFT did not load {adapter} as it is")
    return {"tensors": len(stored), "largest change of a logit": round(moved, 4), **peak()}


def peak() -> dict[str, float]:
    """Peak resident memory of this process."""
    return {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}


def table_of(run: Path) -> dict[str, Any]:
    """Of each kind of networks the mean of the first figure and the median distances."""
    found = json.loads((run / "evaluation.json").read_text())
    first = next(iter(found["better"]), None)

    def middle(values: list[float]) -> float | None:
        return round(torch.tensor(values).median().item(), 3) if values else None

    return {
        kind: {
            "figure": first and round(each["summaries"][first]["mean"], 4), "distance": middle(each["distances"]),
            "own": middle(each["own_distances"]),
        }
        for kind, each in found["sets"].items()
    }  # fmt: skip


def sets(**values: object) -> list[str]:
    """Options that change fields; a double underscore stands for the point."""
    return [word for name, value in values.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]


def through_folder(
    base: Path, data: Path, folder: Path, kind: str, steps: dict[str, int], take: Any, whole: bool
) -> None:
    """From PEFT's folders to new ones, by configs/lora/folder.yaml."""
    config, zoo, run, new = default_config("lora/folder.yaml"), folder / "zoo", folder / "run", folder / "new"
    take("fine-tune", alone(fine_tune, base, data, folder / "adapters", kind, steps["tune"]))
    lines = (data / "conditions.csv").read_text().replace(".jsonl", "")
    (folder / "adapters" / "conditions.csv").write_text(lines)
    table = ("--conditions", folder / "adapters" / "conditions.csv", "--condition", "text")
    take("collect", measured("collect", "--from", folder / "adapters", *table, "--zoo", zoo))
    changes = sets(
        run=run, zoo=zoo, model__condition__encoder=folder.parent / "encoder", tokens__rank=3,
        train__steps=steps["train"], evaluate__num=2, evaluate__num_baseline=2, evaluate__baselines=BASELINES,
    )  # fmt: skip
    if whole:
        take("lora", measured("lora", config, *changes))
    else:
        take("train", measured("train", config, *changes))
        take("evaluate", measured("evaluate", run))
    take("table by weights", table_of(run))
    text = TASKS[UNSEEN[0]][0]
    take("generate", measured("generate", run, "--prompt", text, "--num", 1, "--output", new))
    (folder / "score.py").write_text(SCORE.format(base=str(base), data=str(data), zoo=str(zoo), kept=SCORED))
    take("evaluate --score", measured("evaluate", run, "--score", f"{folder / 'score.py'}:loss"))
    take("table by loss", table_of(run))
    take("export", measured("export", new / "network-00000", "--to", "peft", "--output", folder / "exported"))
    take("PEFT loads it", alone(load_by_peft, base, folder / "exported"))


def through_task(base: Path, data: Path, folder: Path, steps: dict[str, int], take: Any) -> None:
    """From the base to a table, by configs/lora/dora_r4.yaml: the checkpoints of one fine-tuning."""
    config, own, run = default_config("lora/dora_r4.yaml"), folder / "task", folder / "dora_r4"
    own.mkdir()
    shutil.copy(data / "backwards.jsonl", own)
    changes = sets(
        run=run, zoo=folder / "dora_r4_zoo", task__base=base, task__data=own, task__training__steps=steps["tune"],
        task__training__checkpoints=4, task__training__tail=0.5, task__training__batch_size=4,
        task__rows="{validation: 8, test: 16, max_tokens: 64}",
        model__backbone="{kind: mamba2, d_model: 256, num_layers: 2}",
        model__denoiser="{kind: mlp, width: 256, hidden: 256}", tokens__size=4096, train__optimizer="adamw",
        train__steps=steps["train"], train__tokens=128, train__batch_size=4, generate__steps=20,
        evaluate__num=2, evaluate__num_baseline=2, evaluate__baselines=BASELINES,
    )  # fmt: skip
    take("lora dora_r4", measured("lora", config, *changes))
    take("table of dora_r4", table_of(run))


def main() -> None:
    """Make the bases, run the commands, print the figures and, if asked for, write them as JSON."""
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_lora"))
    parser.add_argument("--bases", default="llama,qwen2")
    parser.add_argument("--kinds", default="lora,dora")
    parser.add_argument("--layers", type=int, default=12, help="of the bases")
    parser.add_argument("--tune", type=int, default=12, help="steps of every fine-tuning")
    parser.add_argument("--steps", type=int, default=60, help="steps of every generator")
    arguments = parser.parse_args()
    bases, kinds = arguments.bases.split(","), arguments.kinds.split(",")
    for chosen, known in ((bases, list(BASES)), (kinds, ["lora", "dora"])):
        if unknown := set(chosen) - set(known):
            raise InputError(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    steps, folder, results = {"tune": arguments.tune, "train": arguments.steps}, arguments.folder.resolve(), {}
    shutil.rmtree(folder, ignore_errors=True)
    make_data(folder / "data")
    alone(make_encoder, folder / "encoder")
    for name in bases:
        base = folder / f"base-{name}"
        values = alone(make_base, name, base, arguments.layers)
        print(f"{name}: {values:,} values", flush=True)
        for kind in kinds:
            figures: dict[str, Any] = {}
            results[f"{name} {kind}"] = {"values": values, **figures}

            def take(what: str, found: Any, where: str = f"{name} {kind}") -> None:
                results[where][what] = found
                print(f"{where}: {what:20}", json.dumps(found), flush=True)
                write_figures(arguments.json, results)

            place = folder / f"{name}-{kind}"
            place.mkdir()
            through_folder(base, folder / "data", place, kind, steps, take, whole=len(results) == 1)
            if kind == "dora":
                through_task(base, folder / "data", place, steps, take)
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_command(main)
