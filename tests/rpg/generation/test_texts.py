"""Texts as conditions: from a table of adapters or networks to `rpg generate --prompt`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpg import cli
from rpg.config import Config
from rpg.generation import text_encoder as texts
from rpg.generation.generator import Generator
from rpg.generation.text_encoder import SentenceEncoder, text_table
from rpg.planning.zoo_summary import ZooSummary
from rpg.training.loop import train
from tests.conftest import small_config
from tests.test_formats import documented
from tokenization.errors import InputError
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo

TEXTS = ("3 cats, and a dog", "translate to French", "sort the numbers", "write a poem")


def encoder_at(folder: Path, kind: str = "bert", seed: int = 0) -> str:
    """A small random sentence encoder with a tokenizer for the texts."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if kind == "bert":
        words = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            ",",
            *sorted({word.strip(",") for text in TEXTS for word in text.split()}),
        ]
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
        tokenizer.train_from_iterator(TEXTS, trainer)
        names = {"eos_token": "</s>"}  # no padding token, as with Llama's own
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"vocab_size": 320, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "bert": lambda: transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=40),
        "llama": lambda: transformers.LlamaConfig(**sizes, intermediate_size=32),
        "t5": lambda: transformers.T5Config(vocab_size=320, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
    }[kind]()
    torch.manual_seed(seed)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def zoo_at(folder: Path, num: int = 16) -> Zoo:
    """Networks of which each text has its own kind, from files and a table."""
    (folder / "mine").mkdir()
    lines = ["file,condition"]
    for index in range(num):
        torch.manual_seed(index)
        sign = torch.tensor([1.0 - 2 * (index >> bit & 1) for bit in range(2)]).repeat_interleave(16)
        state = {"w": (sign + 0.1 * torch.randn(32)).view(4, 8), "b": 0.1 * torch.randn(4)}
        save_file(state, folder / "mine" / f"{index:02}.safetensors")
        lines.append(f'{index:02}.safetensors,"{TEXTS[index % 4]}"')
    (folder / "mine" / "conditions.csv").write_text("\n".join(lines))
    return collect_from(folder / "mine", folder / "zoo", table=folder / "mine" / "conditions.csv", condition="text")


def config_of(folder: Path, encoder: str, steps: int = 2) -> Config:
    condition = {"kind": "text", "encoder": encoder, "dropout": 0.1}
    train_section = {"steps": steps, "batch_size": 16, "learning_rate": 0.01, "ema_decay": 0.9}
    return small_config(folder, model={"condition": condition, "state": {"of": "none"}}, train=train_section)


