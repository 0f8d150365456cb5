"""Adapters of a 7 B Llama's shapes through every command, DoRA r=64 on q, k, v, up, down; and what was learned of them.

The zoo has a structure that is known: adapters lie in a random space of ten dimensions, the same for all their values,
with noise on top. Generated ones are to lie in that space, too; the adapters themselves do so but for their noise.

Each command runs in a process of its own; its peak memory is what the system says of it. At last PEFT alone loads the
exported adapter into a base of zeros.

python scripts/bench_adapters.py [--json FILE]
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import Figures, Parser, alone, measured, run_command, run_rpg
from torch import Tensor

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.seeding import make_rng
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.layouts import fit_layout
from tokenization.zoo.zoo import Zoo

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SPREAD = {"lora_A": 0.01, "lora_B": 0.005, "lora_magnitude_vector": 0.05}
"""By kind of tensor: what an adapter differs from their common start by, the noise apart."""

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG = Path(__file__).parent.parent / "configs" / "large" / "base.yaml"


@dataclass(frozen=True)
class Structure:
    """How adapters are made: a common start, ``codes`` times the directions of each tensor, noise.

    Attributes:
        num: n adapters.
        dimensions: k of the space that they lie in.
        noise: standard deviation of the noise, in that of what lies in the space.
    """

    num: int
    dimensions: int
    noise: float

    @property
    def codes(self) -> Tensor:
        """Where each adapter lies in the space, ``[n, k]``, each row of length 1 on average."""
        return torch.randn(self.num, self.dimensions, generator=make_rng(0, "codes")) / self.dimensions**0.5

    def directions(self, name: str, num_values: int) -> Tensor:
        """What each dimension does to the values of a tensor, ``[k, P]``, in units of the tensor's spread."""
        return torch.randn(self.dimensions, num_values, generator=make_rng(0, "directions", name))

    def adapters(self, name: str, num_values: int) -> Tensor:
        """The values of a tensor in every adapter, ``[n, P]``."""
        spread, rng = spread_of(name), make_rng(0, "values", name)
        start = torch.randn(num_values, generator=rng) + (1 / spread if "magnitude" in name else 0)
        values = torch.addmm(start.expand(self.num, -1), self.codes, self.directions(name, num_values))
        for row in values:
            row.add_(torch.randn(num_values, generator=rng), alpha=self.noise)
        return values.mul_(spread)


def spread_of(name: str) -> float:
    """That of the tensor's kind."""
    return next(spread for kind, spread in SPREAD.items() if kind in name)


def empty_base(layers: int) -> Any:
    """A Llama of 7 B values, none of which exists."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def make_sources(folder: Path, structure: Structure, layers: int, rank: int) -> int:
    """Write adapters as PEFT writes them, bf16, tensor by tensor; returns how many values one has."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, use_dora=True, task_type="CAUSAL_LM")
    config.base_model_name_or_path = "llama-7b"
    like = get_peft_model_state_dict(get_peft_model(empty_base(layers), config, low_cpu_mem_usage=True))
    config.inference_mode = True
    specs = {name: (torch.bfloat16, tuple(each.shape)) for name, each in like.items()}
    with contextlib.ExitStack() as stack:
        files = []
        for number in range(structure.num):
            target = folder / f"adapter{number:02d}"
            target.mkdir(parents=True)
            config.save_pretrained(str(target))
            files.append(stack.enter_context(TensorFile(target / ADAPTER_FILE, specs, {"format": "pt"})))
        for name, each in like.items():
            for file, values in zip(files, structure.adapters(name, each.numel()), strict=True):
                file.write(name, 0, values.bfloat16())
    return sum(each.numel() for each in like.values())


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


def fit(config: Config) -> dict[str, float]:
    """Statistics and directions of the zoo, into its cache."""
    return {"tokens": fit_layout(Zoo.open(config.zoo), config.tokens).num_tokens}


def generate(run: Path, output: Path) -> None:
    """One adapter into a folder, loading included."""
    Generator.from_pretrained(run).generate(1, seed=1, output=output)


