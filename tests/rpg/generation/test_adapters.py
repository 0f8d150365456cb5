"""From a folder of PEFT adapters to new ones that PEFT loads by itself."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rpg import cli
from rpg.generation.export import export
from rpg.generation.generator import Generator
from rpg.planning.inspect import _verified
from rpg.training.loop import train
from tests.conftest import small_config
from tests.rpg.generation.test_export import TOKENS, tiny
from tokenization.errors import InputError
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo

MODULES = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def base_at(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base model, saved on the first call and loaded as a user loads it."""
    from transformers import AutoModelForCausalLM

    if not folder.exists():
        tiny(kind, 0).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapters_at(folder: Path, kind: str, num: int = 3, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    """Adapters as PEFT saves them, each away from its start."""
    for seed in range(num):
        settings = {"r": 2, "lora_alpha": 4, "target_modules": MODULES[kind], "fan_in_fan_out": kind == "gpt2"}
        config = LoraConfig(**{**settings, "task_type": "CAUSAL_LM", **options})  # type: ignore[arg-type]
        torch.manual_seed(seed)
        network = get_peft_model(base_at(folder / "base", kind, dtype), config, autocast_adapter_dtype=False)
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.data += 0.2 * torch.rand_like(parameter)
        network.save_pretrained(folder / "adapters" / f"task{seed}")
    return folder / "adapters"


def generator_of(folder: Path, **sections: object) -> Generator:
    """A generator trained for two steps on the adapters in ``folder``."""
    collect_from(folder / "adapters", folder / "zoo")
    config = small_config(folder, train={"steps": 2}, **sections)
    return Generator.from_pretrained(train(config, overwrite=True, say=lambda _: None))


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval()(TOKENS).logits.float()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generated_adapters_load_merge_and_stand_side_by_side(kind: str, use_dora: bool, tmp_path: Path) -> None:
    adapters = adapters_at(tmp_path, kind, use_dora=use_dora)
    folders = generator_of(tmp_path).generate(2, seed=3, output=tmp_path / "new")
    assert [path.name for path in folders] == ["network-00000", "network-00001"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"network-00000", "network-00001"}
    for folder in folders:
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert (folder / "adapter_config.json").read_bytes() == (adapters / "task0/adapter_config.json").read_bytes()
    plain = logits(base_at(tmp_path / "base", kind))
    network = PeftModel.from_pretrained(base_at(tmp_path / "base", kind), folders[0])
    network.load_adapter(folders[1], adapter_name="second")
    outputs = {}
    for name in ("default", "second"):
        network.set_adapter(name)
        outputs[name] = logits(network)
    assert (outputs["default"] - outputs["second"]).abs().max() > 1e-3
    for folder, output in zip(folders, outputs.values(), strict=True):
        assert torch.isfinite(output).all() and (output - plain).abs().max() > 1e-3
        alone = PeftModel.from_pretrained(base_at(tmp_path / "base", kind), folder)
        torch.testing.assert_close(logits(alone), output, rtol=0, atol=0)
        torch.testing.assert_close(logits(alone.merge_and_unload()), output, rtol=1e-4, atol=1e-4)


def test_the_tensors_are_those_of_the_sources_in_shape_and_dtype(tmp_path: Path) -> None:
    adapters = adapters_at(tmp_path, "llama", dtype=torch.bfloat16, use_dora=True, r=3)
    (folder,) = generator_of(tmp_path).generate(1, output=tmp_path / "new")
    sources, found = (load_file(path / "adapter_model.safetensors") for path in (adapters / "task0", Path(str(folder))))
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in sources.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == specs
    assert torch.bfloat16 in {dtype for dtype, _ in specs.values()}
    base = base_at(tmp_path / "base", "llama", torch.bfloat16)
    plain = logits(base)
    difference = logits(PeftModel.from_pretrained(base, folder)) - plain
    assert torch.isfinite(difference).all() and difference.abs().max() > 1e-3


def test_the_card_says_where_an_adapter_comes_from(tmp_path: Path) -> None:
    adapters_at(tmp_path, "llama")
    generator = generator_of(tmp_path)
    assert f"adapters of {tmp_path / 'base'}, written" in (tmp_path / "run" / "generator" / "README.md").read_text()
    (folder,) = generator.generate(1, seed=7, output=tmp_path / "new")
    card = (Path(str(folder)) / "README.md").read_text()
    assert card.startswith(f'---\nbase_model: "{tmp_path / "base"}"\nlibrary_name: peft\n---\n')
    assert "| seed | 7 |" in card and generator.digest in card and "LoRA, rank 2, on down_proj, q_proj, v_proj" in card


def test_the_configuration_travels_with_the_generator(tmp_path: Path) -> None:
    adapters_at(tmp_path, "llama")
    generator = generator_of(tmp_path)
    expected = generator.generate(1, seed=1)[0]
    moved = (tmp_path / "run" / "generator").rename(tmp_path / "moved")
    (tmp_path / "zoo").rename(tmp_path / "elsewhere")
    again = Generator.from_pretrained(moved)
    Generator.from_pretrained(moved).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter_config.json").read_bytes() == (moved / "adapter_config.json").read_bytes()
    exported = export(moved, "peft", tmp_path / "exported", seed=1)
    (folder,) = again.generate(1, seed=1, output=tmp_path / "new")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (exported / name).read_bytes() == (Path(str(folder)) / name).read_bytes(), name
    stored = load_file(exported / "adapter_model.safetensors")
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    again_exported = export(str(folder), "peft", tmp_path / "again")  # a folder is its own base
    assert load_file(again_exported / "adapter_model.safetensors").keys() == stored.keys()


def test_a_second_generation_replaces_the_first_and_a_failed_one_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters_at(tmp_path, "llama")
    generator = generator_of(tmp_path)
    first = generator.generate(2, seed=1, output=tmp_path / "new")
    before = load_file(Path(str(first[0])) / "adapter_model.safetensors")
    generator.generate(2, seed=2, output=tmp_path / "new")
    after = load_file(Path(str(first[0])) / "adapter_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    monkeypatch.setattr(
        "tokenization.layout.rows.CheckpointWriter.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        generator.generate(3, seed=3, output=tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"network-00000", "network-00001"}
    kept = load_file(Path(str(first[0])) / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], after[name]) for name in after)
    assert not list((tmp_path / "new").rglob("*.partial"))