def test_texts_of_a_table_are_taken_as_they_are(tmp_path: Path) -> None:
    zoo = zoo_at(tmp_path)
    assert zoo.condition is not None and set(zoo.condition.names) == set(TEXTS)
    assert [zoo.condition.names[int((entry.condition or (9,))[0])] for entry in zoo.entries[:4]] == list(TEXTS)
    again = collect_from(tmp_path / "mine", tmp_path / "zoo", table=tmp_path / "mine" / "conditions.csv")
    assert len(again) == len(zoo)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_a_vector_is_the_mean_of_the_last_hidden_states(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    name = encoder_at(tmp_path, kind)
    network, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    network = network.get_encoder() if kind == "t5" else network
    found = SentenceEncoder(name, "here").vectors(TEXTS)
    assert found.shape == (4, 24)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            hidden = network(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, hidden / hidden.square().mean().sqrt())
    long = SentenceEncoder(name, "here").vectors(["cats " * 100])
    assert torch.isfinite(long).all()  # cut to what the network can take


def test_the_encoder_runs_once_a_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, name, other = zoo_at(tmp_path), encoder_at(tmp_path / "a"), encoder_at(tmp_path / "b", seed=1)
    first = text_table(zoo, name)
    assert first.texts == zoo.condition.names and first.fingerprint != text_table(zoo, other).fingerprint  # type: ignore[union-attr]
    assert not torch.equal(first.vectors, text_table(zoo, other).vectors)
    config = config_of(tmp_path, name)
    monkeypatch.setattr(texts, "SentenceEncoder", lambda *_: pytest.fail("loaded again"))
    assert torch.equal(text_table(Zoo.open(zoo.path), name).vectors, first.vectors)
    assert ZooSummary.of(zoo, config).condition_size == 24
    Generator.from_pretrained(train(config, say=lambda _: None)).generate(1, condition=TEXTS[2])
    next(path for path in (zoo.path / "cache").glob("texts-*")).write_bytes(b"damaged")
    monkeypatch.undo()
    assert torch.equal(text_table(zoo, name).vectors, first.vectors)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    zoo_at(folder)
    train(config_of(folder, encoder_at(folder / "encoder"), steps=250), say=lambda _: None)
    return folder


def kinds(networks: list[dict[str, Tensor]]) -> list[int]:
    """Which text's kind each network is of."""
    halves = [network["w"].reshape(2, 16).mean(1) for network in networks]
    return [int(half[0] < 0) + 2 * int(half[1] < 0) for half in halves]


def test_networks_are_of_the_kind_that_the_text_asks_for(run: Path) -> None:
    generator = Generator.from_pretrained(run / "run")
    networks = generator.generate(8, condition=[TEXTS[index % 4] for index in range(8)], steps=8)
    assert kinds(networks) == [0, 1, 2, 3, 0, 1, 2, 3]
    halves = torch.stack([network["w"].reshape(2, 16).mean(1).abs() for network in networks])
    assert (halves - 1).abs().max() < 0.35


def test_guidance_goes_from_no_condition_to_more_of_it(run: Path) -> None:
    generator = Generator.from_pretrained(run / "run")

    def weights(text: str, scale: float) -> Tensor:
        (network,) = generator.generate(1, seed=4, condition=text, guidance_scale=scale, steps=8)
        return torch.as_tensor(network["w"])

    free = weights(TEXTS[0], 0.0)
    assert torch.equal(free, weights(TEXTS[1], 0.0))  # without its condition a network knows nothing of the text
    assert torch.equal(weights(TEXTS[1], 1.0), generator.generate(1, seed=4, condition=TEXTS[1], steps=8)[0]["w"])

    def one_step(scale: float) -> Tensor:  # x + v, and v is free + scale (conditioned - free)
        (network,) = generator.generate(1, seed=4, condition=TEXTS[1], guidance_scale=scale, steps=1)
        return torch.as_tensor(network["w"])

    none, full = one_step(0.0), one_step(1.0)
    assert (full - none).abs().max() > 0.01
    torch.testing.assert_close(one_step(3.0), none + 3 * (full - none), rtol=0, atol=1e-5)


def test_the_texts_travel_with_the_generator(run: Path) -> None:
    file = run / "run" / "generator" / "texts.safetensors"
    with safe_open(file, "pt") as opened:
        assert sorted(opened.metadata()) == sorted(documented("texts.safetensors"))
        assert json.loads(opened.metadata()["texts"]) == sorted(TEXTS) and list(opened.keys()) == ["vectors"]
    assert f"through the sentence encoder {run / 'encoder'}" in (file.parent / "README.md").read_text()


def test_a_new_prompt_goes_through_the_same_encoder(run: Path, tmp_path: Path) -> None:
    folder = (run / "run" / "generator").resolve()
    generator = Generator.from_pretrained(folder)
    new = "sort the poem"
    assert generator.texts is not None
    known, encoded = generator.texts.vectors, SentenceEncoder(str(run / "encoder"), "here").vectors([new])[0]
    encoded = (encoded - known.mean(0)) / (known - known.mean(0)).square().mean().sqrt()
    asked = generator.generate(1, condition=new)[0]
    assert torch.equal(asked["w"], generator.generate(1, condition=encoded)[0]["w"])
    assert not torch.equal(asked["w"], generator.generate(1, condition=TEXTS[2])[0]["w"])
    generator.texts = generator.texts.with_encoder(encoder_at(tmp_path / "other", seed=5))
    assert generator.generate(1, condition=TEXTS[2])  # a text of the zoo needs no encoder
    with pytest.raises(InputError, match="--prompt-model .* has other weights"):
        generator.generate(1, condition=new)


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command line; the line on standard error, or nothing."""
    monkeypatch.setattr(sys, "argv", ["rpg", *map(str, arguments)])
    capsys.readouterr()
    try:
        cli.main()
    except SystemExit as exit_:
        assert exit_.code in (0, None, 2)
    return capsys.readouterr().err


def test_the_command_line_takes_a_prompt(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a poem of numbers"
    assert not command(monkeypatch, capsys, "generate", run / "run", "--output", tmp_path / "new", "--prompt", prompt)
    (file,) = (tmp_path / "new").iterdir()
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["rpg.provenance"])["condition"] == prompt
    expected = Generator.from_pretrained(run / "run").generate(1, condition=prompt)[0]
    assert all(torch.equal(value, expected[name]) for name, value in load_file(file).items())
    for arguments, words in (
        ([], "needs a condition that says what to generate for; give a text"),
        (["--prompt", " "], "an empty text"),
        (["--prompt", prompt, "--prompt-model", tmp_path / "none"], "could not be loaded"),
        (["--condition", "1,2"], "give 24 values"),
    ):
        error = command(monkeypatch, capsys, "generate", run / "run", "--output", tmp_path / "no", *arguments)
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "no").exists()
    words = ("export", run / "run", "--to", "torch", "--output", tmp_path / "net.pth")
    assert not command(monkeypatch, capsys, *words, "--prompt", prompt)
    exported = torch.load(tmp_path / "net.pth", weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in exported.items())


def test_an_encoder_that_is_not_named_or_not_there_is_one_line(tmp_path: Path) -> None:
    zoo_at(tmp_path)
    nowhere = str(tmp_path / "nowhere")
    for encoder, words in (
        (None, "model.condition.encoder is empty"),
        (nowhere, "condition.encoder .* could not be loaded"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            train(config_of(tmp_path, encoder), overwrite=True, say=lambda _: None)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_a_class_is_asked_for_by_name_or_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    names = ["cat", "dog", "ship"]
    for index in range(6):
        name = f"{names[index % 3]}{index}.safetensors"
        save_file({"w": torch.randn(32) + index % 3}, tmp_path / "mine" / name)
    collect_from(tmp_path / "mine", tmp_path / "zoo", pattern=r"(?P<condition>[a-z]+)\d\.")
    train(small_config(tmp_path, model={"condition": {"kind": "class"}}, train={"steps": 2}), say=lambda _: None)
    for name, wanted in (("named", "dog"), ("numbered", "1"), ("other", "cat")):
        arguments = ("generate", tmp_path / "run", "--output", tmp_path / name, "--condition", wanted)
        assert not command(monkeypatch, capsys, *arguments)
    named, numbered, other = (
        load_file(tmp_path / name / "network-00000.safetensors")["w"] for name in ("named", "numbered", "other")
    )
    assert torch.equal(named, numbered) and not torch.equal(named, other)
    for wanted, words in (("3", "a whole number from 0 to 2"), ("0.5", "a whole number"), ("bird", "'bird'")):
        error = command(monkeypatch, capsys, "generate", tmp_path / "run", "--condition", wanted)
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    with pytest.raises(InputError, match="1 texts; give 1 values"):
        Generator.from_pretrained(tmp_path / "run").generate(1, condition="dog")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def wait(seconds: float) -> None:
        raise AssertionError(f"asked again after {seconds} s")

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", wait)
    with pytest.raises(InputError, match=r"model\.condition\.encoder some/encoder could not be loaded") as error:
        SentenceEncoder("some/encoder", "model.condition.encoder")
    assert "\n" not in str(error.value)


def test_without_the_hub_the_proposal_names_an_encoder_that_needs_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    zoo_at(tmp_path)
    words = ("inspect", tmp_path / "zoo", "--write-config", tmp_path / "mine.yaml")
    error = command(monkeypatch, capsys, *words)
    cure = error.strip().rpartition(": ")[2].split()
    assert cure[0] == "--set" and not (tmp_path / "mine.yaml").exists()
    assert not command(monkeypatch, capsys, *words, *cure)
    assert Config.load(tmp_path / "mine.yaml").model.condition.encoder == "wordllama"
