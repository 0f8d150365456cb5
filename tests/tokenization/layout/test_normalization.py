from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenization.errors import InputError
from tokenization.layout import normalization as fitting
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.normalization import LayerStatistics, Moments, fit_statistics
from tokenization.layout.placement import BLOCK_VALUES
from tokenization.zoo.zoo import Zoo


def make_zoo(path: Path, state_dicts: list[dict[str, Tensor]]) -> Zoo:
    zoo = Zoo.create(path / "zoo")
    for step, state_dict in enumerate(state_dicts):
        zoo.append(state_dict, run=0, step=step)
    return zoo


def random_dicts(num: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(BLOCK_VALUES + 77, generator=generator)
    return [
        {
            "weight": common + 0.01 * torch.randn(common.shape, generator=generator) + 0.3,
            "half": torch.randn(5, 6, generator=generator).half(),
            "constant": torch.full((9,), 0.1),
            "bn.running_var": torch.rand(8, generator=generator) + 0.01,
        }
        for _ in range(num)
    ]


def stacked(zoo: Zoo, name: str) -> np.ndarray:
    return np.stack([zoo.state_dict(i)[name].double().flatten().numpy() for i in range(len(zoo))])


def test_layer_statistics_are_mean_and_deviation_of_all_values(tmp_path: Path):
    zoo = make_zoo(tmp_path, random_dicts())
    statistics = TokenLayout.fit(zoo, TokenOptions(normalization="layer")).statistics
    for index, name in enumerate(["weight", "half", "constant"]):
        values = stacked(zoo, name)
        assert float(statistics.centre[index]) == pytest.approx(values.mean(), rel=1e-12)
        assert float(statistics.scale[index]) == pytest.approx(values.std() if name != "constant" else 0, rel=1e-12)


def test_residual_statistics_are_parameter_means_and_what_remains(tmp_path: Path):
    zoo = make_zoo(tmp_path, random_dicts())
    layout = TokenLayout.fit(zoo, TokenOptions(size=64))
    for index, name in enumerate(["weight", "half"]):
        values = stacked(zoo, name)
        statistics = layout.layer_statistics(index)
        np.testing.assert_allclose(statistics.centre, values.mean(0), rtol=1e-7, atol=1e-7)
        assert statistics.scale == pytest.approx(np.sqrt(((values - values.mean(0)) ** 2).mean()), rel=1e-9)
    tokens = torch.stack([layout.encode(zoo.checkpoint(i), torch.float64) for i in range(len(zoo))])
    rows = layout.positions[:, 0] == 0
    values = tokens[:, rows][:, layout.mask[rows]]
    assert values.mean(0).abs().max() < 1e-4 and values.square().mean().item() == pytest.approx(1, rel=1e-6)


def test_only_the_chosen_entries_are_measured(tmp_path: Path):
    zoo = make_zoo(tmp_path, random_dicts())
    layout = TokenLayout.fit(zoo, TokenOptions(normalization="layer"), indices=[1, 3])
    assert float(layout.statistics.centre[0]) == pytest.approx(stacked(zoo, "weight")[[1, 3]].mean(), rel=1e-12)


@pytest.mark.parametrize("normalization", ["layer", "residual"])
def test_the_number_of_threads_changes_nothing(tmp_path: Path, normalization):
    zoo = make_zoo(tmp_path, random_dicts())
    checkpoints = [zoo.checkpoint(i) for i in range(len(zoo))]
    layers = TokenLayout.without_statistics(checkpoints[0], TokenOptions()).layers
    results = []
    for num_threads in (1, 4):
        means: dict[tuple[str, int], Tensor] = {}
        numbers = fit_statistics(
            checkpoints, layers, normalization, lambda n, i, v, means=means: means.update({(n, i): v}), num_threads
        )
        results.append((torch.stack([numbers.centre, numbers.scale, numbers.variance_mean]), means))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in results[0][1])


