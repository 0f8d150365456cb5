"""Exported weights load with the ecosystem's own loaders and compute what the checkpoint's network computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from rpg.generation.export import export
from rpg.generation.generator import Generator
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config, small_network
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.rows import CheckpointWriter
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo

TOKENS = torch.arange(12)[None] % 40


def generated(zoo: Zoo, path: Path, index: int = 0) -> Path:
    """A checkpoint through tokens, written as a generator writes it, with values unlike any in the zoo."""
    layout = TokenLayout.fit(zoo, TokenOptions(size=64))
    tokens = layout.encode(zoo.checkpoint(index)) * 1.5
    with CheckpointWriter(path, layout, {"rpg.provenance": json.dumps({"seed": 3})}) as writer:
        writer.write(0, tokens)
    return path


def close(network: nn.Module, reference: nn.Module, *inputs: Tensor) -> bool:
    """Whether two networks compute the same to 1e-5."""
    with torch.no_grad():
        left, right = network.eval()(*inputs), reference.eval()(*inputs)
    left, right = (out if isinstance(out, Tensor) else out[0] for out in (left, right))
    assert torch.isfinite(left).all() and left.std() > 0
    return torch.allclose(left, right, atol=1e-5, rtol=1e-5)


# --- timm and torch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    zoo = Zoo.create(folder / "zoo")
    for seed in range(2):
        torch.manual_seed(seed)
        zoo.append(timm.create_model("test_resnet", num_classes=7).state_dict(), run=0, step=seed)
    return generated(zoo, folder / "network.safetensors")


def test_timm_creates_the_network_from_the_file(timm_file: Path, tmp_path: Path) -> None:
    output = export(timm_file, "timm", tmp_path / "net.safetensors")
    reference = timm.create_model("test_resnet", num_classes=7)
    reference.load_state_dict(Checkpoint.open(timm_file).state_dict())
    network = timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(output))
    assert close(network, reference, torch.randn(2, 3, 64, 64))
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["rpg.provenance"]) == {"seed": 3}


def test_torch_loads_the_pickle_without_running_code(timm_file: Path, tmp_path: Path) -> None:
    output = export(timm_file, "torch", tmp_path / "net.pth")
    state = torch.load(output, weights_only=True)
    stored = Checkpoint.open(timm_file).state_dict()
    assert list(state) == list(stored) and all(torch.equal(state[name], stored[name]) for name in stored)
    network = timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(output))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in network.state_dict().items())


def test_ties_are_written_out_for_loaders_that_know_none(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    save_checkpoint(tmp_path / "tied.safetensors", {"a": weight, "z": torch.ones(2), "b": weight})
    output = export(tmp_path / "tied.safetensors", "timm", tmp_path / "out.safetensors")
    with safe_open(output, "pt") as file:
        assert sorted(file.keys()) == ["a", "b", "z"] and torch.equal(file.get_tensor("b"), weight)


# --- transformers -----------------------------------------------------------------------------------------------


def tiny(kind: str, seed: int, **options: object) -> nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(seed)
    if kind == "gpt2":
        config: object = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, **options)
    else:
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, **options,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("saved_by", ["save_pretrained", "state_dict"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_loads_the_folder(kind: str, saved_by: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    networks = [tiny(kind, seed) for seed in range(2)]
    for seed, network in enumerate(networks):
        network.save_pretrained(tmp_path / "mine" / str(seed))
    if saved_by == "save_pretrained":
        zoo = collect_from(tmp_path / "mine", tmp_path / "zoo")
    else:  # every key, the tied head included
        zoo = Zoo.create(tmp_path / "zoo")
        for network in networks:
            zoo.append(network.state_dict(), run=0, step=0)
    base = tmp_path / "mine" / "0"
    (base / "tokenizer.json").write_text("{}")
    (base / "modeling_own.py").write_text("print('code')")
    file = generated(zoo, tmp_path / "network.safetensors")
    output = export(file, "transformers", tmp_path / "net", base=base)
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names and "modeling_own.py" not in names
    loaded, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    reference = tiny(kind, 9)
    reference.load_state_dict(Checkpoint.open(file).state_dict(), strict=False)
    assert close(loaded, reference, TOKENS) and not close(loaded, networks[0], TOKENS)


def test_a_base_of_another_structure_is_named(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    zoo.append(tiny("gpt2", 0).state_dict(), run=0, step=0)
    tiny("llama", 0).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="is missing, and .* has one of shape"):
        export(zoo.file(0), "transformers", tmp_path / "net", base=tmp_path / "base")
    with pytest.raises(InputError, match="--base is missing"):
        export(zoo.file(0), "transformers", tmp_path / "net")
    with pytest.raises(InputError, match=r"no config\.json"):
        export(zoo.file(0), "transformers", tmp_path / "net", base=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "zoo"]


# --- PEFT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_peft_loads_the_adapter(use_dora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    tiny("llama", 0).save_pretrained(tmp_path / "base")
    for seed in range(2):
        options = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=use_dora)
        adapted = get_peft_model(tiny("llama", 0), options)
        torch.manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data += 0.2 * torch.rand_like(parameter)
        adapted.save_pretrained(tmp_path / "mine" / str(seed))
    zoo = collect_from(tmp_path / "mine", tmp_path / "zoo")
    file = generated(zoo, tmp_path / "network.safetensors")
    output = export(file, "peft", tmp_path / "adapter", base=tmp_path / "zoo")
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(tiny("llama", 0), output)
    reference = get_peft_model(tiny("llama", 0), options)
    state = {
        name.replace(".weight", ".default.weight") if "magnitude" not in name else f"{name}.default.weight": tensor
        for name, tensor in Checkpoint.open(file).state_dict().items()
    }
    assert not reference.load_state_dict(state, strict=False).unexpected_keys
    assert close(loaded, reference, TOKENS) and not close(loaded, tiny("llama", 0), TOKENS)


def test_weights_that_are_no_adapter_are_named(timm_file: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(InputError, match="no lora_A or lora_B tensor"):
        export(timm_file, "peft", tmp_path / "adapter", base=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


# --- the network that weights are meant for -----------------------------------------------------------------------


def test_transformers_weights_under_other_names_are_refused(tmp_path: Path) -> None:
    """A compiled network's names: transformers would draw every tensor at random and say nothing of it."""
    network = tiny("gpt2", 0)
    network.config.architectures = ["GPT2LMHeadModel"]
    network.config.save_pretrained(tmp_path / "base")
    save_checkpoint(tmp_path / "a.safetensors", {f"x.{n}": t.clone() for n, t in network.state_dict().items()})
    with pytest.raises(InputError, match=r"tensor 'transformer.wte.weight' is missing, and the GPT2LMHeadModel"):
        export(tmp_path / "a.safetensors", "transformers", tmp_path / "net", base=tmp_path / "base")
    save_checkpoint(tmp_path / "b.safetensors", {**network.state_dict(), "more": torch.ones(2)})
    with pytest.raises(InputError, match="tensor 'more' is not in the GPT2LMHeadModel"):
        export(tmp_path / "b.safetensors", "transformers", tmp_path / "net", base=tmp_path / "base")
    assert not (tmp_path / "net").exists()


