"""What of a checkpoint is learned, what is the same in all of a zoo, and what is refused because it is neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.rows import CheckpointWriter, read_rows
from tokenization.layout.verify import verify_round_trip
from tokenization.layouts import fit_layout
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo

Make = Callable[[int], dict[str, Tensor]]


def mlp(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).state_dict()


def collected(folder: Path, make: Make, ending: str = "pth", num: int = 3) -> tuple[Zoo, list[str]]:
    """A zoo of files as users have them, and what was said when it was made."""
    mine, said = folder / "mine", []
    mine.mkdir()
    for seed in range(num):
        path = mine / f"seed{seed}.{ending if ending != 'mixed' else ('pth', 'safetensors')[seed % 2]}"
        if path.suffix == ".pth":
            torch.save(make(seed), path)
        else:
            safetensors.torch.save_file({n: t.clone() for n, t in make(seed).items()}, path)
    return collect_from(mine, folder / "zoo", find_runs=False, say=said.append), said


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same bytes."""
    as_bytes = [each.contiguous().reshape(-1).view(torch.uint8) for each in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


# What is learned

LEARNED: dict[str, Make] = {
    "number": lambda seed: {"scale": torch.tensor(1.5 + seed)},
    "one value": lambda seed: {"head.bias": torch.tensor([0.25 * seed])},
    "number of halves": lambda seed: {"temperature": torch.tensor(2.0**-seed, dtype=torch.bfloat16)},
    "number of doubles": lambda seed: {"energy.shift": torch.tensor(1.0 / (3 + seed), dtype=torch.float64)},
    "alpha of an adapter": lambda seed: {"lora.alpha": torch.tensor(4.0 * (seed + 1)), "lora.up": torch.randn(2, 2)},
    "complex numbers": lambda seed: {"spectral.weight": torch.randn(2, 3, dtype=torch.complex64)},
    "one complex number": lambda seed: {"pole": torch.randn((), dtype=torch.complex64)},
    "conjugated": lambda seed: {"pole": torch.randn(2, 2, dtype=torch.complex64).mH},
    "e4m3": lambda seed: {"w": torch.randn(3, 5).to(torch.float8_e4m3fn), "w_scale_inv": torch.rand(1)},
    "e5m2": lambda seed: {"w": (100 * torch.randn(3, 5)).to(torch.float8_e5m2)},
    "observers that have seen values": lambda seed: {"min_val": torch.tensor(-seed - 1.0), "scale": torch.rand(1)},
}


@pytest.mark.parametrize(
    "options", [{}, {"normalization": "layer"}, {"flatten": "channel"}, {"flatten": "flat"}], ids=str
)
@pytest.mark.parametrize("kind", LEARNED)
def test_every_number_is_learned(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append({"body": torch.randn(3, 3), **LEARNED[kind](seed)})
        zoo.append(states[-1], run=0, step=seed)
    layout = TokenLayout.fit(zoo, TokenOptions(size=4, **options))
    assert not layout.constant_specs
    layout.save(tmp_path)
    layout = TokenLayout.load(tmp_path)
    for state in states:
        tokens = layout.encode(state, torch.float64)
        assert all(same(layout.decode(tokens)[name], state[name]) for name in state)
        batch = layout.decode_batch(tokens[None])
        assert all(batch[name].shape == (1, *state[name].shape) for name in state)
        assert batch.keys() == state.keys()
        with CheckpointWriter(tmp_path / "new.safetensors", layout) as writer:
            writer.write(0, tokens)
        new = safetensors.torch.load_file(tmp_path / "new.safetensors")
        assert all(same(new[name], state[name]) for name in state)
    assert torch.equal(read_rows(layout, zoo, [2], range(layout.num_tokens))[0], layout.encode(states[2]))
    assert verify_round_trip(zoo, layout).num_values == 3 * layout.num_values


def test_directions_hold_single_and_complex_numbers(tmp_path: Path) -> None:
    zoo, _ = collected(
        tmp_path, lambda seed: {**mlp(seed), "s": torch.tensor(1.0 + seed), "c": torch.full((2,), 1j * seed)}
    )
    layout = fit_layout(zoo, TokenOptions(size=8, rank=2, basis_dtype="fp32"))
    decoded = layout.decode(layout.encode(zoo.checkpoint(2)))
    assert decoded["s"] == pytest.approx(3.0, abs=1e-5) and decoded["s"].shape == ()
    assert torch.allclose(decoded["c"], torch.full((2,), 2j), atol=1e-5)


def test_a_generated_value_too_large_for_8_bits_becomes_the_largest(tmp_path: Path) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    for seed in range(2):
        zoo.append({"w": (400.0 * torch.ones(2) - seed).to(torch.float8_e4m3fn), "v": torch.rand(2)}, run=0, step=seed)
    layout = TokenLayout.fit(zoo, TokenOptions(size=4, normalization="none"))
    assert layout.decode(torch.full((2, 4), -1e6))["w"].float().tolist() == [-448.0, -448.0]


# What is the same everywhere

CONSTANTS: dict[str, Tensor] = {
    "mask of -inf": torch.triu(torch.full((4, 4), float("-inf")), 1),
    "NaN": torch.tensor([1.0, float("nan")]),
    "observers that have seen nothing": torch.tensor(float("inf")),
    "placeholder": torch.empty(0),
    "placeholder of bits": torch.empty(0, 3, dtype=torch.bool),
    "positions": torch.arange(6)[None],
    "relative positions": (torch.arange(3)[None] - torch.arange(3)[:, None]).to(torch.int16),
    "bits": torch.tensor([True, False]),
    "bytes": torch.tensor([7, 255], dtype=torch.uint8),
    "powers of two": torch.tensor([2.0, 0.5]).to(torch.float8_e8m0fnu),
    "8 bits with NaN": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn),
    "complex NaN": torch.tensor([complex(0, float("nan"))]),
}


@pytest.mark.parametrize("ending", ["pth", "safetensors", "mixed"])
@pytest.mark.parametrize("kind", CONSTANTS)
def test_what_agrees_may_be_anything(kind: str, ending: str, tmp_path: Path) -> None:
    zoo, said = collected(tmp_path, lambda seed: {**mlp(seed), "buffer": CONSTANTS[kind]}, ending)
    assert not said
    zoo = Zoo.open(zoo.path)  # as the next command does
    zoo.verify()
    layout = TokenLayout.fit(zoo, TokenOptions(size=8))
    assert list(layout.constant_specs) == ["buffer"] and not layout.copied
    layout.save(tmp_path)
    assert same(TokenLayout.load(tmp_path).decode(torch.zeros(layout.num_tokens, 8))["buffer"], CONSTANTS[kind])
    assert verify_round_trip(zoo, layout).num_constants == CONSTANTS[kind].numel()


# What differs

PERMUTED: Make = lambda seed: {"perm": torch.randperm(9, generator=torch.Generator().manual_seed(seed))}  # noqa: E731
VARYING: dict[str, tuple[str, Make]] = {
    "permutation": ("perm", PERMUTED),
    "bits": ("keep", lambda seed: {"keep": torch.arange(3) == seed}),
    "4 bits of bitsandbytes": (
        "w",
        lambda seed: {"w": torch.full((4, 1), seed, dtype=torch.uint8), "w.absmax": torch.rand(2)},
    ),
    "GPTQ": (
        "q.qweight",
        lambda seed: {"q.qweight": torch.full((2, 3), seed, dtype=torch.int32), "q.scales": torch.rand(1, 3).half()},
    ),
    "quantised observers": (
        "fake_quant.zero_point",
        lambda seed: {
            "fake_quant.zero_point": torch.tensor([seed], dtype=torch.int32),
            "fake_quant.scale": torch.rand(1),
        },
    ),
    "powers of two": ("s", lambda seed: {"s": torch.tensor([2.0**seed]).to(torch.float8_e8m0fnu)}),
    "a long counter": ("usage.count", lambda seed: {"usage.count": torch.arange(4) + seed}),
    "a name, not a counter": ("step_embedding", lambda seed: {"step_embedding": torch.tensor(seed)}),
}


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("kind", VARYING)
def test_what_differs_is_named_and_may_be_excluded(kind: str, ending: str, tmp_path: Path) -> None:
    name, make = VARYING[kind]
    zoo, said = collected(tmp_path, lambda seed: {**mlp(seed), **make(seed)}, ending)
    assert len(said) == 1 and "seed0" in said[0] and "seed1" in said[0]
    with pytest.raises(InputError) as caught:
        TokenLayout.fit(zoo, TokenOptions(size=8))
    for message in (said[0], str(caught.value)):
        assert f"seed0.{ending}: tensor {name!r}" in message and f"seed1.{ending}" in message
        assert "tokens.exclude" in message and "\n" not in message
    layout = TokenLayout.fit(zoo, TokenOptions(size=8, exclude=(name,)))  # the cure
    assert layout.copied == (name,) and f"`{name}`" in layout.copied_note and "first checkpoint" in layout.copied_note
    layout.save(tmp_path)
    assert TokenLayout.load(tmp_path).copied == (name,)
    decoded = layout.decode(layout.encode(zoo.checkpoint(2)))
    assert same(decoded[name], make(0)[name]) and not same(decoded[name], make(2)[name])
    verify_round_trip(zoo, layout)


@pytest.mark.parametrize("options", [{"exclude": ("head",)}, {"include": ("body", "only*")}], ids=str)
def test_numbers_that_are_left_out_are_told_apart_by_whether_they_differ(
    options: dict[str, Any], tmp_path: Path
) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    for seed in range(3):
        torch.manual_seed(seed)
        zoo.append({"body": torch.randn(4), "head": torch.randn(2), "only": torch.ones(2)}, run=0, step=seed)
    assert TokenLayout.fit(zoo, TokenOptions(size=4, **options)).copied == ("head",)
    assert TokenLayout.fit(zoo, TokenOptions(size=4, exclude=("only",))).copied == ()


COUNTERS = ("bn.num_batches_tracked", "n_averaged", "ema.num_updates", "state.step", "steps", "global_step", "epoch")


def test_the_rule_for_counters_is_said_once(tmp_path: Path) -> None:
    zoo, said = collected(tmp_path, lambda seed: {**mlp(seed), **{n: torch.tensor(5 + seed) for n in COUNTERS}})
    assert len(said) == 1 and "num_batches_tracked" in said[0] and "first checkpoint" in said[0]
    layout = TokenLayout.fit(zoo, TokenOptions(size=8))
    decoded = layout.decode(layout.encode(zoo.checkpoint(2)))
    assert [int(decoded[name]) for name in COUNTERS] == [5] * len(COUNTERS) and not layout.copied
    verify_round_trip(zoo, layout)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_values_that_are_not_finite_in_one_file_are_refused(
    ending: str, bad: int, value: float, tmp_path: Path
) -> None:
    def make(seed: int) -> dict[str, Tensor]:
        state = mlp(seed)
        if seed == bad:
            state["0.weight"][1, 1] = value
        return state

    with pytest.raises(
        InputError, match=rf"seed{bad}\.{ending}: tensor '0.weight' has NaN or infinity.*unlike .*seed.*leave"
    ) as caught:
        collected(tmp_path, make, ending)
    assert "\n" not in str(caught.value) and not (tmp_path / "zoo").exists()


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_dtype_of_its_own_is_refused_and_the_cure_cures(ending: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dtype float16, but the zoo's has float32; .* save it in that dtype"):
        collected(tmp_path, lambda seed: {n: t.half() if seed == 1 else t for n, t in mlp(seed).items()}, ending)
    state = {name: tensor.half().float() for name, tensor in mlp(1).items()}
    if ending == "pth":
        torch.save(state, tmp_path / "mine" / "seed1.pth")
    else:
        safetensors.torch.save_file(state, tmp_path / "mine" / "seed1.safetensors")
    assert len(collect_from(tmp_path / "mine", tmp_path / "zoo")) == 3


def test_values_that_are_not_finite_and_differ_are_refused(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Tensor]:
        return {**mlp(seed), "m": torch.tensor([float("-inf"), seed])}

    with pytest.raises(InputError, match="tensor 'm' has NaN or infinity"):
        collected(tmp_path, make)


def test_a_checkpoint_without_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tensor '0.weight' is empty.*ZeRO stage 3"):
        collected(tmp_path, lambda seed: {name: torch.empty(0) for name in mlp(seed)})


def test_further_checkpoints_are_compared_with_the_first(tmp_path: Path) -> None:
    mask = torch.tensor([float("-inf"), 0.0])
    zoo, _ = collected(tmp_path, lambda seed: {**mlp(seed), "mask": mask})
    torch.save({**mlp(7), "mask": -mask}, tmp_path / "more.pth")
    with pytest.raises(InputError, match=r"more\.pth: tensor 'mask' has NaN or infinity"):
        collect_from(tmp_path / "more.pth", zoo.path)
    with pytest.raises(InputError, match="tensor 'mask' has NaN or infinity"):
        Zoo.open(zoo.path).append({**mlp(7), "mask": torch.zeros(2)}, run=0, step=0)
    torch.save({**mlp(8), "mask": mask}, tmp_path / "more.pth")
    assert len(collect_from(tmp_path / "more.pth", zoo.path)) == 4


def test_a_constant_that_changed_on_disk_is_found(tmp_path: Path) -> None:
    zoo, _ = collected(tmp_path, lambda seed: {**mlp(seed), "ids": torch.arange(3)}, "safetensors")
    safetensors.torch.save_file({**mlp(1), "ids": torch.arange(3) + 1}, tmp_path / "mine" / "seed1.safetensors")
    with pytest.raises(InputError, match=r"tensor 'ids'.*seed1"):
        TokenLayout.fit(zoo, TokenOptions(size=8))


# Ties


def tied(seed: int, form: str) -> dict[str, Tensor]:
    """Embedding and head that are one memory, copies, or of which the head is left out."""
    torch.manual_seed(seed)
    embedding = torch.randn(5, 3)
    state = {"embed": embedding, "a.bias": torch.zeros(3), "b.bias": torch.zeros(3), "head": embedding}
    if form == "copies":
        state["head"] = embedding.clone()
    elif form == "left out":
        del state["head"]
    return state


def write(path: Path, state: dict[str, Tensor], form: str) -> Path:
    if form == "save_model":

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, value in state.items():
                    self.register_buffer(name.replace(".", "_"), value)

        safetensors.torch.save_model(Network(), str(path.with_suffix(".safetensors")))
    elif form == "copies in safetensors":
        safetensors.torch.save_file({n: t.clone() for n, t in state.items()}, path.with_suffix(".safetensors"))
    else:
        torch.save(state, path.with_suffix(".pth"))
    return path


FORMS = {
    "copies": ["copies"] * 3,
    "copies in safetensors": ["copies in safetensors"] * 3,
    "memory, then copies": ["memory", "copies", "memory"],
    "copies, then memory": ["copies", "copies in safetensors", "memory"],
    "left out later": ["copies", "memory", "left out"],
    "left out first": ["left out", "memory", "copies in safetensors"],
}


@pytest.mark.parametrize("case", FORMS)
def test_tensors_that_are_the_same_in_every_file_are_tied(case: str, tmp_path: Path) -> None:
    for seed, form in enumerate(FORMS[case]):
        write(tmp_path / f"seed{seed}", tied(seed, form), form)
    zoo = collect_from([tmp_path / "seed*"], tmp_path / "zoo")
    zoo = Zoo.open(zoo.path)
    zoo.verify()
    assert zoo.structure.ties == {"head": "embed"}  # and no tie of biases that are zero by chance
    layout = TokenLayout.fit(zoo, TokenOptions(size=4))
    assert {layer.name for layer in layout.layers} == {"embed", "a.bias", "b.bias"}
    for seed in range(3):
        state = zoo.state_dict(seed)
        assert state["head"] is state["embed"] and torch.equal(state["embed"], tied(seed, "memory")["embed"])
    with CheckpointWriter(tmp_path / "new.safetensors", layout) as writer:
        writer.write(0, torch.randn(layout.num_tokens, 4))
    new = safetensors.torch.load_file(tmp_path / "new.safetensors")
    assert new.keys() == {"embed", "head", "a.bias", "b.bias"} and torch.equal(new["embed"], new["head"])
    verify_round_trip(zoo, layout)


def test_the_record_of_save_model_is_read(tmp_path: Path) -> None:
    for seed in range(2):
        write(
            tmp_path / f"seed{seed}", {"embed": (e := torch.randn(5, 3)), "b": torch.randn(2), "head": e}, "save_model"
        )
    zoo = collect_from([tmp_path / "seed*"], tmp_path / "zoo")
    assert sorted(zoo.checkpoint(0).order) == ["b", "embed", "head"] and len(zoo.structure.ties) == 1
    state = zoo.state_dict(1)
    assert state["head"] is state["embed"]
    # Whatever else metadata say is not a tie.
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors", {"w": "w", "note": "a tensor, w"})
    assert Checkpoint.open(tmp_path / "x.safetensors").ties == {}


def test_tensors_that_are_the_same_in_some_files_alone_are_not_tied(tmp_path: Path) -> None:
    for seed in range(3):
        state = tied(seed, "copies" if seed else "memory")
        state["head"] = state["head"] + (seed == 2)
        write(tmp_path / f"seed{seed}", state, "memory")
    zoo = Zoo.open(collect_from([tmp_path / "seed*"], tmp_path / "zoo").path)
    assert zoo.structure.ties == {}
    layout = TokenLayout.fit(zoo, TokenOptions(size=4))
    decoded = layout.decode(layout.encode(zoo.checkpoint(2), torch.float64))
    assert torch.equal(decoded["head"], decoded["embed"] + 1)
    zoo.verify()
    verify_round_trip(zoo, layout)


def test_a_tensor_is_not_taken_for_a_copy_because_it_is_missing(tmp_path: Path) -> None:
    for seed in range(3):
        state = tied(seed, "copies")
        if seed == 2:
            del state["b.bias"]  # zero, as a.bias is, in the others
        write(tmp_path / f"seed{seed}", state, "memory")
    with pytest.raises(InputError, match=r"seed2\.pth: tensor 'b.bias' is missing"):
        collect_from([tmp_path / "seed*"], tmp_path / "zoo")


def test_later_files_must_keep_the_ties(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path / f"seed{seed}", tied(seed, "memory"), "memory")
    zoo = collect_from([tmp_path / "seed*"], tmp_path / "zoo")
    torch.save(tied(4, "copies"), tmp_path / "more.pth")
    zoo = collect_from(tmp_path / "more.pth", zoo.path)
    zoo.append(tied(5, "copies"), run=0, step=5)
    assert (added := zoo.state_dict(3))["head"] is added["embed"]
    bad = {**tied(6, "copies"), "head": torch.randn(5, 3)}
    with pytest.raises(InputError, match="tensor 'head' is not a copy of 'embed'"):
        zoo.append(bad, run=0, step=6)
    zoo.verify()


# The way into tokens and back


def test_doubles_come_back_as_closely_as_the_layout_promises(tmp_path: Path) -> None:
    zoo, _ = collected(tmp_path, lambda seed: {n: (t * 1e3).double() + seed for n, t in mlp(seed).items()}, num=5)
    for normalization in ("residual", "layer", "none"):
        layout = TokenLayout.fit(zoo, TokenOptions(size=8, normalization=normalization))  # type: ignore[arg-type]
        trip = verify_round_trip(zoo, layout)
        assert trip.num_exact == trip.num_values or normalization != "none"


@pytest.mark.parametrize("fault", ["constant", "tie", "key"])
def test_a_network_that_differs_outside_the_tokens_is_named(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    for seed in range(2):
        zoo.append({**tied(seed, "memory"), "ids": torch.arange(3)}, run=0, step=seed)
    layout = TokenLayout.fit(zoo, TokenOptions(size=8))
    decode = layout.decode

    def wrong(tokens: Tensor) -> dict[str, Tensor]:
        state = decode(tokens)
        if fault == "constant":
            state["ids"] += 1
        elif fault == "tie":
            state["head"] = state["head"] + 1
        else:
            del state["head"]
        return state

    monkeypatch.setattr(layout, "decode", wrong)
    with pytest.raises(InputError, match="tensor 'ids'" if fault == "constant" else "tensor 'head'"):
        verify_round_trip(zoo, layout)
