"""Zoos of adapters in one canonical form: through layouts, readers, caches and folders."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenization.errors import InputError
from tokenization.layout.canonical import find_pairs
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.rows import TokenReader, read_rows
from tokenization.layout.verify import verify_round_trip
from tokenization.lora.adapter import CONFIG_NAME, product_distance
from tokenization.zoo.zoo import Zoo

A, B, MAGNITUDE = ("q.lora_A.weight", "q.lora_B.weight", "q.lora_magnitude_vector")
EMBEDDING = ("e.lora_embedding_A", "e.lora_embedding_B")
CONVOLUTION = ("c.lora_A.weight", "c.lora_B.weight")
RANK = 3


def adapter(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """An update of a linear layer with DoRA, of an embedding and of a convolution; the products of all are alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * spread).to(dtype)

    task, mix = draw(RANK, RANK, spread=0.1).double(), draw(RANK, RANK).double()
    base = torch.Generator().manual_seed(99)
    a, b = torch.randn(RANK, 10, generator=base).double(), torch.randn(8, RANK, generator=base).double()
    return {
        A: torch.linalg.solve(mix, a).to(dtype),
        B: (b @ (torch.eye(RANK) + task) @ mix).to(dtype),
        MAGNITUDE: draw(8),
        EMBEDDING[0]: draw(RANK, 12),
        EMBEDDING[1]: draw(6, RANK),
        CONVOLUTION[0]: draw(RANK, 2, 3, 3),
        CONVOLUTION[1]: draw(4, RANK, 1, 1),
    }


def zoo_at(path: Path, num: int = 5, dtype: torch.dtype = torch.float32) -> Zoo:
    zoo = Zoo.create(path)
    for seed in range(num):
        zoo.append(adapter(seed, dtype), run=seed, step=0)
    return zoo


def options(form: str, **others: object) -> TokenOptions:
    return TokenOptions(size=8, lora_canonical=form, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["svd", "aligned"])
