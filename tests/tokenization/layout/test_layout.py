from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pydantic
import pytest
import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.zoo.zoo import Zoo

CUTS = [("layer", False), ("layer", True), ("channel", False), ("channel", True), ("flat", False)]


def state_dict(seed: int) -> dict[str, Tensor]:
    """Every kind of tensor: convolution, batch statistics, counters, scalars, ties, several dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    embedding = random(9, 4)
    return {
        "embed.weight": embedding,
        "conv.weight": random(6, 3, 3, 2),
        "bn.bias": random(6).half(),
        "bn.running_mean": random(6),
        "bn.running_var": random(6).abs() + 0.1,
        "bn.num_batches_tracked": torch.tensor(7 + seed),
        "ones": torch.ones(5),
        "scale": torch.tensor(0.25),
        "fc.weight": random(11, 13).bfloat16(),
        "fc.bias": random(11).double(),
        "ids": torch.arange(4),
        "head.weight": embedding,
    }


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Zoo:
    zoo = Zoo.create(tmp_path_factory.mktemp("layout") / "zoo")
    for seed in range(3):
        zoo.append(state_dict(seed), run=0, step=seed)
    return zoo


def places_of(layout: TokenLayout) -> list[list[tuple[int, int]]]:
    """The slow, obvious way: for each layer the (token, place) of every value, counted out one by one."""
    size, options = layout.token_size, layout.options
    token, place, expected_places = 0, 0, []
    for layer in layout.layers:
        shape = layer.shape
        runs = shape[0] if options.flatten == "channel" and len(shape) > 1 else 1
        places = []
        for _ in range(runs):
            length = layer.num_values // runs
            shares = options.flatten == "flat" or (options.pack and runs == 1 and place + length <= size)
            if place and not shares:
                token, place = token + 1, 0
            for _ in range(length):
                if place == size:
                    token, place = token + 1, 0
                places.append((token, place))
                place += 1
        expected_places.append(places)
    return expected_places


@pytest.mark.parametrize(("flatten", "pack"), CUTS)
@pytest.mark.parametrize("size", [1, 4, 16, 64, 1000])
def test_encode_mask_and_positions_equal_a_count_value_by_value(zoo: Zoo, flatten, pack: bool, size: int):
    layout = TokenLayout.without_statistics(zoo.checkpoint(0), TokenOptions(size=size, flatten=flatten, pack=pack))
    expected_places = places_of(layout)
    num_tokens = expected_places[-1][-1][0] + 1
    tokens = torch.zeros(num_tokens, size, dtype=torch.float64)
    mask = torch.zeros(num_tokens, size, dtype=torch.bool)
    first_token: dict[int, int] = {}
    owners: dict[int, int] = {}
    for index, (layer, places) in enumerate(zip(layout.layers, expected_places, strict=True)):
        first_token[index] = places[0][0]
        for value, (token, place) in zip(zoo.state_dict(0)[layer.name].flatten().tolist(), places, strict=True):
            tokens[token, place] = value
            mask[token, place] = True
            owners.setdefault(token, index)
    positions = [[owners[token], token - first_token[owners[token]]] for token in range(num_tokens)]
    assert layout.num_tokens == num_tokens
    assert torch.equal(layout.encode(zoo.checkpoint(0), torch.float64), tokens)
    assert torch.equal(layout.mask, mask)
    assert layout.positions.tolist() == positions
    assert len({tuple(position) for position in positions}) == num_tokens
    assert layout.padding_share == pytest.approx(1 - mask.double().mean().item())
    groups = layout.describe()
    assert sum(group.tokens for group in groups) == num_tokens
    assert sum(group.values for group in groups) == layout.num_values == int(mask.sum())
    assert sum(group.padding for group in groups) == int((~mask).sum())


def test_mask_rows_takes_any_shape(zoo: Zoo):
    layout = TokenLayout.without_statistics(zoo.checkpoint(0), TokenOptions(size=16))
    ids = torch.tensor([[3, 0], [2, 2]])
    assert torch.equal(layout.mask_rows(ids), layout.mask[ids])


def test_packing_shares_tokens_without_splitting_small_layers(zoo: Zoo):
    plain, packed = (
        TokenLayout.without_statistics(zoo.checkpoint(0), TokenOptions(size=64, pack=pack)) for pack in (False, True)
    )
    assert packed.num_tokens < plain.num_tokens
    for layer in packed.layers:
        if layer.num_values <= 64:
            assert layer.start // 64 == (layer.end - 1) // 64


def test_constants_ties_order_and_dtypes_come_back(zoo: Zoo):
    layout = TokenLayout.fit(zoo, TokenOptions(size=16))
    original, decoded = zoo.state_dict(0), layout.decode(layout.encode(zoo.checkpoint(0), torch.float64))
    assert list(decoded) == list(original) == list(state_dict(0))
    assert decoded["head.weight"] is decoded["embed.weight"]
    for name, tensor in original.items():
        assert (decoded[name].dtype, decoded[name].shape) == (tensor.dtype, tensor.shape)
    assert set(layout.constant_specs) == {"bn.num_batches_tracked", "ids"}
    # Counters are the base checkpoint's, whichever checkpoint the tokens came from.
    assert layout.decode(layout.encode(zoo.checkpoint(2)))["bn.num_batches_tracked"] == 7
    decoded["ids"].fill_(9)
    assert layout.decode(layout.encode(zoo.checkpoint(0)))["ids"].tolist() == [0, 1, 2, 3]


def test_decode_batch_equals_decode_and_is_differentiable(zoo: Zoo):
    for normalization in ("residual", "layer", "none"):
        layout = TokenLayout.fit(zoo, TokenOptions(size=16, normalization=normalization, flatten="channel"))
        tokens = torch.stack([layout.encode(zoo.checkpoint(i), torch.float64) for i in range(3)])[None]
        tokens.requires_grad_()
        batch = layout.decode_batch(tokens)
        assert set(batch) | set(layout.constant_specs) == set(layout.names)
        assert batch["head.weight"] is batch["embed.weight"]
        for i in range(3):
            for name, tensor in layout.decode(tokens[0, i]).items():
                if name in batch:
                    torch.testing.assert_close(batch[name][0, i].to(tensor.dtype), tensor, rtol=0, atol=0)
        whole = layout.decode_batch(tokens, constants=True)
        assert list(whole) == list(layout.names)
        for name, constant in ((name, layout.constant(name)) for name in layout.constant_specs):
            assert whole[name].dtype == constant.dtype
            torch.testing.assert_close(whole[name], constant.expand(1, 3, *constant.shape), rtol=0, atol=0)
        sum(tensor.sum() for tensor in batch.values()).backward()
        assert tokens.grad is not None and not tokens.grad[..., ~layout.mask].any()
        rows = layout.positions[:, 0] == 0
        scale = 1.0 if normalization == "none" else float(layout.statistics.scale[0])
        # The tied embedding counts twice.
        torch.testing.assert_close(tokens.grad[0, 0][rows][layout.mask[rows]], torch.full((36,), 2 * scale).double())


def test_patterns_choose_and_the_rest_comes_from_the_base(zoo: Zoo, tmp_path: Path):
    options = TokenOptions(size=8, include=("bn.*", "fc.*"), exclude=("*.bias",), base=zoo.entries[1].file)
    layout = TokenLayout.fit(zoo, options)
    assert [layer.name for layer in layout.layers] == ["bn.running_mean", "bn.running_var", "fc.weight"]
    layout.save(tmp_path)
    layout = TokenLayout.load(tmp_path)
    decoded = layout.decode(layout.encode(zoo.checkpoint(2), torch.float64))
    chosen = {layer.name for layer in layout.layers}
    for name, tensor in decoded.items():
        assert torch.equal(tensor, zoo.state_dict(2 if name in chosen else 1)[name])
    assert decoded["head.weight"] is decoded["embed.weight"]


def test_base_may_be_a_file_outside_the_zoo(zoo: Zoo, tmp_path: Path):
    base = {**state_dict(5), "conv.weight": torch.zeros(6, 3, 3, 2)}
    save_checkpoint(tmp_path / "base.safetensors", base)
    options = TokenOptions(size=8, exclude=("conv.*",), base=str(tmp_path / "base.safetensors"))
    layout = TokenLayout.fit(zoo, options)
    assert not layout.decode(layout.encode(zoo.checkpoint(0)))["conv.weight"].any()
    save_checkpoint(tmp_path / "other.safetensors", {"conv.weight": torch.zeros(2)})
    with pytest.raises(InputError, match="other"):
        TokenLayout.fit(zoo, TokenOptions(base=str(tmp_path / "other.safetensors")))


def test_a_tied_tensor_goes_by_any_of_its_names(zoo: Zoo):
    layout = TokenLayout.fit(zoo, TokenOptions(include=("head.*",)))
    assert [layer.name for layer in layout.layers] == ["embed.weight"]
    tensors = {"head.weight": zoo.state_dict(0)["head.weight"]}
    assert torch.equal(layout.encode(tensors), layout.encode(zoo.checkpoint(0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TokenOptions(include=("con.weight",)), "tokens.include: 'con.weight'.* nearest name is 'conv.weight'"),
        (TokenOptions(exclude=("nothing*",)), "tokens.exclude: 'nothing"),
        (TokenOptions(include=("ids",)), "no float tensor to tokenise"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(zoo: Zoo, options: TokenOptions, message: str):
    with pytest.raises(InputError, match=message):
        TokenLayout.fit(zoo, options)


def test_empty_tensors_are_constants(tmp_path: Path):
    save_checkpoint(tmp_path / "x.safetensors", {"a": torch.randn(4), "none": torch.zeros(0, 3)})
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    layout = TokenLayout.without_statistics(checkpoint, TokenOptions())
    assert layout.decode(layout.encode(checkpoint))["none"].shape == (0, 3)


def test_encode_names_what_does_not_fit(zoo: Zoo):
    layout = TokenLayout.fit(zoo, TokenOptions())
    tensors = state_dict(0)
    with pytest.raises(InputError, match=r"'conv.weight' .* is missing from the state dict"):
        layout.encode({name: tensor for name, tensor in tensors.items() if name != "conv.weight"})
    with pytest.raises(
        InputError, match=re.escape("shape [2, 3], but the zoo's is torch.float32 of shape [6, 3, 3, 2]")
    ):
        layout.encode({**tensors, "conv.weight": torch.zeros(2, 3)})
    with pytest.raises(InputError, match="'ones' has values unlike the zoo's"):
        layout.encode({**tensors, "ones": torch.arange(5.0)})
    with pytest.raises(ValueError, match="must be"):
        layout.decode(torch.zeros(2, 2))


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"size": 2.5},
        {"normalization": "batch"},
        {"flatten": "column"},
        {"include": ()},
        {"exclude": "conv.*"},
        {"pack": True, "flatten": "flat"},
    ],
)
def test_options_name_the_field_at_fault(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is |set pack to false"):
        TokenOptions(**fields)


def test_options_embed_strictly_in_a_configuration():
    class Config(pydantic.BaseModel):
        tokens: TokenOptions = TokenOptions()

    assert Config(tokens={"size": 4, "include": ["a*"]}).tokens == TokenOptions(size=4, include=("a*",))
    for wrong in ({"sise": 4}, {"size": 0}):
        with pytest.raises(pydantic.ValidationError):
            Config(tokens=wrong)


@pytest.mark.parametrize("normalization", ["residual", "layer", "none"])
def test_saved_and_pickled_layouts_are_the_same(zoo: Zoo, tmp_path: Path, normalization):
    layout = TokenLayout.fit(zoo, TokenOptions(size=16, normalization=normalization, pack=True))
    layout.save(tmp_path)
    tokens = layout.encode(zoo.checkpoint(1))
    for copy in (TokenLayout.load(tmp_path), pickle.loads(pickle.dumps(layout))):
        assert copy.options == layout.options and copy.layers == layout.layers
        assert torch.equal(copy.encode(zoo.checkpoint(1)), tokens)
        for name, tensor in layout.decode(tokens).items():
            assert torch.equal(copy.decode(tokens)[name], tensor)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    TokenLayout.load(tmp_path).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_layout_json_has_the_keys_it_has_always_had(tmp_path: Path):
    head = torch.ones(2, 3)
    save_checkpoint(tmp_path / "x.safetensors", {"w": head, "n": torch.tensor(3), "t": head})
    TokenLayout.without_statistics(Checkpoint.open(tmp_path / "x.safetensors"), TokenOptions(size=4)).save(tmp_path)
    assert json.loads((tmp_path / "layout.json").read_text()) == {
        "format": "rpg.layout",
        "version": 1,
        "options": {
            "size": 4,
            "normalization": "residual",
            "include": ["*"],
            "exclude": [],
            "pack": False,
            "flatten": "layer",
            "base": None,
            "lora_canonical": "aligned",
        },
        "normalization": "none",
        "num_tokens": 2,
        "tensors": [
            {
                "name": "w",
                "role": "layer",
                "dtype": "float32",
                "shape": [2, 3],
                "start": 0,
                "num_runs": 1,
                "run_length": 6,
                "run_stride": 6,
            },
            {"name": "n", "role": "constant", "dtype": "int64", "shape": []},
            {"name": "t", "role": "tie", "of": "w"},
        ],
    }
    names = Checkpoint.open(tmp_path / "statistics.safetensors").tensors
    assert set(names) == {"layer.centre", "layer.scale", "layer.variance_mean", "constant.n"}


def _edit(change):
    def apply(folder: Path) -> None:
        content = json.loads((folder / "layout.json").read_text())
        change(content)
        (folder / "layout.json").write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "layout.json").unlink(), "layout.json does not exist"),
        (lambda folder: (folder / "layout.json").write_text("{"), "layout.json cannot be read as JSON"),
        (lambda folder: (folder / "layout.json").write_text("[]"), "layout.json is not a layout"),
        (_edit(lambda content: content.update(version=2)), "layout.json has version 2, and this rpg reads version 1"),
        (_edit(lambda content: content.pop("tensors")), "malformed entry"),
        (_edit(lambda content: content["options"].update(sise=3)), "malformed entry"),
        (_edit(lambda content: content["tensors"][0].update(start=10**9)), "do not fit"),
        (_edit(lambda content: content["tensors"][0].update(run_length=5)), "do not fit"),
        (_edit(lambda content: content["tensors"][-1].update(of="nobody")), "contradict"),
        (_edit(lambda content: content.update(num_tokens=1)), "do not fit"),
        (lambda folder: (folder / "statistics.safetensors").unlink(), "statistics.safetensors"),
        (
            lambda folder: (folder / "statistics.safetensors").write_bytes(
                (folder / "statistics.safetensors").read_bytes()[:-9]
            ),
            "statistics.safetensors",
        ),
        (
            lambda folder: save_checkpoint(folder / "statistics.safetensors", {"layer.centre": torch.zeros(3)}),
            "statistics.safetensors: tensor 'layer.centre' is torch.float32",
        ),
    ],
)
def test_damaged_folders_are_one_clear_line(zoo: Zoo, tmp_path: Path, damage, message: str):
    TokenLayout.fit(zoo, TokenOptions(size=16)).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        TokenLayout.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_token_counts_are_the_papers(tmp_path: Path):
    timm = pytest.importorskip("timm")
    from tokenization.checkpoint.tensor_file import TensorFile

    with torch.device("meta"):
        tensors = timm.create_model("vit_base_patch16_224").state_dict()
    TensorFile(tmp_path / "x.safetensors", {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}).close()
    layout = TokenLayout.without_statistics(Checkpoint.open(tmp_path / "x.safetensors"), TokenOptions(size=16384))
    assert (layout.num_tokens, layout.num_values) == (5378, 86_567_656)