def test_a_configuration_without_a_class_takes_the_one_that_fits(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **sizes)
    config.save_pretrained(tmp_path / "base")
    state = BertForSequenceClassification(config).state_dict()
    save_checkpoint(tmp_path / "a.safetensors", state)
    export(tmp_path / "a.safetensors", "transformers", tmp_path / "net", base=tmp_path / "base")
    loaded, report = BertForSequenceClassification.from_pretrained(tmp_path / "net", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.classifier.weight, state["classifier.weight"])
    save_checkpoint(tmp_path / "b.safetensors", {**state, "classifier.weight": torch.ones(3, 9)})
    with pytest.raises(InputError, match=r"tensor 'classifier.weight' has shape \[3, 9\], but \[3, 8\]"):
        export(tmp_path / "b.safetensors", "transformers", tmp_path / "other", base=tmp_path / "base")


def test_timm_weights_are_compared_with_the_network_that_is_named(timm_file: Path, tmp_path: Path) -> None:
    said: list[str] = []
    export(timm_file, "timm", tmp_path / "a.safetensors", base="test_resnet", say=said.append)
    assert not said
    with pytest.raises(InputError, match="is missing, and timm's resnet18 has one of shape"):
        export(timm_file, "timm", tmp_path / "b.safetensors", base="resnet18")
    with pytest.raises(InputError, match="--base resnot18 is not a network that timm builds"):
        export(timm_file, "timm", tmp_path / "b.safetensors", base="resnot18")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_without_an_output_it_is_written_beside_the_source(timm_file: Path) -> None:
    said: list[str] = []
    output = export(timm_file, "timm", say=said.append)
    assert output == timm_file.with_name("network-timm.safetensors") and output.is_file()
    assert len(said) == 1 and "--base" in said[0]
    output.unlink()


