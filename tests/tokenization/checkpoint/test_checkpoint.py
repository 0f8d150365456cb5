from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tokenization.checkpoint.checkpoint import Checkpoint, find_ties, read_state_dict, save_checkpoint
from tokenization.checkpoint.safetensors import natural_key
from tokenization.errors import InputError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bit pattern, NaN with payloads and negative zero included."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].shape == right[name].shape, name
        assert bits(left[name]) == bits(right[name]), name


def test_round_trip_keeps_bits_dtypes_shapes_and_order(tmp_path: Path) -> None:
    state = {f"z{i}.{dtype}": random_bits((3, 5), dtype, i) for i, dtype in enumerate(DTYPES)}
    state |= {"scalar": torch.tensor(3.0), "a.late": torch.tensor(7), "empty": torch.zeros(0, 4)}
    save_checkpoint(tmp_path / "a.safetensors", state, {"note": "kept"})
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert_same(checkpoint.state_dict(), state)
    assert checkpoint.metadata == {"format": "pt", "note": "kept"} and checkpoint.ordered
    assert_same(read_state_dict(tmp_path / "a.safetensors"), state)


@settings(max_examples=30, deadline=None)
@given(
    specs=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=8,
    )
)
def test_round_trip_of_any_shapes(tmp_path_factory: pytest.TempPathFactory, specs: list) -> None:
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    state = {f"t{9 - i}": random_bits(tuple(shape), dtype, i) for i, (dtype, shape) in enumerate(specs)}
    save_checkpoint(path, state)
    assert_same(Checkpoint.open(path).state_dict(), state)
    library = safetensors.torch.load_file(path)  # the reference reader agrees
    assert library.keys() == state.keys() and all(bits(library[name]) == bits(state[name]) for name in state)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    state = {"a": torch.arange(4.0), "b": torch.tensor([True])}
    contents = set()
    for index in range(8):
        path = tmp_path / f"{index}.safetensors"
        save_checkpoint(path, state, {"x": "1", "y": "2"} if index % 2 else {"y": "2", "x": "1"})
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_golden_bytes(tmp_path: Path) -> None:
    state = {"b": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "a": torch.tensor([1], dtype=torch.int64)}
    save_checkpoint(tmp_path / "a.safetensors", state)
    header = (
        rb'{"__metadata__":{"format":"pt","rpg.order":"[\"b\", \"a\"]"},'
        rb'"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]}}'
    )
    header += b" " * (-len(header) % 8)
    expected = len(header).to_bytes(8, "little") + header + b"\1" + bytes(7) + b"\x80\x3f\x00\x40"
    assert (tmp_path / "a.safetensors").read_bytes() == expected


def test_views_are_the_file_and_writing_into_them_is_private(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"odd": torch.tensor([True, False, True]), "w": torch.arange(6.0).reshape(2, 3)})
    before = path.read_bytes()
    checkpoint = Checkpoint.open(path)
    flat = checkpoint.flat("w")
    assert flat.shape == (6,) and flat.data_ptr() == checkpoint.flat("w").data_ptr()
    assert checkpoint.tensor("w").data_ptr() != flat.data_ptr()
    flat[0] = 9
    assert path.read_bytes() == before and Checkpoint.open(path).flat("w")[0] == 0