def test_products_stay_and_tokens_hold_the_canonical_factors(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo", dtype=dtype)
    layout = TokenLayout.fit(zoo, options(form))
    assert layout.canonical is not None
    for index in range(len(zoo)):
        original, decoded = zoo.state_dict(index), layout.decode(layout.encode(zoo.checkpoint(index), torch.float64))
        canonical = layout.checkpoint(zoo, index).state_dict()
        assert list(decoded) == list(original) == list(canonical)
        for name, tensor in decoded.items():
            assert tensor.dtype == dtype and torch.equal(tensor, canonical[name])
        for a, b in ((A, B), EMBEDDING):
            distance, norm = product_distance(original[a], original[b], decoded[a], decoded[b])
            assert distance < 4 * torch.finfo(dtype).eps * norm and not torch.equal(original[a], decoded[a])
            left, right = decoded[a].double().norm(dim=1), decoded[b].double().norm(dim=0)
            torch.testing.assert_close(left.norm(), right.norm(), rtol=8 * torch.finfo(dtype).eps, atol=0)
        for name in (MAGNITUDE, *CONVOLUTION):
            assert torch.equal(original[name], decoded[name])
    trip = verify_round_trip(zoo, layout)
    assert trip.num_exact == trip.num_values


@pytest.mark.parametrize("form", ["svd", "aligned", "none"])
@pytest.mark.parametrize("normalization", ["residual", "layer"])
def test_rows_are_those_of_encode(form: str, normalization: str, tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo")
    layout = TokenLayout.fit(zoo, options(form, normalization=normalization), indices=[0, 1, 2])
    encoded = torch.stack([layout.encode(zoo.checkpoint(index)) for index in range(len(zoo))])
    from_memory = torch.stack([layout.encode(zoo.state_dict(index)) for index in range(len(zoo))])
    assert torch.equal(encoded, from_memory)
    assert torch.equal(layout.encode(layout.checkpoint(zoo, 1)), encoded[1])
    ids = torch.arange(layout.num_tokens)
    for reader in (TokenReader(zoo, layout), TokenReader(zoo, layout, cache_bytes=0)):
        assert torch.equal(reader.read(range(len(zoo)), ids), encoded)
        assert torch.equal(pickle.loads(pickle.dumps(reader)).read([4, 0], ids), encoded[[4, 0]])


def test_runs_of_one_product_have_one_encoding_only_in_canonical_form(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    first = adapter(0, torch.float64)
    for seed in range(3):
        mix = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(seed)).double()
        zoo.append({**first, A: torch.linalg.solve(mix, first[A]), B: first[B] @ mix}, run=seed, step=0)
    spread = {}
    for form in ("svd", "aligned", "none"):
        layout = TokenLayout.fit(zoo, options(form, include=("q.*",), normalization="none"))
        tokens = torch.stack([layout.encode(zoo.checkpoint(index), torch.float64) for index in range(3)])
        spread[form] = float(tokens.std(0).max())
    assert spread["svd"] < 1e-12 and spread["aligned"] < 1e-12 and spread["none"] > 0.1


def test_alignment_brings_unlike_adapters_nearer(tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo", num=8)
    spread = {}
    for form in ("svd", "aligned", "none"):
        layout = TokenLayout.fit(zoo, options(form, include=("q.lora_[AB].*",)))
        spread[form] = float(layout.statistics.scale.square().sum())
    assert spread["aligned"] < spread["svd"] < spread["none"]


@pytest.mark.parametrize("form", ["svd", "aligned", "none"])
def test_a_saved_layout_encodes_the_same(form: str, tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo")
    layout = TokenLayout.fit(zoo, options(form))
    (tmp_path / "layout").mkdir()
    layout.save(tmp_path / "layout")
    loaded = TokenLayout.load(tmp_path / "layout")
    new = adapter(77)
    assert torch.equal(loaded.encode(new), layout.encode(new))
    ids = torch.arange(layout.num_tokens)
    cached = sorted((tmp_path / "zoo" / "cache").iterdir())
    assert torch.equal(read_rows(loaded, zoo, range(5), ids), read_rows(layout, zoo, range(5), ids))
    assert sorted((tmp_path / "zoo" / "cache").iterdir()) == cached


def test_a_layout_that_does_not_say_how_its_pairs_are_is_refused(tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo")
    TokenLayout.fit(zoo, options("none")).save(tmp_path)
    content = json.loads((tmp_path / "layout.json").read_text())
    del content["options"]["lora_canonical"]
    (tmp_path / "layout.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"reference\.q\.lora_A\.weight' is missing"):
        TokenLayout.load(tmp_path)


def test_the_cache_is_used_and_may_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = zoo_at(tmp_path / "zoo")
    expected = TokenLayout.fit(zoo, options("aligned")).encode(zoo.checkpoint(2))
    cache = tmp_path / "zoo" / "cache"
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) == 2 + len(zoo)  # reference, statistics, and one an adapter
    again = Zoo.open(zoo.path)
    assert torch.equal(TokenLayout.fit(again, options("aligned")).encode(again.checkpoint(2)), expected)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    damaged = next(path for path in files if path.name.startswith("canonical"))
    damaged.write_bytes(damaged.read_bytes()[:50])
    for path in files:
        if path.name.startswith(("reference", "statistics")):
            path.unlink()
    again = Zoo.open(zoo.path)
    layout = TokenLayout.fit(again, options("aligned"))
    ids = torch.arange(layout.num_tokens)
    assert torch.equal(read_rows(layout, again, [2], ids)[0], expected)
    assert files.keys() == set(cache.iterdir())


def test_a_zoo_that_cannot_be_written_is_read_all_the_same(tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo")
    expected = TokenLayout.fit(zoo, options("aligned")).encode(zoo.checkpoint(1))
    other = zoo_at(tmp_path / "other")
    (tmp_path / "other" / "cache").write_text("in the way")
    layout = TokenLayout.fit(other, options("aligned"))
    ids = torch.arange(layout.num_tokens)
    assert torch.equal(read_rows(layout, other, [1], ids)[0], expected)
    assert (tmp_path / "other" / "cache").read_text() == "in the way"


def test_a_pair_of_which_one_side_is_constant_stays(tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo")
    layout = TokenLayout.fit(zoo, options("svd", exclude=("q.lora_A*",)))
    assert [a.name for a, _ in find_pairs(layout.layers, layout.options)] == [EMBEDDING[0]]
    assert torch.equal(layout.decode(layout.encode(zoo.checkpoint(3), torch.float64))[B], zoo.state_dict(3)[B])


def test_stacked_experts_are_refused(tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo")
    config = {"peft_type": "LORA", "r": RANK, "target_parameters": ["experts"]}
    (zoo.path / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"tokens\.lora_canonical: .*target_parameters.*'none'"):
        TokenLayout.fit(zoo, options("svd"))
    TokenLayout.fit(zoo, options("none"))


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo")
    layout = TokenLayout.fit(zoo, options("svd"))
    with pytest.raises(InputError, match=r"q\.lora_B\.weight.*NaN or infinite"):
        layout.encode({**adapter(0), B: torch.full((8, RANK), torch.nan)})