def test_torch_and_lightning_take_the_user_s_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))\n\n"
        "class Lit(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.model = build()\n"
    )
    state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    save_checkpoint(tmp_path / "a.safetensors", state)
    export(tmp_path / "a.safetensors", "torch", tmp_path / "a.pth", base=f"{tmp_path}/mine.py:build")
    with pytest.raises(InputError, match="tensor 'model.0.weight' is missing"):
        export(tmp_path / "a.safetensors", "torch", tmp_path / "b.pth", base=f"{tmp_path}/mine.py:Lit")
    output = export(tmp_path / "a.safetensors", "lightning", base=f"{tmp_path}/mine.py:Lit")
    written = torch.load(output, weights_only=True)
    assert output.suffix == ".ckpt" and list(written["state_dict"]) == [f"model.{name}" for name in state]


def test_lightning_keeps_the_settings_of_an_original(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    original = {"state_dict": {f"net.{n}": t + 1 for n, t in state.items()}, "hyper_parameters": {"width": 3}}
    original |= {"epoch": 4, "global_step": 9, "pytorch-lightning_version": "2.4.0", "optimizer_states": [{}]}
    torch.save(original, tmp_path / "last.ckpt")
    save_checkpoint(tmp_path / "a.safetensors", state)
    output = export(tmp_path / "a.safetensors", "lightning", tmp_path / "new.ckpt", base=tmp_path / "last.ckpt")
    written = torch.load(output, weights_only=True)
    assert written["hyper_parameters"] == {"width": 3} and "optimizer_states" not in written
    assert torch.equal(written["state_dict"]["net.weight"], state["weight"])
    save_checkpoint(tmp_path / "b.safetensors", nn.Linear(4, 2).state_dict())
    with pytest.raises(InputError, match="tensor 'net.weight'"):
        export(tmp_path / "b.safetensors", "lightning", tmp_path / "b.ckpt", base=tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="--base is missing"):
        export(tmp_path / "b.safetensors", "lightning", tmp_path / "b.ckpt")


def test_an_adapter_is_compared_with_its_base_where_that_is_at_hand(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny("llama", 0).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tiny("llama", 0), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    said: list[str] = []
    export(tmp_path / "adapter", "peft", tmp_path / "new", say=said.append)
    assert not said
    state = Checkpoint.open(tmp_path / "adapter").state_dict()
    fewer = {name: tensor for name, tensor in state.items() if "v_proj" not in name}
    save_checkpoint(tmp_path / "adapter" / "adapter_model.safetensors", fewer)
    with pytest.raises(InputError, match=r"v_proj.*is missing"):
        export(tmp_path / "adapter", "peft", tmp_path / "other")


def test_a_condition_may_be_made_for_the_generator(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo", condition_size=2)
    folder = train(
        small_config(tmp_path, model={"condition": {"kind": "binary"}}, train={"steps": 2}), say=lambda _: None
    )
    output = export(tmp_path / "run", "torch", seed=5, condition=lambda generator: [1.0] * generator.condition.size)
    assert output == tmp_path / "run" / "exported-torch.pth"
    expected = Generator.from_pretrained(folder).generate(1, seed=5, condition=[1.0, 1.0])[0]
    stored = torch.load(output, weights_only=True)
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    with pytest.raises(InputError, match="takes no condition and no initial weights"):
        export(tmp_path / "zoo" / "checkpoints" / "000000.safetensors", "torch", tmp_path / "x.pth", condition=[1.0])


# --- generators and mistakes --------------------------------------------------------------------------------------


def test_a_generator_and_a_seed_give_what_generate_gives(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    folder = train(small_config(tmp_path, train={"steps": 2}), say=lambda _: None)
    before = sorted(path.name for path in tmp_path.iterdir())
    output = export(tmp_path / "run", "timm", tmp_path / "net.safetensors", seed=5)
    expected = Generator.from_pretrained(folder).generate(1, seed=5)[0]
    stored = Checkpoint.open(output).state_dict()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    small_network().load_state_dict(stored)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "net.safetensors"])


@pytest.mark.parametrize(
    ("to", "name", "expected"),
    [
        ("onnx", "net", "one of timm, transformers, peft, lightning, torch"),
        ("timm", "net.pth", "ends with .safetensors"),
        ("torch", "net.safetensors", "ends with .pth"),
        ("timm", "none/net.safetensors", "which is not a folder"),
        ("timm", "there.safetensors", "already exists"),
        ("peft", "full", "already exists"),
    ],
)
def test_mistakes_leave_nothing_behind(timm_file: Path, tmp_path: Path, to: str, name: str, expected: str) -> None:
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(InputError, match=expected) as caught:
        export(timm_file, to, tmp_path / name, base=tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "there.safetensors"]