def test_a_configuration_of_other_adapters_is_refused(tmp_path: Path) -> None:
    adapters_at(tmp_path, "llama")
    generator_of(tmp_path)
    path = tmp_path / "run" / "generator" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 5}))
    with pytest.raises(InputError, match="rank 2, but adapter_config.json says 5"):
        Generator.from_pretrained(tmp_path / "run")


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line: the line of its error, or nothing."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["rpg", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as exit_:
            assert exit_.code in (0, 2), exit_.code
        error = capsys.readouterr().err
        assert not error or (error.startswith("error: ") and error.count("\n") == 1), error
        return error

    return run


def test_from_a_folder_of_adapters_to_a_new_one(
    tmp_path: Path, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = adapters_at(tmp_path, "gpt2")
    monkeypatch.chdir(tmp_path)
    lines = [f"adapters/task{index},{index % 2},{1 - index % 2}" for index in range(3)]
    Path("conditions.csv").write_text("\n".join(["file,condition.polite,condition.long", *lines]))
    assert not command("collect", "--from", "adapters/*", "--conditions", "conditions.csv", "--zoo", "zoo")
    config = small_config(tmp_path, model={"condition": {"kind": "binary"}}, train={"steps": 2})
    config.save("config.yaml")
    assert not command("train", "config.yaml")
    assert not command("inspect", "zoo", "--verify")
    (table,) = _verified(Zoo.open("zoo"), config)
    assert "6 in canonical form (aligned)" in str([list(column.cells) for column in table.columns])  # type: ignore[union-attr]
    assert not command("generate", "run", "--condition", "1,0", "--num", 2)
    assert (adapters / "task0" / "adapter_config.json").read_text() == Path(
        "run/generated/network-00001/adapter_config.json"
    ).read_text()
    base = base_at(tmp_path / "base", "gpt2")
    plain = logits(base)
    difference = logits(PeftModel.from_pretrained(base, "run/generated/network-00001")) - plain
    assert torch.isfinite(difference).all() and difference.abs().max() > 1e-3


def change_config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def change_weights(change: Callable[[str, Tensor], Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save_file({name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None}, path)

    return apply


def save_other(config: PeftConfig) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        shutil.rmtree(folder)
        get_peft_model(tiny("llama", 0), config).save_pretrained(folder)

    return save


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DOWN = "layers.0.mlp.down_proj"
WRONG: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another base": (
        change_config(base_model_name_or_path="mistral"),
        ("adapter_config.json: base_model_name_or_path is 'mistral', but", "in adapters/task"),
    ),
    "another base's shapes": (
        change_weights(lambda name, tensor: torch.cat([tensor] * 2, 1) if "lora_A" in name else tensor),
        (f"{DOWN}.lora_A.weight' has shape [2, 48], but the zoo's has [2, 24]",),
    ),
    "another rank": (change_config(r=8), ("has rank 2, but adapter_config.json says 8",)),
    "tensors of another rank": (
        change_weights(lambda name, tensor: tensor[:1] if "lora_A" in name else tensor[:, :1]),
        (f"{DOWN}.lora_A.weight' has rank 1, but adapter_config.json says 2",),
    ),
    "no B": (
        change_weights(lambda name, tensor: None if f"{DOWN}.lora_B" in name else tensor),
        (f"{DOWN}.lora_B.weight' is missing",),
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        ("adapter_config.json without weights",),
    ),
    "no configuration": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        ("no adapter_config.json beside the adapter's weights",),
    ),
    "half the weights": (cut, ("is cut off",)),
    "half the configuration": (
        lambda folder: (folder / "adapter_config.json").write_text('{"r": 2, '),
        ("adapter_config.json cannot be read as JSON",),
    ),
    "DoRA": (
        save_other(LoraConfig(r=2, target_modules=MODULES["llama"], use_dora=True)),
        ("adapter_config.json", "in adapters/task"),
    ),
    "IA3": (
        save_other(IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
        ("peft_type is 'IA3', and no other adapters than 'LORA'",),
    ),
    "prompt tuning": (
        save_other(PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", num_layers=2, token_dim=16)),
        ("peft_type is 'PROMPT_TUNING', and no other adapters than 'LORA'",),
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters_at(tmp_path_factory.mktemp("sound"), "llama", num=2)


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_adapter_is_one_line_that_names_it(
    fault: str, sound: Path, tmp_path: Path, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = WRONG[fault]
    for number in (0, 1):  # the first is what the others are compared with
        shutil.copytree(sound, tmp_path / str(number) / "adapters")
        monkeypatch.chdir(tmp_path / str(number))
        change(Path(f"adapters/task{number}"))
        error = command("collect", "--from", "adapters/*", "--zoo", "zoo")
        assert error and not Path("zoo").exists(), error
        if number == 1:
            assert "adapters/task1" in error and all(part in error for part in words), error
