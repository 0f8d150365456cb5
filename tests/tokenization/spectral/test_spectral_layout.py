"""Spectral tokens: exact where the directions span the zoo, best of their rank where they do not."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.tokenization.layout.test_properties import zoos
from tokenization.errors import InputError
from tokenization.layout.directions import DIRECTIONS
from tokenization.layout.layout import TokenLayout
from tokenization.layout.placement import TokenOptions
from tokenization.layouts import (
    SpectralLayout,
    checkpoint_writer,
    fit_layout,
    layout_without_statistics,
    load_layout,
    token_reader,
)
from tokenization.zoo.zoo import Zoo

KINDS = ("token", "network")


def spectral(options: TokenOptions, **changes: object) -> TokenOptions:
    """The same cut, in fp32 directions unless said otherwise."""
    fields = {"rank": 100, "basis_dtype": "fp32", "normalization": "residual", **changes}
    names = ("size", "include", "exclude", "pack", "flatten")
    return TokenOptions(**{name: getattr(options, name) for name in names}, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Zoo:
    """Twelve checkpoints that vary in five directions of the whole network, and a little in all others."""
    zoo = Zoo.create(tmp_path_factory.mktemp("spectral") / "zoo")
    rng = torch.Generator().manual_seed(0)
    directions = torch.randn(5, 40 * 30 + 40, generator=rng)
    for step in range(12):
        weights = torch.randn(5, generator=rng) * torch.tensor([5.0, 4, 3, 2, 1])
        flat = weights @ directions + 0.01 * torch.randn(40 * 30 + 40, generator=rng)
        zoo.append({"fc.weight": flat[:1200].view(40, 30), "fc.bias": flat[1200:]}, run=0, step=step)
    return zoo


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(zoos(), st.sampled_from(KINDS))
def test_all_directions_give_back_every_checkpoint(case, kind):
    state_dicts, options = case
    if len(state_dicts) < 2:
        return
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.create(Path(folder) / "zoo")
        for step, state_dict in enumerate(state_dicts):
            zoo.append(state_dict, run=0, step=step)
        layout = fit_layout(zoo, spectral(options, basis=kind))
        plain = TokenLayout.fit(zoo, spectral(options, rank=None))
        layout.save(folder)
        loaded = load_layout(folder)
        reader = token_reader(zoo, layout)
        every = torch.stack([plain.encode(zoo.checkpoint(number)) for number in range(len(state_dicts))])
        # n networks have n - 1 directions about their mean; what a float32 mean leaves of it is in none of them.
        off_centre = float(every.double().mean(0).abs().max())
        for number, expected in enumerate(every):
            coefficients = reader.read([number], range(layout.num_tokens))[0]
            size = float(expected.abs().max()) + 1e-30
            rows = torch.cat([rows for _, rows in layout.expand(coefficients, 0, layout.num_tokens)])
            assert float((rows - expected).abs().max()) <= 1e-4 * size + off_centre
            decoded = loaded.decode(coefficients)
            assert list(decoded) == list(state_dicts[number])
            projected = loaded.encode(zoo.checkpoint(number))
            assert torch.equal(projected[~loaded.mask], torch.zeros_like(projected[~loaded.mask]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_directions_are_those_of_a_singular_value_decomposition(zoo, kind, rank):
    options = TokenOptions(size=100, rank=rank, basis=kind, basis_dtype="fp32")
    layout = SpectralLayout.fit(zoo, options)
    plain = TokenLayout.fit(zoo, TokenOptions(size=100))
    tokens = torch.stack([plain.encode(zoo.checkpoint(i)) for i in range(len(zoo))]).double()  # [n, L, D]
    parts = [tokens[:, i] for i in range(plain.num_tokens)] if kind == "token" else [tokens.flatten(1)]
    kept = total = 0.0
    for part, own in zip(parts, layout.basis.variance, strict=True):
        values = torch.linalg.svdvals(part).square() / len(zoo)
        assert torch.allclose(own, values[:rank], rtol=1e-6, atol=1e-9)
        kept, total = kept + float(values[:rank].sum()), total + float(values.sum())
    assert layout.basis.share == pytest.approx(kept / total)
    # What is lost of the zoo is exactly the variance that is not kept.
    lost = 0.0
    for number in range(len(zoo)):
        rows = [
            rows
            for _, rows in layout.expand(
                token_reader(zoo, layout).read([number], range(layout.num_tokens))[0], 0, layout.num_tokens
            )
        ]
        lost += float((torch.cat(rows) - tokens[number]).square().sum()) / len(zoo)
    assert lost == pytest.approx(total - kept, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_automatic_rank_keeps_the_share(zoo, kind):
    layouts = [
        SpectralLayout.fit(zoo, TokenOptions(size=100, rank="auto", basis=kind, rank_share=s)) for s in (0.6, 0.9999)
    ]
    for layout, share in zip(layouts, (0.6, 0.9999), strict=True):
        assert layout.basis.share >= share
        less = SpectralLayout.fit(zoo, TokenOptions(size=100, rank=max(1, layout.token_size - 1), basis=kind))
        assert layout.token_size == 1 or less.basis.share < share
    assert layouts[1].token_size == 5


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_have_unit_size_and_training_reads_no_checkpoint(zoo, kind, tmp_path):
    layout = SpectralLayout.fit(zoo, TokenOptions(size=100, rank=4, basis=kind))
    reader = token_reader(zoo, layout)
    rows = reader.read(range(len(zoo)), range(layout.num_tokens))
    assert torch.allclose(rows.square().mean((0, 2)), torch.ones(layout.num_tokens), atol=1e-5)
    assert torch.equal(reader.read([3], [[layout.num_tokens - 1, 0]])[0], rows[3, [layout.num_tokens - 1, 0]])
    layout.cut.checkpoint = None  # type: ignore[assignment, method-assign]
    assert torch.equal(reader.read([5], [0]), rows[5:6, :1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_file_is_the_decoded_checkpoint(zoo, kind, tmp_path):
    layout = SpectralLayout.fit(zoo, TokenOptions(size=100, rank=4, basis=kind, pack=True))
    coefficients = torch.randn(layout.num_tokens, 4)
    with checkpoint_writer(tmp_path / "out.safetensors", pickle.loads(pickle.dumps(layout))) as writer:
        for first in reversed(range(0, layout.num_tokens, 5)):
            writer.write(first, coefficients[first : first + 5])
    written, decoded = load_file(tmp_path / "out.safetensors"), layout.decode(coefficients)
    assert all(torch.equal(written[name], decoded[name]) for name in layout.names)
    batch = layout.decode_batch(coefficients.expand(2, -1, -1))
    assert torch.allclose(batch["fc.weight"][1], decoded["fc.weight"], atol=1e-6)
    with pytest.raises(ValueError, match="must be|does not fit"):
        layout.decode(coefficients[:, :3])


def test_half_precision_directions_lose_less_than_a_hundredth(zoo):
    exact = SpectralLayout.fit(zoo, TokenOptions(size=100, rank=5, basis_dtype="fp32"))
    half = SpectralLayout.fit(zoo, TokenOptions(size=100, rank=5))
    assert half.basis.directions.flat(DIRECTIONS).dtype == torch.bfloat16
    for first, second in zip(
        exact.decode(exact.encode(zoo.checkpoint(0))).values(),
        half.decode(half.encode(zoo.checkpoint(0))).values(),
        strict=True,
    ):
        assert float((first - second).norm() / first.norm()) < 0.01


def test_a_checkpoint_from_outside_is_projected(zoo):
    layout = SpectralLayout.fit(zoo, TokenOptions(size=100, rank=3, basis_dtype="fp32"), indices=range(8))
    outside = layout.encode(zoo.checkpoint(11))
    assert torch.allclose(layout.encode(layout.decode(outside)), outside, atol=1e-4)
    assert torch.equal(token_reader(zoo, layout).read([11], range(layout.num_tokens))[0], outside)


def test_unmeasured_sizes_are_the_fitted_ones(zoo):
    for kind in KINDS:
        options = TokenOptions(size=100, rank=30, basis=kind)
        unmeasured, fitted = layout_without_statistics(zoo.checkpoint(0), options, len(zoo)), fit_layout(zoo, options)
        assert (unmeasured.num_tokens, unmeasured.token_size) == (fitted.num_tokens, fitted.token_size)
        assert torch.equal(unmeasured.positions, fitted.positions) and fitted.token_size == 11


def test_impossible_ranks_are_refused(zoo, tmp_path):
    for wrong in ({"rank": 0}, {"rank": "all"}, {"rank": 2, "normalization": "layer"}, {"rank": 2, "rank_share": 0}):
        with pytest.raises(ValueError, match="rank"):
            TokenOptions(**wrong)
    with pytest.raises(InputError, match="two or more"):
        fit_layout(zoo, TokenOptions(rank=2), [0])