def test_cutting_the_work_differently_changes_nothing_but_rounding(tmp_path: Path, monkeypatch):
    zoo = make_zoo(tmp_path, random_dicts())
    for normalization in ("layer", "residual"):
        results = []
        for job_values in (1, 1 << 25):
            monkeypatch.setattr(fitting, "JOB_VALUES", job_values)
            for cached in (zoo.path / "cache").glob("*"):
                cached.unlink()
            layout = TokenLayout.fit(zoo, TokenOptions(normalization=normalization))
            results.append((layout.statistics.centre, layout.statistics.scale, layout.layer_statistics(0).centre))
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


def test_a_large_mean_does_not_swallow_the_deviation(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    dicts = [{"w": 1e8 + torch.randn(100_000, generator=generator, dtype=torch.float64)} for _ in range(3)]
    zoo = make_zoo(tmp_path, dicts)
    for normalization in ("layer", "residual"):
        scale = float(TokenLayout.fit(zoo, TokenOptions(normalization=normalization)).statistics.scale[0])
        assert scale == pytest.approx({"layer": 1, "residual": (2 / 3) ** 0.5}[normalization], rel=0.02)


def test_moments_merge_as_if_measured_at_once():
    values = torch.randn(1000, dtype=torch.float64) * 3 + 5
    merged = Moments()
    for part in values.split([1, 400, 599]):
        merged = merged.merge(Moments.of(part))
    assert merged.count == 1000
    assert merged.mean == pytest.approx(values.mean().item(), rel=1e-13)
    assert merged.squares == pytest.approx(values.var(correction=0).item() * 1000, rel=1e-12)
    assert Moments.of(torch.full((3000,), 0.1, dtype=torch.float64)) == Moments(3000, 0.1, 0.0)


@pytest.mark.parametrize("normalization", ["layer", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layers_without_variation_decode_exactly_whatever_the_tokens(tmp_path: Path, normalization, dtype):
    values = torch.full((50,), 0.1) if normalization == "layer" else torch.linspace(-1, 1, 50)
    fixed = {"w": values.to(dtype), "bn.running_var": (values.abs() + 1e-9).to(dtype)}
    zoo = make_zoo(tmp_path, [{**fixed, "free": torch.randn(5)} for _ in range(3)])
    layout = TokenLayout.fit(zoo, TokenOptions(size=8, normalization=normalization))
    tokens = layout.encode(zoo.checkpoint(0))
    fixed_rows = layout.positions[:, 0] < 2
    assert not tokens[fixed_rows].any()
    for noise in (1.0, 1e30, float("nan"), float("inf")):
        decoded = layout.decode(tokens + noise * fixed_rows[:, None])
        batch = layout.decode_batch((tokens + noise * fixed_rows[:, None]).double())
        for name, tensor in fixed.items():
            assert torch.equal(decoded[name], tensor)
            assert torch.equal(batch[name].to(dtype), tensor)


def test_running_variances_go_through_the_papers_logarithm(tmp_path: Path):
    zoo = make_zoo(tmp_path, random_dicts())
    layout = TokenLayout.fit(zoo, TokenOptions(normalization="layer", include=("*running_var",)))
    values = stacked(zoo, "bn.running_var")
    logs = np.log(values / (0.95 * values.mean()) + 0.05)
    expected = (logs - logs.mean()) / logs.std()
    tokens = torch.cat([layout.encode(zoo.checkpoint(i), torch.float64)[:, :8] for i in range(4)])
    np.testing.assert_allclose(tokens, expected, rtol=1e-10, atol=1e-10)
    for i in range(4):
        assert torch.equal(layout.decode(tokens[i : i + 1].new_zeros(1, 128))["half"], zoo.state_dict(0)["half"])
        padded = torch.nn.functional.pad(tokens[i : i + 1], (0, 120))
        assert torch.equal(layout.decode(padded)["bn.running_var"], zoo.state_dict(i)["bn.running_var"])


@pytest.mark.parametrize("token_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalization", ["layer", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros(tmp_path: Path, normalization, dtype, token_dtype):
    def sparse() -> Tensor:
        return (torch.randn(200, 50) + 0.3).mul(torch.rand(200, 50) > 0.5).to(dtype)

    zoo = make_zoo(tmp_path, [{"w": sparse(), "bn.running_var": sparse().abs()} for _ in range(3)])
    layout = TokenLayout.fit(zoo, TokenOptions(normalization=normalization))
    decoded = layout.decode(layout.encode(zoo.checkpoint(1), token_dtype))
    for name, tensor in zoo.state_dict(1).items():
        assert torch.equal(decoded[name] == 0, tensor == 0)


def test_generated_variances_are_neither_negative_nor_infinite():
    statistics = LayerStatistics(0.1, 0.5, variance_mean=2.0)
    values = statistics.denormalize(torch.tensor([-1e6, -7.0, 0.0, 1e6]), 0.1)
    assert values[:2].tolist() == [0, 0] and values[2] > 0 and torch.isfinite(values.float()).all()


def test_a_negative_variance_is_kept_as_it_is(tmp_path: Path):
    zoo = make_zoo(tmp_path, [{"bn.running_var": torch.randn(20)} for _ in range(2)])
    layout = TokenLayout.fit(zoo, TokenOptions(size=8))
    decoded = layout.decode(layout.encode(zoo.checkpoint(1), torch.float64))
    assert torch.equal(decoded["bn.running_var"], zoo.state_dict(1)["bn.running_var"])


@pytest.mark.parametrize("normalization", ["layer", "residual", "none"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_file_and_tensor(tmp_path: Path, normalization, bad):
    zoo = make_zoo(tmp_path, random_dicts())
    file = zoo.file(2)
    damaged = zoo.checkpoint(2)
    offset = damaged.tensors["weight"].offset
    raw = bytearray(file.read_bytes())
    raw[offset + 40 : offset + 44] = np.float32(bad).tobytes()
    file.write_bytes(raw)
    with pytest.raises(InputError, match=r"000002.safetensors: tensor 'weight' has NaN or infinite"):
        TokenLayout.fit(Zoo.open(zoo.path), TokenOptions(normalization=normalization))
    assert not list((zoo.path / "cache").iterdir())


class TestCache:
    def fit(self, zoo: Zoo, **options) -> Tensor:
        return TokenLayout.fit(Zoo.open(zoo.path), TokenOptions(size=16, **options)).encode(zoo.checkpoint(0))

    def test_spares_the_second_pass(self, tmp_path: Path, monkeypatch):
        zoo = make_zoo(tmp_path, random_dicts())
        tokens = self.fit(zoo)
        monkeypatch.setattr(fitting, "fit_statistics", None)
        assert torch.equal(self.fit(zoo), tokens)
        with pytest.raises(TypeError):
            self.fit(zoo, normalization="layer")
        zoo.append(random_dicts(1)[0], run=0, step=9)
        with pytest.raises(TypeError):
            self.fit(zoo)

    @pytest.mark.parametrize("damage", [lambda raw: raw[:-5], lambda raw: b"", lambda raw: b"x" * 100])
    def test_is_made_again_when_damaged(self, tmp_path: Path, damage):
        zoo = make_zoo(tmp_path, random_dicts())
        tokens = self.fit(zoo)
        (file,) = (zoo.path / "cache").iterdir()
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        assert torch.equal(self.fit(zoo), tokens)
        assert file.read_bytes() == whole

    def test_is_done_without_when_it_cannot_be_written(self, tmp_path: Path, monkeypatch):
        zoo = make_zoo(tmp_path, random_dicts())
        tokens = self.fit(zoo)
        for file in (zoo.path / "cache").iterdir():
            file.unlink()

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        assert torch.equal(self.fit(zoo), tokens)
        assert not list((zoo.path / "cache").iterdir())


def test_an_empty_choice_is_refused(tmp_path: Path):
    zoo = make_zoo(tmp_path, random_dicts())
    with pytest.raises(InputError, match="no checkpoint to measure"):
        TokenLayout.fit(zoo, TokenOptions(), indices=[])