def test_unaligned_tensors_of_foreign_writers(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "m": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    data = b"\5" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert Checkpoint.open(tmp_path / "a.safetensors").tensor("w").tolist() == [1.5, -2.0]


def test_ties_are_stored_once_and_come_back_as_one_tensor(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(50, 4))
    state = {"head": weight, "body": torch.ones(2), "embed": weight}
    save_checkpoint(tmp_path / "a.safetensors", state)
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert list(checkpoint.tensors) == ["head", "body"] and checkpoint.ties == {"embed": "head"}
    loaded = checkpoint.state_dict()
    assert list(loaded) == list(state) and loaded["embed"] is loaded["head"]
    assert torch.equal(checkpoint.flat("embed"), checkpoint.flat("head"))

    save_checkpoint(tmp_path / "b.safetensors", state, materialize_ties=True)
    assert safetensors.torch.load_file(tmp_path / "b.safetensors").keys() == state.keys()
    assert not Checkpoint.open(tmp_path / "b.safetensors").ties

    save_checkpoint(tmp_path / "c.safetensors", {"a": torch.ones(3)}, ties={"b": "a"})
    assert list(Checkpoint.open(tmp_path / "c.safetensors").state_dict()) == ["a", "b"]


def test_metadata_that_says_the_name_of_a_tensor_is_no_tie(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", {"weight": torch.ones(2)}, {"note": "weight"})
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert checkpoint.ties == {} and list(checkpoint.tensors) == ["weight"]


def test_foreign_metadata_that_says_the_name_of_a_tensor_is_no_tie(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, {"best": "weight", "format": "pt"})
    checkpoint = Checkpoint.open(path)
    assert checkpoint.ties == {} and checkpoint.order == ["weight"] and checkpoint.metadata["best"] == "weight"


def test_what_the_librarys_save_model_notes_is_a_tie(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    network["b"].weight = network["a"].weight
    safetensors.torch.save_model(network, str(tmp_path / "a.safetensors"))
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert checkpoint.ties == {"b.weight": "a.weight"}
    network.load_state_dict(checkpoint.state_dict())


def test_ties_that_a_file_of_0_1_0_records_are_read(tmp_path: Path) -> None:
    metadata = {"format": "pt", "rpg.order": '["a", "b"]', "rpg.ties": '{"b": "a"}'}
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata)
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert checkpoint.ties == {"b": "a"} and list(checkpoint.state_dict()) == ["a", "b"]


def test_views_of_one_buffer_are_not_ties(tmp_path: Path) -> None:
    buffer = torch.arange(6.0)
    state = {"a": buffer[:3], "b": buffer[3:], "t": buffer.reshape(2, 3).t(), "all": buffer}
    assert find_ties(state) == {}
    save_checkpoint(tmp_path / "a.safetensors", state)
    assert_same(Checkpoint.open(tmp_path / "a.safetensors").state_dict(), state)


def test_natural_order_without_a_recorded_one(tmp_path: Path) -> None:
    names = ["block.10.w", "block.2.w", "block.1.w", "a"]
    safetensors.torch.save_file({name: torch.ones(1) for name in names}, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert list(checkpoint.tensors) == ["a", "block.1.w", "block.2.w", "block.10.w"] and not checkpoint.ordered
    assert sorted(["x01", "x1", "x0001", "x"], key=natural_key) == ["x", "x0001", "x01", "x1"]


def _first_value(checkpoint: Checkpoint) -> float:
    return checkpoint.flat("w")[0].item()


def test_other_processes_read_too(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", {"w": torch.full((10,), 4.5)})
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert _first_value(checkpoint) == 4.5
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(_first_value, [checkpoint]) == [4.5]
    assert pickle.loads(pickle.dumps(checkpoint)).state_dict()["w"].tolist() == [4.5] * 10


def test_thousands_of_checkpoints_need_no_descriptors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", {"w": torch.ones(3)})
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    held = [Checkpoint.open(tmp_path / "a.safetensors") for _ in range(50)]
    assert sum(checkpoint.flat("w").sum().item() for checkpoint in held) == 150
    after = len(list(Path("/proc/self/fd").iterdir())) if before else 0
    assert after <= before + 2


def test_a_file_that_shrank_since_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"w": torch.ones(30)})
    checkpoint = Checkpoint.open(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"a\.safetensors has \d+ bytes, but had \d+ when it was opened"):
        checkpoint.flat("w")


def test_timm_folder_and_pth(tmp_path: Path) -> None:
    network = timm.create_model("test_vit", num_classes=5)
    state = network.state_dict()
    timm.models.save_for_hf(network, tmp_path / "hub", model_config={"num_classes": 5})
    loaded = read_state_dict(tmp_path / "hub")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    torch.save(state, tmp_path / "a.pth")
    assert_same(read_state_dict(tmp_path / "a.pth"), state)
    save_checkpoint(tmp_path / "b.safetensors", state)
    timm.create_model("test_vit", num_classes=5, checkpoint_path=str(tmp_path / "b.safetensors"))


def test_transformers_folder_whole_and_sharded(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    network = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=11, n_head=2, vocab_size=40, n_positions=8))
    network.save_pretrained(tmp_path / "whole")
    network.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, sharded = Checkpoint.open(tmp_path / "whole"), Checkpoint.open(tmp_path / "sharded")
    assert len(sharded.sizes) > 2 and list(whole.tensors) == list(sharded.tensors)
    assert_same(whole.state_dict(), sharded.state_dict())
    assert_same(sharded.state_dict(), Checkpoint.open(next((tmp_path / "sharded").glob("*.index.json"))).state_dict())
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
    blocks = [name for name in whole.tensors if name.endswith("ln_1.weight")]
    assert blocks == [f"transformer.h.{i}.ln_1.weight" for i in range(11)]
    # Saved by us, tied, it loads back into the network with every key.
    save_checkpoint(tmp_path / "full.safetensors", state, materialize_ties=True)
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "full.safetensors"))


def test_peft_folder(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    network = get_peft_model(timm.create_model("test_vit"), LoraConfig(r=2, target_modules=["qkv"], use_dora=True))
    network.save_pretrained(tmp_path / "a")
    loaded = read_state_dict(tmp_path / "a")
    assert any("lora_magnitude_vector" in name for name in loaded) and any("lora_B" in name for name in loaded)


@pytest.mark.parametrize("wrap", ["state_dict", "model", "model_ema", "state_dict_ema", "nested"])
def test_nested_pickles(tmp_path: Path, wrap: str) -> None:
    state = {"module._orig_mod.a": torch.ones(2), "module._orig_mod.b": nn.Parameter(torch.zeros(1))}
    content = {"state_dict": {"model": state}, "epoch": 3} if wrap == "nested" else {wrap: state, "epoch": 3}
    content["args"] = argparse.Namespace(lr=0.1)
    torch.save(content, tmp_path / "a.pt")
    loaded = read_state_dict(tmp_path / "a.pt")
    assert list(loaded) == ["a", "b"] and not loaded["b"].requires_grad


def test_averaged_weights_are_preferred_and_old_pickles_read(tmp_path: Path) -> None:
    content = {"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert read_state_dict(tmp_path / "a.pth")["a"].item() == 1


def test_prefixes_are_cut_only_where_all_names_have_them(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", {"module.a": torch.ones(1), "b": torch.ones(1)})
    assert list(read_state_dict(tmp_path / "a.safetensors")) == ["module.a", "b"]
    save_checkpoint(tmp_path / "a.safetensors", {"module.a": torch.ones(1), "module.b": torch.ones(1)})
    assert list(read_state_dict(tmp_path / "a.safetensors")) == ["a", "b"]


def test_sharded_pickles(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.ones(2)}, tmp_path / "pytorch_model-2.bin")
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert list(read_state_dict(tmp_path)) == ["a", "b"]
    assert list(read_state_dict(tmp_path / "pytorch_model.bin.index.json")) == ["a", "b"]


def test_saving_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"w": torch.ones(3)})
    save_checkpoint(path, {"w": torch.zeros(4)})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert Checkpoint.open(path).tensor("w").shape == (4,)
