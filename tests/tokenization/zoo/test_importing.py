from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.importing import collect_from
from tokenization.zoo.reading import find_checkpoints
from tokenization.zoo.zoo import Zoo


def state_of(seed: int) -> dict[str, Tensor]:
    return {"w": torch.full((2, 3), float(seed)), "b": torch.full((3,), float(seed))}


def fill(folder: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(state_of(seed), folder / name)
        else:
            torch.save({"state_dict": {f"module.{key}": value for key, value in state_of(seed).items()}}, folder / name)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def first_values(zoo: Zoo) -> list[float]:
    return [zoo.state_dict(index)["w"][0, 0].item() for index in range(len(zoo))]


def test_safetensors_are_adopted_where_they_are(tmp_path: Path) -> None:
    fill(tmp_path / "mine", ["step1.safetensors", "step2.safetensors", "step10.safetensors"])
    before = snapshot(tmp_path / "mine")
    zoo = collect_from(tmp_path / "mine", tmp_path / "zoo", pattern=r"step(?P<step>\d+)")
    assert [entry.step for entry in zoo.entries] == [1, 2, 10] and all(entry.external for entry in zoo.entries)
    assert first_values(zoo) == [0, 1, 2] and zoo.num_runs == 3
    assert not (tmp_path / "zoo" / "checkpoints").exists() and snapshot(tmp_path / "mine") == before
    Zoo.open(tmp_path / "zoo").verify()


def test_a_folder_becomes_a_zoo_itself_and_grows(tmp_path: Path) -> None:
    fill(tmp_path, ["a.safetensors", "sub/b.safetensors"])
    zoo = collect_from(tmp_path, tmp_path)
    assert [entry.file for entry in zoo.entries] == ["a.safetensors", "sub/b.safetensors"]
    assert not any(entry.external for entry in zoo.entries)
    before = snapshot(tmp_path)
    assert len(collect_from(tmp_path, tmp_path)) == 2 and snapshot(tmp_path) == before
    fill(tmp_path, ["a.safetensors", "sub/b.safetensors", "c.pth"])
    zoo = collect_from(tmp_path, tmp_path)
    assert [entry.file for entry in zoo.entries][2:] == ["checkpoints/000002.safetensors"]
    assert len(collect_from(tmp_path, tmp_path)) == 3
    assert len({entry.run for entry in zoo.entries}) == 3
    shutil.move(tmp_path, f"{tmp_path}.moved")  # no absolute path inside
    Zoo.open(f"{tmp_path}.moved").verify()


def test_pickles_are_converted_once_and_mix_with_safetensors(tmp_path: Path) -> None:
    fill(tmp_path / "mine", ["a.pth", "b.safetensors", "c.pt", "d.bin"])
    zoo = collect_from(str(tmp_path / "mine" / "*"), tmp_path / "zoo")
    assert first_values(zoo) == [0, 1, 2, 3]
    assert [bool(entry.source) for entry in zoo.entries] == [True, False, True, True]
    before = snapshot(tmp_path / "zoo")
    collect_from(tmp_path / "mine", tmp_path / "zoo")
    assert snapshot(tmp_path / "zoo") == before


def test_a_killed_conversion_resumes(tmp_path: Path) -> None:
    fill(tmp_path / "mine", [f"{index}.pth" for index in range(4)])
    whole = collect_from(tmp_path / "mine", tmp_path / "whole")
    collect_from(tmp_path / "mine", tmp_path / "zoo")
    manifest = tmp_path / "zoo" / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    (tmp_path / "zoo" / "checkpoints" / "000003.safetensors").unlink()
    zoo = collect_from(tmp_path / "mine", tmp_path / "zoo")
    assert first_values(zoo) == [0, 1, 2, 3] and zoo.digest() == whole.digest()
    assert [entry.run for entry in zoo.entries] == [entry.run for entry in whole.entries]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_table(tmp_path: Path, ending: str) -> None:
    fill(tmp_path / "mine", ["a.safetensors", "b.safetensors", "c.safetensors"])
    table = tmp_path / f"table.{ending}"
    if ending == "csv":
        table.write_text(
            "file,run,step,split,condition,accuracy\n"
            "c.safetensors,seed2,5,test,0 1,0.5\na.safetensors,seed1,4,train,1 1,\n"
        )
    else:
        rows = [
            {"file": "c.safetensors", "run": "seed2", "step": 5, "split": "test", "condition": [0, 1]},
            {"file": "a.safetensors", "run": "seed1", "step": 4, "condition": [1, 1]},
        ]
        rows[0]["metrics"] = {"accuracy": 0.5}
        table.write_text("\n".join(map(json.dumps, rows)))
    zoo = collect_from(tmp_path / "mine", tmp_path / "zoo", table=table)
    assert [Path(entry.file).name for entry in zoo.entries] == ["c.safetensors", "a.safetensors"]
    assert [(entry.run, entry.step, entry.split) for entry in zoo.entries] == [(1, 5, "test"), (0, 4, "train")]
    assert [entry.condition for entry in zoo.entries] == [(0, 1), (1, 1)]
    assert zoo.entries[0].metrics == {"accuracy": 0.5} and zoo.entries[1].metrics == {}
    assert zoo.condition == ConditionSpec("binary", 2) and zoo.runs == ["seed1", "seed2"]


def test_condition_columns_and_classes(tmp_path: Path) -> None:
    fill(tmp_path / "mine", ["cat_0.safetensors", "dog_1.safetensors", "cat_2.safetensors"])
    zoo = collect_from(tmp_path / "mine", tmp_path / "a", pattern=r"(?P<condition>cat|dog)_(?P<loss>\d)")
    assert zoo.condition == ConditionSpec("class", 2, ("cat", "dog"))
    assert [entry.condition for entry in zoo.entries] == [(0,), (0,), (1,)]
    assert [entry.metrics["loss"] for entry in zoo.entries] == [0, 2, 1]

    zoo = collect_from(tmp_path / "mine", tmp_path / "b", pattern=r"(?P<condition>cat|dog)", condition="text")
    assert zoo.condition is not None and zoo.condition.kind == "text"

    zoo = collect_from(tmp_path / "mine", tmp_path / "c", pattern=r"_(?P<condition>\d)")
    assert zoo.condition == ConditionSpec("class", 3)

    (tmp_path / "t.csv").write_text("file,condition.x,condition.y\ncat_0.safetensors,0.5,1\n")
    zoo = collect_from(tmp_path / "mine", tmp_path / "d", table=tmp_path / "t.csv")
    assert zoo.condition == ConditionSpec("vector", 2, ("x", "y")) and zoo.entries[0].condition == (0.5, 1)


def test_runs_of_a_tasks_zoo_are_not_mixed_up(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    zoo.append(state_of(0), run=0, step=0)
    fill(tmp_path / "mine", ["r0.safetensors", "r7.safetensors"])
    zoo = collect_from(tmp_path / "mine", tmp_path / "zoo", pattern=r"r(?P<run>\d)")
    assert [entry.run for entry in zoo.entries] == [0, 0, 1] and zoo.runs == ["0", "7"]


def test_zoo_inside_the_source(tmp_path: Path) -> None:
    fill(tmp_path, ["a.pth", "b.pth"])
    collect_from(tmp_path, tmp_path / "zoo")
    assert len(collect_from(tmp_path, tmp_path / "zoo")) == 2


def test_linked_files_keep_their_readable_names(tmp_path: Path) -> None:
    fill(tmp_path, ["mine/model.safetensors"])
    (tmp_path / "blob").write_bytes((tmp_path / "mine" / "model.safetensors").read_bytes())
    (tmp_path / "mine" / "model.safetensors").unlink()
    (tmp_path / "mine" / "model.safetensors").symlink_to("../blob")
    zoo = collect_from(tmp_path / "mine" / "*.safetensors", tmp_path / "zoo")
    assert zoo.entries[0].file == str(tmp_path / "mine" / "model.safetensors")
    inside = collect_from(tmp_path / "mine", tmp_path / "mine")  # a link out of the folder is external
    assert inside.entries[0].external
    Zoo.open(tmp_path / "mine").verify()


def test_what_a_folder_holds(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    fill(tmp_path, ["loose/b.pth", "loose/a10.safetensors", "loose/a9.safetensors"])
    network = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    network.save_pretrained(tmp_path / "out" / "checkpoint-2")
    network.save_pretrained(tmp_path / "out" / "checkpoint-10", max_shard_size="5KB")
    torch.save({"lr": 1}, tmp_path / "out" / "checkpoint-2" / "optimizer.pt")
    names = [str(path.relative_to(tmp_path)) for path in find_checkpoints(tmp_path)]
    assert names == [
        "loose/a9.safetensors",
        "loose/a10.safetensors",
        "loose/b.pth",
        "out/checkpoint-2",
        "out/checkpoint-10",
    ]
    (tmp_path / "loose" / "circle").symlink_to(tmp_path / "loose")
    assert [str(path.relative_to(tmp_path)) for path in find_checkpoints(tmp_path)] == names
    every = find_checkpoints(str(tmp_path / "out" / "**"))
    assert [str(path.relative_to(tmp_path)) for path in every] == names[3:]
    zoo = collect_from(tmp_path / "out", tmp_path / "zoo", pattern=r"checkpoint-(?P<step>\d+)")
    assert [entry.step for entry in zoo.entries] == [2, 10]
    assert len(zoo.checkpoint(1).sizes) > 1
    zoo.verify()
    assert find_checkpoints(str(tmp_path / "loose" / "a*.safetensors"))[0].name == "a9.safetensors"


# PEFT adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a0, a1 (alike), dora, rank (of another rank), modules, and bin (a pickle)."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters")

    def save(name: str, seed: int, **options: object) -> None:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 2, "target_modules": ["qkv", "proj"], "base_model_name_or_path": "base", **options})
        network = get_peft_model(timm.create_model("test_vit"), config)
        for tensor in network.parameters():
            tensor.data += 0.01
        network.save_pretrained(folder / name, safe_serialization=True)
        path = folder / name / "adapter_config.json"
        config_json = json.loads(path.read_text())
        config_json["target_modules"] = sorted(config_json["target_modules"], reverse=bool(seed))
        config_json["base_model_name_or_path"] = options.get("base_model_name_or_path", "base")
        path.write_text(json.dumps(config_json))

    save("a0", 0)
    save("a1", 1)
    save("dora", 2, use_dora=True)
    save("rank", 3, r=4)
    save("modules", 4, target_modules=["qkv"])
    save("base", 5, base_model_name_or_path="another")
    save("pattern", 6, rank_pattern={"blocks.0.attn.qkv": 4})
    return folder


def copy(adapters: Path, target: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(adapters / name, target / name)
    return target


def test_adapters_are_adopted_with_their_configuration(adapters: Path, tmp_path: Path) -> None:
    source = copy(adapters, tmp_path / "mine", "a0", "a1")
    zoo = collect_from(source, tmp_path / "zoo")
    assert [Path(entry.file).name for entry in zoo.entries] == ["a0", "a1"]
    config = (tmp_path / "zoo" / "adapter_config.json").read_bytes()
    assert config == (source / "a0" / "adapter_config.json").read_bytes()
    zoo.verify()
    copy(adapters, tmp_path / "more", "rank")
    with pytest.raises(InputError, match="4, but 2"):
        collect_from(tmp_path / "more", tmp_path / "zoo")
    by_file = collect_from(str(source / "*" / "adapter_model.safetensors"), tmp_path / "zoo2")
    assert by_file.digest() == zoo.digest()


@pytest.mark.parametrize("name", ["dora", "pattern", "rank"])
def test_kinds_of_adapters(adapters: Path, tmp_path: Path, name: str) -> None:
    assert len(collect_from(copy(adapters, tmp_path / "mine", name), tmp_path / "zoo")) == 1


def test_pickled_adapters_are_converted(adapters: Path, tmp_path: Path) -> None:
    source = copy(adapters, tmp_path / "mine", "a0")
    weights = source / "a0" / "adapter_model.safetensors"
    state = Checkpoint.open(weights).state_dict()
    torch.save(state, source / "a0" / "adapter_model.bin")
    weights.unlink()
    zoo = collect_from(source, tmp_path / "zoo")
    assert all(torch.equal(tensor, state[name]) for name, tensor in zoo.state_dict(0).items())
    assert (tmp_path / "zoo" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("other", "field", "values"),
    [
        ("rank", r"the rank of 'blocks\.0\.attn\.\w+'", "4, but 2"),
        ("base", "base_model_name_or_path", "'another', but 'base'"),
        ("dora", "use_dora", "True, but False"),
    ],
)
def test_adapters_that_differ(adapters: Path, tmp_path: Path, other: str, field: str, values: str) -> None:
    source = copy(adapters, tmp_path / "mine", "a0", other)
    (source / other).rename(source / "z")
    with pytest.raises(InputError, match=rf"z/adapter_config\.json: {field} is {values} in .*a0") as error:
        collect_from(source, tmp_path / "zoo")
    assert "\n" not in str(error.value) and not (tmp_path / "zoo").exists()


@pytest.mark.parametrize("kind", ["IA3", "PROMPT_TUNING", None])
def test_other_kinds_of_adapters(adapters: Path, tmp_path: Path, kind: str | None) -> None:
    source = copy(adapters, tmp_path / "mine", "a0")
    config = source / "a0" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": kind}))
    with pytest.raises(InputError, match=rf"peft_type is {kind!r}, and no other adapters than 'LORA'"):
        collect_from(source, tmp_path / "zoo")


def test_half_written_adapters(adapters: Path, tmp_path: Path) -> None:
    source = copy(adapters, tmp_path / "mine", "a0", "a1", "dora")
    (source / "a1" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"a1 has an adapter_config.json without weights"):
        collect_from(source / "a1", tmp_path / "zoo")
    (source / "a0" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"a0 has no adapter_config.json"):
        collect_from(source / "a0", tmp_path / "zoo")
    weights = source / "dora" / "adapter_model.safetensors"
    state = Checkpoint.open(weights).state_dict()
    for part in ("lora_A", "lora_B", "lora_magnitude"):
        missing = next(name for name in state if part in name)
        save_checkpoint(weights, {name: tensor for name, tensor in state.items() if name != missing})
        with pytest.raises(InputError, match=rf"tensor '{missing}'.* is missing"):
            collect_from(source / "dora", tmp_path / "zoo")
    save_checkpoint(weights, {"lm_head.weight": torch.ones(2)})
    with pytest.raises(InputError, match="no lora_A or lora_B tensor"):
        collect_from(source / "dora", tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_a_zoo_is_not_made_among_other_files(tmp_path: Path) -> None:
    source, other = tmp_path / "mine", tmp_path / "other"
    for folder in (source, other):
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    save_checkpoint(source / "a.safetensors", {"w": torch.ones(2)})
    with pytest.raises(InputError, match=r"other is not a zoo, and not empty \(it has notes.txt\)"):
        collect_from(source, other)
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    assert len(collect_from(source, source)) == 1  # beside the checkpoints themselves
    assert len(collect_from(source, source)) == 1
