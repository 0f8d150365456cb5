"""What holds for every structure, cut and normalisation."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.rows import CheckpointWriter, read_rows
from tokenization.zoo.zoo import Zoo

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

tensors = st.tuples(
    st.sampled_from([*FLOATS, torch.int64]),
    st.lists(st.integers(1, 7), max_size=4).map(tuple),
    st.sampled_from([1.0, 1e-4, 1e3]),  # size of the values
    st.sampled_from([0.0, 1e-3, 1.0]),  # their spread over the zoo
    st.sampled_from(["weight", "bias", "running_var"]),
)
cuts = st.tuples(st.sampled_from(["layer", "channel", "flat"]), st.booleans()).filter(lambda cut: cut != ("flat", True))


@st.composite
def zoos(draw) -> tuple[list[dict[str, Tensor]], TokenOptions]:
    structure = [*draw(st.lists(tensors, max_size=6)), (torch.float32, (2, 3), 1.0, 1.0, "weight")]
    flatten, pack = draw(cuts)
    options = TokenOptions(
        size=draw(st.integers(1, 40)),
        flatten=flatten,
        pack=pack,
        normalization=draw(st.sampled_from(["residual", "layer", "none"])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def values(dtype: torch.dtype, common: Tensor, spread: float, kind: str) -> Tensor:
        noisy = common * (1 + spread * torch.randn(common.shape, generator=generator, dtype=torch.float64))
        noisy[torch.rand(common.shape, generator=generator) < 0.1] = 0
        return (noisy.abs() if kind == "running_var" else noisy).to(dtype)

    commons = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * size for _, shape, size, _, _ in structure
    ]
    return [
        {
            f"{index}.{kind}": values(dtype, common, spread, kind) if dtype.is_floating_point else common.to(dtype)
            for index, ((dtype, _, _, spread, kind), common) in enumerate(zip(structure, commons, strict=True))
        }
        for _ in range(draw(st.integers(1, 3)))
    ], options


def bounds(layout: TokenLayout, index: int, original: Tensor, token_unit: float) -> Tensor:
    """The largest error that the layout promises for each value of a layer."""
    statistics = layout.layer_statistics(index)
    layer = layout.layers[index]
    values = original.double().flatten()
    if statistics.identity or not statistics.scale:
        return torch.zeros_like(values)
    centre = torch.as_tensor(statistics.centre, dtype=torch.float64).expand_as(values)
    if token_unit == 2.0**-52:
        reference = 0.05 * statistics.variance_mean if statistics.variance_mean else centre
        reference = torch.as_tensor(reference, dtype=torch.float64).abs().expand_as(values)
        error = 2.0**-46 * torch.maximum(values.abs(), reference)
        # Smaller than half a step of the stored dtype, an error is rounded away.
        exact = {torch.float64: np.inf, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-40, torch.float16: 0.0}
        return torch.where((values == 0) | (values.abs() >= exact[layer.dtype] * reference), 0.0, error)
    unit = max(token_unit, UNIT[layer.dtype])
    if statistics.variance_mean:
        return 15 * unit * (values.abs() + 0.05 * statistics.variance_mean) * (values != 0)
    tiny = torch.finfo(layer.dtype).smallest_normal * UNIT[layer.dtype]
    error = 1.5 * unit * torch.maximum(values.abs(), (values - centre).abs()) + tiny
    return torch.where(values == 0, 0.0, error)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(zoos())
def test_round_trips(case: tuple[list[dict[str, Tensor]], TokenOptions]):
    state_dicts, options = case
    with tempfile.TemporaryDirectory() as folder:
        zoo = Zoo.create(Path(folder) / "zoo")
        for step, state_dict in enumerate(state_dicts):
            zoo.append(state_dict, run=0, step=step)
        layout = TokenLayout.fit(zoo, options)
        layout.save(folder)
        layout = TokenLayout.load(folder)
        mask = layout.mask
        assert int(mask.sum()) == layout.num_values == sum(layer.num_values for layer in layout.layers)
        assert len({tuple(position) for position in layout.positions.tolist()}) == layout.num_tokens

        for number, original in enumerate(state_dicts):
            for dtype in (torch.float64, torch.float32):
                tokens = layout.encode(zoo.checkpoint(number), dtype)
                assert bool(torch.isfinite(tokens).all()) and not tokens[~mask].any()
                assert torch.equal(tokens, layout.encode(original, dtype))
                # Padding is nobody's: whatever it holds, the values are the same.
                decoded = layout.decode(torch.where(mask, tokens, torch.nan))
                assert list(decoded) == list(original)
                for index, layer in enumerate(layout.layers):
                    result = decoded[layer.name]
                    assert (result.dtype, tuple(result.shape)) == (layer.dtype, layer.shape)
                    if options.normalization == "none" and UNIT[dtype] > UNIT[layer.dtype]:
                        continue
                    error = (result.double() - original[layer.name].double()).flatten().abs()
                    assert bool((error <= bounds(layout, index, original[layer.name], UNIT[dtype])).all())
            for name in layout.constant_specs:
                assert torch.equal(decoded[name], state_dicts[0][name])
            rows = torch.randint(layout.num_tokens, (5,))
            assert torch.equal(read_rows(layout, zoo, [number], rows)[0], tokens[rows])

        path = Path(folder) / "out.safetensors"
        cut = layout.num_tokens // 2
        with CheckpointWriter(path, layout) as writer:
            writer.write(cut, tokens[cut:])
            writer.write(0, tokens[:cut])
        written = load_file(path)
        assert all(torch.equal(written[name], decoded[name]) for name in decoded)