def measure_truth(run: Path, adapters: Path, structure: Structure, num: int) -> dict[str, dict[str, float]]:
    """How generated adapters lie in the space that the zoo was made in; with stored states, whether they are the asked.

    Deviations from the zoo's mean count in units of each kind's spread. ``share_in_span`` is the part of their squared
    length inside the space of k dimensions, one for the whole adapter; ``spread`` their length in that of the zoo's own
    without noise; ``cosine`` that with the asked adapter, ``cosine_truth`` with what it would be without noise.
    """
    generator = Generator.from_pretrained(run)
    asked = generator.asked(num, 0)
    made: dict[str, Any] = {each: generator.generate(num, seed=0, state=each) for each in ("stored", "gaussian")}
    zoo = [Checkpoint.open(path) for path in sorted(adapters.glob(f"*/{ADAPTER_FILE}"))]
    codes = structure.codes - structure.codes.mean(0)
    kinds: dict[str, Any] = {"adapters": zoo[:num], **made}
    sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    gram = torch.zeros(structure.dimensions, structure.dimensions, dtype=torch.float64)
    for name in made["stored"][0]:
        rows = torch.stack([each.flat(name).float() for each in zoo]) / spread_of(name)
        mean = rows.mean(0)
        directions = structure.directions(name, len(mean))
        gram += (directions @ directions.T).double()
        for kind, networks in kinds.items():
            flat = [each.flat(name) if isinstance(each, Checkpoint) else each[name].flatten() for each in networks]
            deviations = torch.stack(flat).float() / spread_of(name) - mean
            of = rows[asked] - mean if kind == "stored" else deviations
            found = {
                "squares": deviations.square().sum(1), "inside": deviations @ directions.T,
                "asked": (deviations * of).sum(1), "asked_squares": of.square().sum(1),
            }  # fmt: skip
            for key, value in found.items():
                sums[kind][key] = sums[kind].get(key, 0) + value.double()
    true_squares = ((codes.double() @ gram) * codes).sum(1)  # [n]
    figures: dict[str, dict[str, float]] = {}
    for kind, each in sums.items():
        inside = (each["inside"] * torch.linalg.solve(gram, each["inside"].T).T).sum(1)
        figures[kind] = {
            "share_in_span": round(float((inside / each["squares"]).mean()), 4),
            "spread": round(float((each["squares"].mean() / true_squares.mean()).sqrt()), 3),
        }
    each, own = sums["stored"], codes[asked].double()
    cosine = each["asked"] / (each["squares"] * each["asked_squares"]).sqrt()
    truth = (each["inside"] * own).sum(1) / (each["squares"] * true_squares[asked]).sqrt()
    figures["stored"] |= {"cosine": round(float(cosine.mean()), 4), "cosine_truth": round(float(truth.mean()), 4)}
    return figures


def main() -> None:
    """Make the zoo, run the commands, print a table and, if asked for, JSON."""
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--num", type=int, default=24, help="adapters in the zoo")
    parser.add_argument("--dimensions", type=int, default=10, help="of the space that they lie in")
    parser.add_argument("--noise", type=float, default=0.4, help="beside it, in the spread inside it")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--form", default="none", help="tokens.lora_canonical: these have one start, and need no form")
    parser.add_argument("--verify", action="store_true", help="run rpg inspect --verify, too, which takes minutes")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("runs/bench_adapters")
    shutil.rmtree(folder, ignore_errors=True)
    structure = Structure(arguments.num, arguments.dimensions, arguments.noise)
    num_values = make_sources(folder / "adapters", structure, arguments.layers, arguments.rank)
    changes = [
        f"zoo={folder / 'zoo'}", f"run={folder / 'run'}", f"tokens.lora_canonical={arguments.form}",
        f"tokens.rank={arguments.dimensions}", f"model.state.width={arguments.dimensions}",
        f"train.steps={arguments.steps}",
    ]  # fmt: skip
    overrides = [part for change in changes for part in ("--set", change)]
    figures = Figures(arguments.json, adapters=arguments.num, values=num_values, noise=arguments.noise)
    print(f"{arguments.num} adapters of {num_values:,} values", flush=True)
    zoo, run, new = folder / "zoo", folder / "run", folder / "new"
    figures.take("collect", **run_rpg("collect", "--from", folder / "adapters", "--zoo", zoo))
    if arguments.verify:
        figures.take("verify", **run_rpg("inspect", zoo, "--verify", *overrides[4:8]))
    figures.take("fit", **measured(fit, Config.load(CONFIG, changes)))
    figures.take("train", **run_rpg("train", CONFIG, *overrides))
    facts = Generator.from_pretrained(run).facts
    figures.take("train", training_seconds=facts["training seconds"], parameters=facts["parameters"])
    figures.take("generate", **run_rpg("generate", run, "--num", 1, "--output", new))
    figures.take("generate alone", **measured(generate, run, folder / "another"))
    figures.take("truth", **alone(measure_truth, run, folder / "adapters", structure, 4))
    adapter = new / "network-00000"
    figures.take("export", **run_rpg("export", adapter, "--to", "peft", "--output", folder / "exported"))
    figures.take("loaded", **load_by_peft(folder / "exported", arguments.layers))
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_command(main)
