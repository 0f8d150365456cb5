"""Time adapters of a 7 B Llama's shapes through every command: DoRA r=64 on q, k, v, up, down; random values.

Each command runs in a process of its own; its peak memory is what the system says of it. At last PEFT alone loads the
exported adapter into a base of zeros.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _common import Parser, run_command, write_figures
from safetensors.torch import save_file

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SPREAD = {"lora_A": 0.01, "lora_B": 0.005, "lora_magnitude_vector": 0.05}


def empty_base(layers: int) -> Any:
    """A Llama of 7 B values, none of which exists."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def make_sources(folder: Path, num: int, layers: int, rank: int) -> int:
    """Write ``num`` adapters as PEFT writes them, bf16; returns how many values one has."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM")
    config.base_model_name_or_path = "llama-7b"
    names = get_peft_model_state_dict(get_peft_model(empty_base(layers), config, low_cpu_mem_usage=True))
    config.inference_mode = True
    for index in range(num):
        generator = torch.Generator().manual_seed(index)
        state = {}
        for name, like in names.items():
            kind = next(kind for kind in SPREAD if kind in name)
            values = torch.randn(like.shape, generator=generator) * SPREAD[kind]
            state[name] = (values + (kind == "lora_magnitude_vector")).bfloat16()
        target = folder / f"adapter{index}"
        target.mkdir(parents=True)
        config.save_pretrained(str(target))
        save_file(state, target / "adapter_model.safetensors", {"format": "pt"})
    return sum(like.numel() for like in names.values())


def measured(*arguments: object) -> dict[str, float]:
    """Run ``rpg``; seconds by the clock and of the processor, and peak resident memory in GiB."""
    command = [sys.executable, "-m", "rpg.cli", *map(str, arguments)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def load_by_peft(adapter: Path, layers: int) -> dict[str, float]:
    """Load a generated adapter into a base of zeros; every tensor of it must find its place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    base = empty_base(layers)
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):  # one zero, seen in every place
            zeros = torch.zeros(1, dtype=torch.bfloat16).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False))
    network = PeftModel.from_pretrained(base, str(adapter), low_cpu_mem_usage=True)
    loaded, stored = get_peft_model_state_dict(network), load_file(adapter / "adapter_model.safetensors")
    for name, tensor in stored.items():
        if not torch.equal(loaded[name].to(tensor.dtype), tensor):
            sys.exit(f"{name} was not loaded")
    if loaded.keys() != stored.keys():
        sys.exit("the adapter's tensors are not those of the base")
    return {"tensors": len(stored), "values": sum(tensor.numel() for tensor in stored.values())}


def main() -> None:
    """Make the zoo, run the commands, print a table and, if asked for, JSON."""
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_adapters"))
    parser.add_argument("--num", type=int, default=4, help="adapters in the zoo")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--form", default="aligned", help="tokens.lora_canonical")
    arguments = parser.parse_args()
    folder = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    num_values = make_sources(folder / "adapters", arguments.num, arguments.layers, arguments.rank)
    config = Path(__file__).parent.parent / "configs" / "large" / "base.yaml"
    changes = {
        "zoo": folder / "zoo", "run": folder / "run", "tokens.size": 16384, "tokens.lora_canonical": arguments.form,
        "train.steps": arguments.steps, "train.batch_size": 2, "train.tokens": 512, "generate.steps": 4,
    }  # fmt: skip
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    results: dict[str, Any] = {"adapters": arguments.num, "values": num_values}
    print(f"{arguments.num} adapters of {num_values:,} values", flush=True)
    commands: dict[str, tuple[object, ...]] = {
        "collect": ("collect", "--from", folder / "adapters", "--zoo", folder / "zoo"),
        "verify": ("inspect", folder / "zoo", "--verify", *overrides[4:8]),
        "train": ("train", config, *overrides),
        "generate": ("generate", folder / "run", "--num", 1, "--output", folder / "new"),
        "export": ("export", folder / "new" / "network-00000", "--to", "peft", "--output", folder / "exported"),
    }
    for name, command in commands.items():
        results[name] = measured(*command)
        print(f"{name:9}", *(f"{key} {value:>8}" for key, value in results[name].items()), flush=True)
    results["loaded"] = load_by_peft(folder / "exported", arguments.layers)
    print("loaded by PEFT:", results["loaded"])
    write_figures(arguments.json, results)
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_command(main)
