"""Pruned and quantised zoos: into tokens and back, on disk, and in plain PyTorch."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from tokenization.compressed.form import Compressed, dense
from tokenization.compressed.parts import Kind, cut_mask, new_part, quantised, share_out
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout
from tokenization.layout.placement import TokenOptions
from tokenization.layout.rows import TokenReader
from tokenization.layout.verify import verify_round_trip
from tokenization.layouts import checkpoint_writer, fit_layout, load_layout, with_sparsity
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo

KINDS: tuple[Kind, ...] = ("mask", "zeros", "csr", "int8", "int4")
PRUNED = KINDS[:3]


def plain(seed: int) -> nn.Sequential:
    """Two layers; the rows of the first have an odd length, so that the last byte of 4-bit codes is half used."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5))


def compressed(kind: Kind, network: nn.Module, sparsity: float = 0.6) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, weight in network.state_dict().items():
        if weight.ndim < 2:
            stored[name] = weight
        elif kind in PRUNED:
            mask = cut_mask(weight.abs(), sparsity)
            stored |= new_part(kind, name, weight, int(mask.sum())).masked(weight, mask)
        else:
            codes, scale = quantised(weight, int(kind[3:]))
            stored |= new_part(kind, name, weight).restore(codes, scale.log())
    return stored


def zoo_at(path: Path, kind: Kind, num: int = 5) -> Zoo:
    zoo = Zoo.create(path)
    for seed in range(num):
        zoo.append(compressed(kind, plain(seed)), run=seed, step=0)
    return zoo


