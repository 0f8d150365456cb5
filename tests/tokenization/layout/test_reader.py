from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.layout import rows as rows_module
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.rows import TokenReader, read_rows
from tokenization.zoo.zoo import Zoo

CUTS = [("layer", False), ("layer", True), ("channel", False), ("channel", True), ("flat", False)]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Zoo:
    zoo = Zoo.create(tmp_path_factory.mktemp("reader") / "zoo")
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        zoo.append(
            {
                "conv.weight": torch.randn(12, 40, 3, 3, generator=generator),
                "conv.bias": torch.randn(12, generator=generator).half(),
                "bn.running_var": torch.rand(12, generator=generator),
                "fc.weight": torch.randn(50, 37, generator=generator).bfloat16(),
                "fc.bias": torch.randn(50, generator=generator).double(),
                "count": torch.tensor(step),
            },
            run=0,
            step=step,
        )
    return zoo


@pytest.mark.parametrize("normalization", ["residual", "layer", "none"])
@pytest.mark.parametrize(("flatten", "pack"), CUTS)
@pytest.mark.parametrize("size", [5, 64, 5000])
@pytest.mark.parametrize("long_stretch", [16, 10**6])
def test_rows_are_those_of_encode(zoo: Zoo, monkeypatch, normalization, flatten, pack, size, long_stretch):
    monkeypatch.setattr(rows_module, "LONG_STRETCH", long_stretch)
    layout = TokenLayout.fit(zoo, TokenOptions(size=size, normalization=normalization, flatten=flatten, pack=pack))
    encoded = torch.stack([layout.encode(zoo.checkpoint(i)) for i in range(len(zoo))])
    checkpoint_ids = torch.tensor([2, 0, 2])
    shared = torch.randint(layout.num_tokens, (9,))
    own = torch.randint(layout.num_tokens, (3, 9))
    for cache_bytes in (0, 1 << 30):
        reader = TokenReader(zoo, layout, cache_bytes)
        assert torch.equal(reader.read(checkpoint_ids, shared), encoded[checkpoint_ids][:, shared])
        assert torch.equal(reader.read(checkpoint_ids.tolist(), own), encoded[checkpoint_ids[:, None], own])
    assert torch.equal(read_rows(layout, zoo, [1], range(layout.num_tokens))[0], encoded[1])


def test_no_rows_are_no_error(zoo: Zoo):
    layout = TokenLayout.fit(zoo, TokenOptions(size=16))
    for cache_bytes in (0, 1 << 30):
        reader = TokenReader(zoo, layout, cache_bytes)
        assert reader.read([], [0, 1]).shape == (0, 2, 16)
        assert reader.read([0], []).shape == (1, 0, 16)


@pytest.mark.parametrize(
    ("checkpoint_ids", "token_ids"), [([4], [0]), ([-1], [0]), ([0], [10**6]), ([0], [-1]), ([0], [[0], [1]])]
)
def test_ids_out_of_range_are_refused(zoo: Zoo, checkpoint_ids, token_ids):
    with pytest.raises(IndexError, match="must lie in|must be"):
        TokenReader(zoo, TokenLayout.fit(zoo, TokenOptions(size=16))).read(checkpoint_ids, token_ids)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_threads_and_pickled_copies_read_the_same(zoo: Zoo, cache_bytes: int):
    layout = TokenLayout.fit(zoo, TokenOptions(size=16))
    reader = TokenReader(zoo, layout, cache_bytes)
    expected = TokenReader(zoo, layout, cache_bytes).read(range(4), range(layout.num_tokens))
    with ThreadPoolExecutor(8) as pool:
        for rows in pool.map(lambda _: reader.read(range(4), range(layout.num_tokens)), range(16)):
            assert torch.equal(rows, expected)
    copy = pickle.loads(pickle.dumps(reader))
    assert torch.equal(copy.read(range(4), range(layout.num_tokens)), expected)


class Rows(Dataset):
    def __init__(self, reader: TokenReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader.zoo)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.reader.read([index], range(self.reader.layout.num_tokens))[0]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_loader_workers_read_the_same(zoo: Zoo, method: str, cache_bytes: int):
    layout = TokenLayout.fit(zoo, TokenOptions(size=16))
    reader = TokenReader(zoo, layout, cache_bytes)
    expected = reader.read(range(4), range(layout.num_tokens))
    loader = DataLoader(Rows(reader), batch_size=2, num_workers=2, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_released_pages_come_back_with_the_files_bytes(tmp_path: Path):
    zoo = Zoo.create(tmp_path / "zoo")
    zoo.append({"a": torch.randn(3), "b": torch.randn(100_000), "c": torch.randn(7)}, run=0, step=0)
    checkpoint = Checkpoint.open(zoo.file(0))
    before = checkpoint.state_dict()
    for name in before:
        checkpoint.release(name)
        checkpoint.release(name, 1, 2)
    for name, tensor in checkpoint.state_dict().items():
        assert torch.equal(tensor, before[name])
