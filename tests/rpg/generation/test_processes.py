"""Generation over several processes, and of many networks: the same bytes, and no more memory."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from rpg import cli
from rpg.config import GenerateConfig
from rpg.devices import Partition
from rpg.generation.folders import WEIGHTS_NAME
from rpg.generation.generator import Generator
from rpg.generation.sampler import TokenSampler, low_precision_copy
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tests.processes import in_two_processes
from tokenization.errors import InputError
from tokenization.zoo.locks import LOCK_NAME


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A generator whose tiles are smaller than a network of 12 tokens."""
    folder = tmp_path_factory.mktemp("processes")
    make_zoo(folder / "zoo")
    config = small_config(folder, generate={"tile_tokens": 5}, train={"steps": 2})
    train(config)
    return Path(config.run)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_two_processes_write_the_files_of_one(run, tmp_path):
    """Three networks: one whole each, the tiles of the third spread over both."""

    def generate() -> None:
        sys.argv = ["rpg", "generate", str(run), "-n", "3", "--seed", "7", "--output", str(tmp_path / "two")]
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code

    Generator.from_pretrained(run).generate(3, seed=7, output=tmp_path / "one")
    in_two_processes(generate)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


@pytest.mark.slow
def test_of_launched_processes_one_speaks(run, tmp_path):
    Generator.from_pretrained(run).generate(3, seed=7, output=tmp_path / "one")
    command = [Path(sys.executable).with_name("torchrun"), "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "rpg", "generate", run, "-n", "3", "--seed", "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    made = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "two")],
        check=True, env=environment, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert made.stdout.count("3 network(s)") == 1


@pytest.mark.parametrize("tile_tokens", [5, 12, 40])
@pytest.mark.parametrize("num", [1, 3, 8])
def test_the_shares_of_all_processes_are_every_tile_once(run, num, tile_tokens):
    generator = Generator.from_pretrained(run)
    sampler = TokenSampler(generator.network, generator.layout, GenerateConfig(tile_tokens=tile_tokens))
    whole = list(sampler.tiles(num))
    parts = [list(sampler.tiles(num, Partition(rank, 3))) for rank in range(3)]
    assert sorted((tile for part in parts for tile in part), key=lambda t: (t.network, t.token)) == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("adapters", [False, True])
def test_what_a_killed_process_left_goes_with_the_next_run(run, tmp_path, adapters):
    generator = Generator.from_pretrained(run)
    child = os.fork()
    if child == 0:
        generator.generate(2, output=tmp_path, progress=lambda done, total: os._exit(9))  # in the first network
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left, lock = sorted(tmp_path.iterdir(), reverse=True)
    assert lock.name == LOCK_NAME and left.name.startswith(".network-00000") and f".{child}." in left.name
    others = [left.name.replace(f".{child}.", f".{os.getppid()}."), left.name.replace(f".{child}.", f".far.{child}.")]
    if adapters:  # which are folders
        left.unlink()
        left.mkdir()
        (left / WEIGHTS_NAME).touch()
    for name in others:
        (tmp_path / name).touch()
    generator.generate(1, output=tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted([*others, "network-00000.safetensors"])


def test_several_processes_need_a_folder(run):
    with pytest.raises(InputError, match="output"):
        Generator.from_pretrained(run).generate(2, partition=Partition(0, 2))


def test_many_networks_take_the_memory_of_few(run, tmp_path):
    generator = Generator.from_pretrained(run)
    process = psutil.Process()
    generator.generate(20, output=tmp_path)  # whatever is allocated once, is
    gc.collect()
    before = process.memory_info().rss
    highest = 0

    def watch(done: int, total: int) -> None:
        nonlocal highest
        highest = max(highest, process.memory_info().rss)

    paths = generator.generate(200, output=tmp_path, progress=watch)
    assert len(paths) == 200 and all(path.is_file() for path in paths)
    assert highest - before < 4 << 20


def test_weights_rounded_once_give_what_autocast_gives(run):
    network = Generator.from_pretrained(run).network
    torch.manual_seed(0)
    torch.nn.init.normal_(network.denoiser.output.weight)
    copy = low_precision_copy(network)
    assert copy.denoiser.input.weight.dtype == torch.bfloat16 and network.denoiser.input.weight.dtype == torch.float32
    assert copy.position_embedding is network.position_embedding
    x, prototype, time = torch.randn(7, 16), torch.randn(7, 32), torch.tensor(300.0).expand(7)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        one, two = (each.predict(x, time, each.denoiser.precompute(prototype), None) for each in (network, copy))
    assert one.abs().max() > 0.1 and torch.equal(one, two)


def test_every_tile_is_computed_in_the_precision_asked_for(run, monkeypatch):
    """Not only the first: a generator that yields out of inference mode loses autocast."""
    generator = Generator.from_pretrained(run)
    sampler = TokenSampler(generator.network, generator.layout, GenerateConfig(tile_tokens=5, precision="bf16"))
    seen = []
    predict = sampler.network.predict
    monkeypatch.setattr(
        sampler.network, "predict", lambda *a: (seen.append(torch.is_autocast_enabled("cpu")), predict(*a))[1]
    )
    request = generator.request(2)
    tiles = list(sampler.sample(request))
    assert len(tiles) == 6 and len(seen) == 6 * request.steps and all(seen)
    assert not torch.is_autocast_enabled("cpu")
