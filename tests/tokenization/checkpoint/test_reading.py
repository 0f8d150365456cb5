"""Training checkpoints as people keep them: what is read of them, under what names, and what is said."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import functools
import gzip
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from tokenization.checkpoint.checkpoint import Checkpoint, read_state_dict, read_weights
from tokenization.checkpoint.weights import Chosen, NoWeightsError
from tokenization.errors import InputError
from tokenization.zoo.importing import collect_from

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    path: str = "/data"


class Schedule:
    def __init__(self) -> None:
        self.function = self.__call__

    def __call__(self) -> None: ...


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def state(seed: int = 0) -> dict[str, Tensor]:
    return network(seed).state_dict()


def prefixed(prefix: str, seed: int = 0) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state(seed).items()}


def optimizer() -> dict[str, Any]:
    model = network()
    made = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    made.step()
    return made.state_dict()


def averaged(seed: int = 0) -> dict[str, Tensor]:
    made = torch.optim.swa_utils.AveragedModel(network(seed))
    made.update_parameters(network(seed))
    return made.state_dict()


INERT: dict[str, Callable[[], Any]] = {
    "numpy scalar": lambda: np.float64(0.93),
    "numpy integer": lambda: np.int32(3),
    "numpy array": lambda: np.linspace(1, 0, 5),
    "array of objects": lambda: np.array(["a", None], dtype=object),
    "path": lambda: pathlib.PosixPath("/data"),
    "namespace": lambda: argparse.Namespace(lr=0.1, skip={"a"}, dtype=torch.float16, device=torch.device("cpu")),
    "defaultdict": lambda: collections.defaultdict(list, loss=[1.0]),
    "counter": lambda: collections.Counter("abc"),
    "deque": lambda: collections.deque([1.0, 2.0]),
    "sets": lambda: {"a", frozenset("b")},
    "enum": lambda: {Colour.RED: Colour.RED},
    "dataclass": lambda: Settings(),
    "schedule with a method": lambda: Schedule(),
    "partial": lambda: functools.partial(max, 1),
    "function": lambda: nn.functional.relu,
    "loss": lambda: nn.CrossEntropyLoss(),
    "scheduler": lambda: torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD(network().parameters(), 0.1), max_lr=0.1, total_steps=9
    ).state_dict(),
    "averaging scheduler": lambda: torch.optim.swa_utils.SWALR(
        torch.optim.SGD(network().parameters(), 0.1), swa_lr=0.01
    ).state_dict(),
    "optimizer": optimizer,
    "random states": lambda: {"cpu": torch.get_rng_state(), "numpy": np.random.get_state()},
    "losses as a tensor": lambda: torch.ones(7),
    "best score": lambda: torch.tensor(0.9),
    "bytes": lambda: b"abc",
    "complex number": lambda: 1j,
    "a whole network": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("kind", INERT)
def test_what_lies_beside_the_weights_is_passed_over(tmp_path: Path, kind: str, old: bool) -> None:
    content = {"epoch": 3, "weights": state(), "beside": INERT[kind](), "more": [INERT[kind]()]}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    found = read_state_dict(tmp_path / "a.pth")
    assert list(found) == NAMES and all(torch.equal(found[name], value) for name, value in state().items())


WHERE: dict[str, tuple[Callable[[], Any], str]] = {
    "network_weights": (lambda: {"network_weights": state(), "optimizer_state": optimizer()}, "network_weights"),
    "weights": (lambda: {"weights": state(), "epoch": 3}, "weights"),
    "deep": (lambda: {"run": {"trained": {"policy": state()}}, "optimizer": optimizer()}, "run.trained.policy"),
    "in a tuple": (lambda: (state(), optimizer()), "0"),
    "of a dataclass-like object": (lambda: {"x": argparse.Namespace(params=state())}, "x.params"),
    "averaged": (lambda: {"params": state(1), "params_ema": state()}, "params_ema"),
    "timm": (lambda: {"state_dict": state(1), "state_dict_ema": state(), "metric": 93.0}, "state_dict_ema"),
    "torchvision": (lambda: {"model": state(1), "model_ema": averaged(), "args": Settings()}, "model_ema"),
    "usual beside another": (lambda: {"model": state(), "teacher": state(1)}, "model"),
}


@pytest.mark.parametrize("case", WHERE)
def test_the_set_of_weights_that_is_taken_is_said(tmp_path: Path, case: str) -> None:
    make, key = WHERE[case]
    torch.save(make(), tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt")
    assert torch.equal(found.tensors["0.weight"], state()["0.weight"]) and list(found.tensors) == NAMES
    assert f"weights taken from {key!r}" in found.notes[0]


def test_of_several_sets_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({"generator": state(), "discriminator": state(1), "step": 3}, file)
    with pytest.raises(InputError, match=r"\(generator, discriminator\); choose one with --key generator$"):
        read_state_dict(file)
    for key, seed in (("generator", 0), ("discriminator", 1)):
        assert torch.equal(read_state_dict(file, Chosen(key))["2.bias"], state(seed)["2.bias"])
    with pytest.raises(InputError, match="no weights under 'x'; --key takes one of generator, discriminator"):
        read_state_dict(file, Chosen("x"))
    torch.save({"student": prefixed("module."), "teacher": prefixed("module.", 1)}, file)
    with pytest.raises(InputError, match="student, teacher"):
        read_state_dict(file)
    assert torch.equal(read_state_dict(file, Chosen("teacher"))["0.bias"], state(1)["0.bias"])
    torch.save({**state(), "ema": {**state(1)}}, file)
    assert torch.equal(read_state_dict(file)["0.bias"], state(1)["0.bias"])
    assert torch.equal(read_state_dict(file, Chosen("."))["0.bias"], state()["0.bias"])


RENAMED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "data parallel": (lambda: prefixed("module."), "module. cut off every name"),
    "compiled": (lambda: prefixed("_orig_mod."), "_orig_mod. cut out of names"),
    "both": (lambda: prefixed("module._orig_mod."), "module. cut off every name"),
    "compiled before": (lambda: prefixed("_orig_mod.module."), "module. cut off every name"),
    "averaged": (averaged, "n_averaged"),
    "averaged and compiled": (lambda: {"n_averaged": torch.tensor(3), **prefixed("module._orig_mod.")}, "n_averaged"),
    "sharded": (lambda: prefixed("_fsdp_wrapped_module."), "_fsdp_wrapped_module. cut out"),
    "counted": (lambda: {**state(), "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)}, "thop"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("case", RENAMED)
def test_names_are_those_of_the_plain_network_in_every_format(tmp_path: Path, case: str, suffix: str) -> None:
    make, said = RENAMED[case]
    wrapped, file = {name: value.clone() for name, value in make().items()}, tmp_path / f"a.{suffix}"
    safetensors.torch.save_file(wrapped, file) if suffix == "safetensors" else torch.save(wrapped, file)
    found = read_weights(file)
    network().load_state_dict(found.tensors)
    assert any(said in note for note in found.notes)
    notices: list[str] = []
    zoo = collect_from(file, tmp_path / "zoo", say=notices.append)
    network().load_state_dict(zoo.state_dict(0))
    assert sorted(zoo.structure.tensors) == sorted(NAMES) and any(said in notice for notice in notices)


def test_inside_a_name_and_half_a_zoo_in_each_format(tmp_path: Path) -> None:
    for seed in range(4):
        wrapped = prefixed("model._orig_mod.", seed)
        file = tmp_path / f"run{seed}"
        torch.save({"state_dict": wrapped}, f"{file}.ckpt") if seed % 2 else safetensors.torch.save_file(
            wrapped, f"{file}.safetensors"
        )
    said: list[str] = []
    zoo = collect_from(str(tmp_path / "run*"), tmp_path / "zoo", say=said.append)
    assert len(zoo) == 4 and sorted(zoo.structure.tensors) == sorted("model." + name for name in NAMES)
    cure = next(line for line in said if "every name begins with model." in line)
    prefix = cure.partition("--strip ")[2].split()[0]
    zoo = collect_from(str(tmp_path / "run*"), tmp_path / "plain", chosen=Chosen(strip=prefix))
    network().load_state_dict(zoo.state_dict(0))
    network().load_state_dict(
        collect_from(str(tmp_path / "run*"), tmp_path / "b", chosen=Chosen(strip="model")).state_dict(1)
    )
    with pytest.raises(InputError, match="does not begin with 'net.', which --strip"):
        collect_from(str(tmp_path / "run*"), tmp_path / "c", chosen=Chosen(strip="net."))
    torch.save({"module.a": torch.ones(2), "a": torch.ones(2), "_orig_mod.a": torch.ones(2)}, tmp_path / "twice.pth")
    with pytest.raises(InputError, match="is there twice"):
        read_state_dict(tmp_path / "twice.pth")


def test_no_tensors_among_weights_are_passed_over_and_said(tmp_path: Path) -> None:
    torch.save({**state(), "epoch": 3, "0._extra_state": None, "args": Settings()}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")
    assert list(found.tensors) == NAMES and found.notes == ["no tensors, passed over: epoch, 0._extra_state, args"]


@pytest.mark.parametrize("name", ["a.th", "a.pkl", "a.model", "a.pyth", "a", "a.weights", "a.safetensors", "a.7"])
def test_content_and_not_the_ending_tells_what_a_file_is(tmp_path: Path, name: str) -> None:
    for write in (
        lambda path: torch.save(state(), path),
        lambda path: torch.save(state(), path, _use_new_zipfile_serialization=False),
        lambda path: torch.save(state(), path, pickle_protocol=5),
        lambda path: safetensors.torch.save_file(state(), path),
    ):
        write(tmp_path / name)
        assert torch.equal(read_state_dict(tmp_path / name)["0.bias"], state()["0.bias"])
        for source in (tmp_path, tmp_path / name):
            assert len(collect_from(source, tmp_path / "zoo")) == 1
            subprocess.run(["rm", "-r", tmp_path / "zoo"], check=True)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_pickles_of_tensors_and_of_arrays(tmp_path: Path, protocol: int) -> None:
    arrays = {name: value.numpy() for name, value in state().items()}
    arrays["2.bias"] = arrays["2.bias"].astype(">f4")
    arrays["2.weight"] = np.asfortranarray(arrays["2.weight"])
    for content in (state(), {"model": arrays, "__author__": "x"}):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        found = read_state_dict(tmp_path / "a.pkl")
        assert all(torch.equal(found[name], value) for name, value in state().items())


def zipped(**files: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return data.getvalue()


def onnx_like() -> bytes:
    return b"\x08\x07\x12\x07pytorch" + bytes(100)


FOREIGN: dict[str, tuple[bytes, str]] = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "gguf": (b"GGUF" + struct.pack("<IQQ", 3, 2, 1) + bytes(200), "GGUF file.*gguf_file"),
    "onnx": (onnx_like(), "ONNX file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(200), "HDF5 file.*h5py"),
    "npy": (b"\x93NUMPY\x01\0", "NumPy array"),
    "gzip": (gzip.compress(b"x"), "gzip.*gunzip"),
    "html": (b"\n<!DOCTYPE html><html>Google Drive</html>", "web page.*download"),
    "empty": (b"", "is empty"),
    "flax": (b"\x81\xa6params\x80", "msgpack file.*Flax"),
    "zip": (zipped(policy__pth=b"x", data=b"{}"), r"zip archive with policy.pth inside.*unzip"),
    "keras": (zipped(model__weights__h5=b"x", config__json=b"{}"), "Keras file"),
    "tar": (tarred(), "tar archive.*tar -xf"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(50), "TensorFlow Lite"),
    "tensorflow": (bytes(50) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "TensorFlow checkpoint"),
}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_formats_of_other_programs_are_named_with_a_cure(tmp_path: Path, kind: str, name: str) -> None:
    content, expected = FOREIGN[kind]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(content)
    for source in (tmp_path / "mine" / name, tmp_path / "mine"):
        with pytest.raises(InputError, match=expected) as error:
            collect_from(source, tmp_path / "zoo")
        assert "weights_only" not in str(error.value) and not (tmp_path / "zoo").exists()


def test_cures_for_other_formats_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command or line of Python in these messages is run as it stands."""
    monkeypatch.chdir(tmp_path)

    def cure_of(file: str) -> str:
        with pytest.raises(InputError) as error:
            read_state_dict(file)
        return str(error.value).partition("; ")[2]

    plain, torn = state(), io.BytesIO()
    torch.save(plain, torn)
    Path("a.pth.gz").write_bytes(gzip.compress(torn.getvalue()))
    Path("b.zip").write_bytes(zipped(policy__pth=torn.getvalue(), data=b"{}"))
    with tarfile.open("c.tar", "w") as archive:
        Path("inside.pth").write_bytes(torn.getvalue())
        archive.add("inside.pth")
    Path("inside.pth").unlink()
    torch.jit.save(torch.jit.script(network()), "d.pt")
    np.savez("e.npz", **{name: value.numpy() for name, value in plain.items()})
    subprocess.run(cure_of("a.pth.gz").removeprefix("unpack it with "), shell=True, check=True)
    unzip = cure_of("b.zip").removeprefix("unpack it with ").partition(" and collect")[0]
    with zipfile.ZipFile(unzip.split()[1]) as archive:  # what unzip does, where there is no unzip
        archive.extractall(unzip.split()[3])
    subprocess.run(cure_of("c.tar").removeprefix("unpack it with "), shell=True, check=True)
    exec(cure_of("d.pt").partition("alone: ")[2], {"torch": torch})
    call = cure_of("e.npz").partition("tensors: ")[2].replace("FILE", "'e.npz'").replace("NAME", "e")
    exec(call, {"numpy": np, "safetensors": safetensors})
    for file in ("a.pth", "b-files/policy.pth", "inside.pth", "d.state.pt", "e.safetensors"):
        assert torch.equal(read_state_dict(file)["2.weight"], plain["2.weight"]), file
    torch.save(network(), "f.pt")
    line = cure_of("f.pt").partition("alone: ")[2].replace("FILE", "'f.state.pt'")
    exec(line, {"torch": torch, "network": network()})
    assert list(read_state_dict("f.state.pt")) == NAMES


