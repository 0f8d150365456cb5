"""Adapters of a base of Qwen2-0.5B's shapes (494 million random values) through every command.

A base of random values learns nothing that would be of use: what is measured are seconds and memory. PEFT fine-tunes
three adapters that are described by texts, `configs/lora/folder.yaml` goes from their folder to a new one; and
`configs/lora/dora_r4.yaml`, `dora_r16.yaml` and `dora_r64.yaml` go from the base itself to new adapters, with a
generator whose backbone and denoiser are narrow: the paper's have 0.8 to 2.5 billion values, for a GPU.

python scripts/bench_dora.py [--ranks 4 16 64] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _common import Figures, Parser, measured, run_command, run_rpg, work_folder

CONFIGS = Path(__file__).parent.parent / "configs" / "lora"
TASKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "backwards": ("write it backwards", lambda text: text[::-1]),
    "capitals": ("write it in capital letters", str.upper),
    "twice": ("write it twice", lambda text: text + text),
}
UNSEEN = "twice"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ROWS, TUNING_STEPS = 40, 1


def make_base(folder: Path, encoder: Path) -> dict[str, float]:
    """A base of random values, a tokenizer of one token a character, and a sentence encoder of random values."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, PreTrainedTokenizerFast

    characters = ["<pad>", "<end>", *string.ascii_letters, " ", "-", "=", ":"]
    words = ["[PAD]", "[UNK]", *sorted({word for text, _ in TASKS.values() for word in text.split()})]
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **heads, **ends))
    bert = BertModel(BertConfig(vocab_size=len(words), hidden_size=384, num_hidden_layers=6, intermediate_size=1536))
    for model, place, tokens, split, unknown, special in (
        (base, folder, characters, pre_tokenizers.Split(Regex("."), "isolated"), "<pad>", ("<pad>", "<end>")),
        (bert, encoder, words, pre_tokenizers.Whitespace(), "[UNK]", ("[PAD]", None)),
    ):
        tokenizer = Tokenizer(models.WordLevel({each: i for i, each in enumerate(tokens)}, unk_token=unknown))
        tokenizer.pre_tokenizer = split
        model.save_pretrained(place)
        pad, end = special
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown
        ).save_pretrained(place)
    return {"values": sum(each.numel() for each in base.parameters())}


def make_data(folder: Path) -> None:
    """One JSONL file a task."""
    folder.mkdir(parents=True)
    letters = torch.randint(26, (ROWS, 6), generator=torch.Generator().manual_seed(0)).tolist()
    texts = ["".join(string.ascii_lowercase[each] for each in row) for row in letters]
    for name, (text, change) in TASKS.items():
        rows = [json.dumps({"prompt": f"{text}: {each}=", "completion": change(each) or "-"}) for each in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def fine_tune(base: Path, data: Path, output: Path) -> dict[str, float]:
    """An adapter of rank 16 for each task, trained and saved by PEFT alone, and the table of their texts."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, lines = AutoTokenizer.from_pretrained(base), ["file,condition,split"]
    for seed, (name, (text, _)) in enumerate(TASKS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for step in range(TUNING_STEPS):
            chosen = [row["prompt"] + row["completion"] for row in rows[2 * step :][:2]]
            batch = tokenizer(chosen, padding=True, return_tensors="pt")
            labels = batch.input_ids.where(batch.attention_mask.bool(), -100)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(str(output / name))
        lines.append(f"{name},{text},{'unseen' if name == UNSEEN else 'train'}")
    (output / "conditions.csv").write_text("\n".join(lines) + "\n")
    return {"values of an adapter": sum(each.numel() for each in model.parameters() if each.requires_grad)}


def load_and_merge(base: Path, adapter: Path) -> dict[str, float]:
    """PEFT loads an adapter, every tensor as stored, and merges it: the merged model answers alike."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.arange(2, 26)[None]
    with torch.inference_mode():
        before = model(ids).logits
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        stored, loaded = load_file(adapter / "adapter_model.safetensors"), get_peft_model_state_dict(adapted)
        if stored.keys() != loaded.keys() or not all(torch.equal(stored[name], loaded[name]) for name in stored):
            sys.exit(f"PEFT did not load {adapter} as it is")
        answers = adapted(ids).logits
        merged = adapted.merge_and_unload()(ids).logits
    largest = answers.abs().max().item()
    return {
        "tensors": len(stored),
        "a logit moves by": round((answers - before).abs().max().item(), 4),
        "merged differs by, of the largest": round((merged - answers).abs().max().item() / largest, 7),
    }


def sets(**values: object) -> list[str]:
    """Options that change fields; a double underscore stands for the point."""
    return [word for name, value in values.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]


def main() -> None:
    """Make the base, run the commands."""
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16, 64])
    arguments = parser.parse_args()
    figures = Figures(arguments.json)
    with work_folder(arguments.folder) as folder:
        base, encoder, data, adapters = (folder / name for name in ("base", "encoder", "data", "adapters"))
        if not base.exists():
            figures.take("base", **measured(make_base, base, encoder))
        if not data.exists():
            make_data(data)
        figures.take("folder", "PEFT trains three", **measured(fine_tune, base, data, adapters))
        zoo, run, new = folder / "zoo", folder / "run", folder / "new"
        table = ("--conditions", adapters / "conditions.csv", "--condition", "text")
        figures.take("folder", "collect", **run_rpg("collect", "--from", adapters, *table, "--zoo", zoo))
        changes = sets(run=run, zoo=zoo, model__condition__encoder=encoder, tokens__rank=1, train__steps=20)
        figures.take("folder", "train", **run_rpg("train", CONFIGS / "folder.yaml", *changes))
        asked = ("--prompt", TASKS[UNSEEN][0], "--num", 1, "--output", new)
        figures.take("folder", "generate", **run_rpg("generate", run, *asked))
        figures.take("folder", "PEFT loads, merges", **measured(load_and_merge, base, new / "network-00000"))
        for rank in arguments.ranks:
            name = f"dora_r{rank}"
            zoo, run, new = (folder / f"{name}-{each}" for each in ("zoo", "run", "new"))
            (folder / name).mkdir()
            (folder / name / "backwards.jsonl").write_text((data / "backwards.jsonl").read_text())
            changes = sets(
                run=run, zoo=zoo, task__base=base, task__data=folder / name, task__training__steps=2,
                task__training__checkpoints=2, task__training__tail=1.0, task__training__batch_size=2,
                task__rows="{validation: 4, test: 8, max_tokens: 64}", model__backbone__d_model=256,
                model__backbone__widths="null", model__denoiser__channels=[1, 4, 8, 4, 1],
                train__optimizer="adamw", train__steps=3, train__batch_size=2, train__tokens=32,
                generate__sampler="ddim", generate__steps=10, generate__tile_tokens=64,
            )  # fmt: skip
            config = CONFIGS / f"{name}.yaml"
            for command in ("collect", "train"):
                figures.take(name, command, **run_rpg(command, config, *changes))
            figures.take(name, "generate", **run_rpg("generate", run, "--num", 1, "--output", new))
            figures.take(name, "PEFT loads, merges", **measured(load_and_merge, base, new / "network-00000"))


if __name__ == "__main__":
    run_command(main)