def options(kind: Kind, **more: object) -> TokenOptions:
    return TokenOptions(size=8, pruned=("*.weight",) if kind == "zeros" else (), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_hold_the_checkpoint_bit_for_bit(kind: Kind, tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo", kind)
    layout = TokenLayout.fit(zoo, options(kind))
    layout.save(tmp_path)
    loaded = load_layout(tmp_path)
    for index in range(len(zoo)):
        original, tokens = zoo.state_dict(index), layout.encode(zoo.checkpoint(index), torch.float64)
        assert torch.equal(tokens, layout.encode(original, torch.float64))
        path = tmp_path / "new.safetensors"
        with checkpoint_writer(path, loaded, {"by": "test"}) as writer:
            writer.write(0, tokens)
        for found in (layout.decode(tokens), load_file(path)):
            assert sorted(found) == sorted(original)
            assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in original.items())
        assert abs(path.stat().st_size - zoo.checkpoint(index).path.stat().st_size) < 64  # the metadata
    trip = verify_round_trip(zoo, layout)
    assert trip.num_exact == trip.num_values
    ids = torch.arange(layout.num_tokens)
    reader = pickle.loads(pickle.dumps(TokenReader(zoo, layout)))
    assert torch.equal(reader.read([3], ids)[0], layout.encode(zoo.checkpoint(3)))
    assert json.loads((tmp_path / "layout.json").read_text())["version"] == 2
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("kind", KINDS)
def test_spectral_tokens_hold_it_too(kind: Kind, tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo", kind)
    layout = fit_layout(zoo, options(kind, rank="auto", rank_share=1.0, basis="network", basis_dtype="fp32"))
    for index in (0, 4):
        expected, found = dense(zoo.state_dict(index)), dense(layout.decode(layout.encode(zoo.checkpoint(index))))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
            assert torch.equal(found[name] == 0, value == 0)


@pytest.mark.parametrize("kind", PRUNED)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_masks_are_cut_at_the_wished_share(kind: Kind, sparsity: float, tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path / "zoo", kind)
    layout = with_sparsity(fit_layout(zoo, options(kind)), sparsity)
    tokens = torch.randn(layout.num_tokens, layout.token_size)
    path = tmp_path / "new.safetensors"
    with checkpoint_writer(path, layout) as writer:
        writer.write(0, tokens)
    network = dense(load_file(path))
    weights = torch.cat([network[name].flatten() for name in ("0.weight", "2.weight")])
    assert int((weights == 0).sum()) == round(sparsity * len(weights))


def test_a_share_that_is_none_and_networks_without_masks_are_refused(tmp_path: Path) -> None:
    layout = fit_layout(zoo_at(tmp_path / "csr", "csr"), options("csr"))
    for sparsity in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="share of zeros; give one of 0 to 1"):
            with_sparsity(layout, sparsity)
    with pytest.raises(InputError, match="not pruned"):
        with_sparsity(fit_layout(zoo_at(tmp_path / "int8", "int8"), options("int8")), 0.5)


@pytest.mark.parametrize("kind", ["mask", "zeros"])
def test_a_zoo_of_several_shares_gives_each_its_own(kind: Kind, tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    for seed in range(4):
        zoo.append(compressed(kind, plain(seed), 0.5 + 0.1 * seed), run=seed, step=0)
    layout = TokenLayout.fit(zoo, options(kind))
    for index in range(4):
        decoded = dense(layout.decode(layout.encode(zoo.checkpoint(index))))
        assert all(torch.equal(decoded[n] == 0, t == 0) for n, t in dense(zoo.state_dict(index)).items())


def test_torchs_own_pruning_is_adopted_and_loads_into_pruned_modules(tmp_path: Path) -> None:
    networks = [plain(seed) for seed in range(3)]
    for seed, network in enumerate(networks):
        for layer in (network[0], network[2]):
            prune.l1_unstructured(layer, "weight", amount=0.5)
        torch.save(network.state_dict(), tmp_path / f"{seed}.pth")
    zoo = collect_from(str(tmp_path / "*.pth"), tmp_path / "zoo")
    layout = TokenLayout.fit(zoo, options("mask"))
    generated = layout.decode(layout.encode(zoo.checkpoint(1)))
    empty = plain(9)
    for layer in (empty[0], empty[2]):
        prune.identity(layer, "weight")
    empty.load_state_dict(generated)
    images = torch.randn(4, 7)
    torch.testing.assert_close(empty(images), networks[1](images))


def test_compressed_rows_are_a_sparse_weight(tmp_path: Path) -> None:
    network = plain(0)
    save_file(compressed("csr", network), tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    parts = [stored[f"0.weight_{name}"] for name in ("crow_indices", "col_indices", "values")]
    weight = torch.sparse_csr_tensor(*parts, size=stored["0.weight_shape"].tolist(), check_invariants=True)
    mask = cut_mask(network[0].weight.abs(), 0.6)
    assert torch.equal(weight.to_dense(), network[0].weight.detach() * mask)
    images = torch.randn(4, 7)
    torch.testing.assert_close(
        F.linear(images, weight, stored["0.bias"]), F.linear(images, weight.to_dense(), stored["0.bias"])
    )


def test_codes_of_8_bits_are_what_pytorchs_kernel_multiplies() -> None:
    network = plain(0)
    stored = compressed("int8", network)
    images = torch.randn(4, 7)
    found = torch.ops.aten._weight_int8pack_mm(images, stored["0.weight"], stored["0.weight_scale"])
    torch.testing.assert_close(found, images @ dense(stored)["0.weight"].T, rtol=1e-4, atol=1e-4)
    assert int(stored["0.weight"].abs().amax()) == 127
    error = (dense(stored)["0.weight"] - network[0].weight.detach()).abs()
    assert bool((error <= 0.5001 * stored["0.weight_scale"][:, None]).all())


def test_codes_of_4_bits_lie_two_in_a_byte() -> None:
    weight = torch.tensor([[7.0, -7.0, 3.0], [1.0, 0.0, -1.0]])
    codes, scale = quantised(weight, 4)
    stored = new_part("int4", "w", weight).restore(codes, scale.log())
    assert stored["w_packed"].tolist() == [[15 | 1 << 4, 11 | 8 << 4], [15 | 8 << 4, 1 | 8 << 4]]
    assert stored["w_scale"].tolist() == pytest.approx([1.0, 1 / 7]) and stored["w_shape"].tolist() == [2, 3]
    torch.testing.assert_close(dense(stored)["w"], weight)


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("mask", {"0.weight_mask": torch.full((6, 7), 0.5)}, "0.weight_mask has values other than 0 and 1"),
        ("csr", {"0.weight_col_indices": torch.full((17,), 9, dtype=torch.int32)}, "'0.weight' has indices"),
        ("csr", {"0.weight_shape": torch.tensor([3, 14])}, "do not make a weight|has shape"),
        ("csr", {"0.weight_crow_indices": torch.full((7,), -5, dtype=torch.int32)}, "'0.weight' has indices"),
        ("int8", {"0.weight_scale": torch.zeros(6)}, "0.weight_scale has values that are not above 0"),
        ("int4", {"0.weight_shape": torch.tensor([6, 700])}, "do not make a weight|has shape"),
    ],
)
def test_broken_ones_are_refused(kind: Kind, change: dict[str, Tensor], match: str, tmp_path: Path) -> None:
    broken = {**compressed(kind, plain(0)), **change}
    layout = fit_layout(zoo_at(tmp_path / "zoo", kind), options(kind))
    with pytest.raises(InputError, match=match):
        layout.encode(broken)
    zoo = Zoo.create(tmp_path / "broken")
    zoo.append(broken, run=0, step=0)
    with pytest.raises(InputError, match=match):
        TokenLayout.fit(zoo, options(kind))


def test_foreign_sparse_and_quantised_tensors_stay_refused(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"w": weight.to_sparse_csr()}, tmp_path / "sparse.pth")
    torch.save({"w": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)}, tmp_path / "quantised.pth")
    for name, what in (("sparse", "a sparse tensor"), ("quantised", "quantised|quantized|unreadable")):
        with pytest.raises(InputError, match=what) as error:
            collect_from(tmp_path / f"{name}.pth", tmp_path / "zoo")
        assert "\n" not in str(error.value)


def test_ordinary_names_are_no_compressed_weights(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    zoo.append({"a_mask": torch.ones(3), "b_orig": torch.ones(3), "n": torch.ones(3, dtype=torch.int8)}, run=0, step=0)
    assert Compressed.find(zoo.checkpoint(0)) is None
    network = zoo.state_dict(0)
    assert dense(network) is network
    with pytest.raises(InputError, match="tokens.pruned: 'c\\*' fits no tensor"):
        Compressed.find(zoo.checkpoint(0), ["c*"])


def test_living_weights_are_shared_out_in_full() -> None:
    assert share_out(10, [1, 1, 2], [100, 100, 100]) == [3, 2, 5] and share_out(0, [1, 1], [3, 3]) == [0, 0]
    assert share_out(12, [8, 1, 1], [4, 10, 10]) == [4, 4, 4] and share_out(6, [1, 5], [3, 3]) == [3, 3]