def test_the_cure_of_gguf_cures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    Path("FOLDER").mkdir()
    writer = gguf.GGUFWriter("FOLDER/NAME.gguf", "llama")
    for name, value in {
        "context_length": 16, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32, "head_count": 2,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4, "vocab_size": 8,
        "rope_dimension_count": 16,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    block = [
        *(f"attn_{each}" for each in ("q", "k", "v", "output")),
        *(f"ffn_{each}" for each in ("gate", "up", "down")),
    ]
    shapes = {"token_embd": (8, 32), "output": (8, 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {"blk.0.ffn_norm": (32,), **{f"blk.0.{each}": (32, 32) for each in block}}
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="GGUF") as error:
        read_state_dict("FOLDER/NAME.gguf")
    exec(str(error.value).partition("read it: ")[2], {"torch": torch, "AutoModelForCausalLM": AutoModelForCausalLM})
    found = read_state_dict("NEW.pth")
    assert len(found) == len(tensors) and torch.equal(found["lm_head.weight"], tensors["output"])


def test_the_cures_of_hdf5_and_onnx_cure(tmp_path: Path) -> None:
    """What the messages say, done: tensors read with the format's own library and saved by name."""
    import h5py
    import onnx

    plain = state()
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        for name, value in plain.items():
            file[name] = value.numpy()
    graph = onnx.helper.make_graph(
        [], "network", [], [], [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in plain.items()]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "network.onnx")
    for source in ("weights.h5", "network.onnx"):
        with pytest.raises(InputError, match="by name.*(h5py|onnx)|(h5py|onnx).*by name"):
            read_state_dict(tmp_path / source)
    with h5py.File(tmp_path / "weights.h5") as file:
        read = {name: torch.from_numpy(file[name][()]) for name in file}
    safetensors.torch.save_file(read, tmp_path / "h5.safetensors")
    initializers = onnx.load(tmp_path / "network.onnx").graph.initializer
    read = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in initializers}
    safetensors.torch.save_file(read, tmp_path / "onnx.safetensors")
    for made in ("h5", "onnx"):
        found = read_state_dict(tmp_path / f"{made}.safetensors")
        assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


class Call:
    """Anything that is called when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def hidden_call(trace: str) -> Any:
    return Call(getattr, Call(__import__, "os"), "mkdir"), trace


@pytest.mark.parametrize("old", [False, True])
def test_nothing_is_run(tmp_path: Path, old: bool) -> None:
    trace = tmp_path / "trace"
    for bomb in (
        Call(os.mkdir, str(trace)),
        Call(os.system, f"mkdir {trace}"),
        Call(eval, f"__import__('os').mkdir({str(trace)!r})"),
        Call(subprocess.check_call, ["mkdir", str(trace)]),
        Call(torch.load, str(trace)),
        Call(pathlib.Path.mkdir, trace),
        Call(functools.partial(os.mkdir, str(trace))),
        Call(torch.hub.load, str(trace)),
        Call(np.save, str(trace), 1),
    ):
        torch.save({"model": state(), "b": bomb}, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        try:
            assert list(read_state_dict(tmp_path / "a.pt")) == NAMES
        except InputError as error:
            assert "holds code" in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_classes_are_not_changed_by_what_a_pickle_builds(tmp_path: Path) -> None:
    """BUILD on something that torch gave would set attributes of it for the whole process."""
    before = dict(vars(torch._utils._rebuild_tensor_v2))
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\0\0\0aK\x01s\x86b."
    (tmp_path / "a.pkl").write_bytes(code)
    with pytest.raises(InputError):
        read_state_dict(tmp_path / "a.pkl")
    assert dict(vars(torch._utils._rebuild_tensor_v2)) == before


def test_files_without_weights_are_told_apart(tmp_path: Path) -> None:
    for content in ({"lr": 1}, optimizer(), {"cpu": torch.get_rng_state()}, [1], Settings(), {}, {"state_dict": {}}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(NoWeightsError):
            read_state_dict(tmp_path / "a.pt")
    torch.save(list(state().values()), tmp_path / "a.pt")
    with pytest.raises(InputError, match="a list of tensors without names") as error:
        read_state_dict(tmp_path / "a.pt")
    assert not isinstance(error.value, NoWeightsError)


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x04", b"\x1f\x8b", b"\x82\xa5", b"\x08\x07\x12", b"BZh"])
def test_the_length_of_a_header_is_no_other_format(tmp_path: Path, start: bytes) -> None:
    """A header of 640 bytes begins as a pickle of protocol 2 does."""
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    length = int.from_bytes(start, "little")
    header = json.dumps({"w": tensor, "__metadata__": {"note": ""}}).encode()
    header = json.dumps({"w": tensor, "__metadata__": {"note": "x" * (length - len(header))}}).encode()
    for name in ("a.safetensors", "a.bin", "a"):
        (tmp_path / name).write_bytes(length.to_bytes(8, "little") + header + struct.pack("<2f", 1, 2))
        assert read_state_dict(tmp_path / name)["w"].tolist() == [1, 2]


def test_a_safetensors_file_of_another_name_is_adopted_where_it_lies(tmp_path: Path) -> None:
    safetensors.torch.save_file(state(), tmp_path / "pytorch_model.bin")
    zoo = collect_from(tmp_path / "pytorch_model.bin", tmp_path / "zoo")
    assert zoo.entries[0].external and torch.equal(zoo.state_dict(0)["0.bias"], state()["0.bias"])
    assert Checkpoint.open(tmp_path / "pytorch_model.bin").tensor("0.bias").shape == (4,)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "x.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(InputError, match="has no checkpoint in it"):
        collect_from(tmp_path / "index", tmp_path / "other")
