"""Descriptions of sensors: the grammar, its phrases as wordllama sees them, and a generator that is asked in words."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rpg.config import Config
from rpg.experiments.sensors import evaluate_sensors
from rpg.generation.generator import Generator
from rpg.generation.text_encoder import phrases_of, spelled, static_encoder
from rpg.models.conditioning import ConditionConfig, ConditionEncoder
from rpg.tasks.sensors.config import SensorsConfig
from rpg.tasks.sensors.simulator import declared_settings, draw_settings
from rpg.tasks.sensors.words import GRADED, LEFT, QUARTERS, RIGHT, SLIGHT, STRONG, TURNED, describe
from rpg.training.data import TrainingSet
from rpg.training.loop import train
from tests.rpg.conftest import CONFIGS, SMALL_SENSORS, refused
from tokenization.errors import InputError
from tokenization.zoo.condition import settings_features
from tokenization.zoo.zoo import Zoo

SETTINGS = declared_settings(SensorsConfig())
ASKED = "camera upside down, light on dark, a little too close"


@pytest.fixture
def run(words_run: Path) -> Path:
    return words_run


def test_held_out_wordings_are_never_taught() -> None:
    every = [each for grades in GRADED.values() for each in grades] + [*QUARTERS, TURNED]
    taught = {wording for each in every for wording in each[0]}
    held_out, tested = ({wording for each in every for wording in each[place]} for place in (1, 2))
    assert not taught & held_out and not tested & (taught | held_out) and min(len(held_out), len(tested)) > 20
    for each in (SLIGHT, STRONG, LEFT, RIGHT):
        assert len({word for part in each for word in part}) == sum(map(len, each))
    values = draw_settings(SETTINGS, 300, torch.Generator().manual_seed(0))
    said = [set(phrases_of(text)) for text in describe(SETTINGS, values, torch.Generator().manual_seed(1))]
    fixed = {phrase for phrase in held_out | tested if "{" not in phrase}
    assert len(fixed) > 20 and not any(fixed & phrases for phrases in said)
    (phrase,) = describe(SETTINGS[:1], torch.tensor([[180.0]]), torch.Generator().manual_seed(0), "test")
    assert phrase.endswith(QUARTERS[2][2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([180.0, 1.08, 0.0, 0.0, 0.0], ("upside|head|180|wrong way|half a turn", "close|near|larger?|zoomed in|big")),
        (
            [303.0, 1.0, -0.2, 0.0, 1.0],
            ("57 degrees.*(clockw|right)|(clockw|right).*57", "left", "dark|white|inverted"),
        ),
        ([57.0, 0.8, 0.0, 0.2, 0.0], ("57", "counter|anti|left", "away|distant|small|out|tiny|far", "down|low|below")),
    ],
)
def test_a_description_says_what_is_not_as_it_should_be(values, expected) -> None:
    (text,) = describe(SETTINGS, torch.tensor([values]), torch.Generator().manual_seed(0))
    for part in expected:
        assert any(re.search(part, phrase) for phrase in text.split(",")), (part, text)


def test_phrases_are_split_and_numbers_are_spelled() -> None:
    assert phrases_of("Turned 137 degrees, inverted and a bit too high.") == [
        "turned one hundred thirty seven degrees", "inverted", "a bit too high",
    ]  # fmt: skip
    assert phrases_of("45 degrees Anti-clockwise, close-up") == ["forty five degrees anticlockwise", "closeup"]
    assert phrases_of("one hundred and five degrees; scale 1.1") == ["one hundred and five degrees", "scale one.one"]
    assert [spelled(number) for number in (0, 13, 40, 99, 100, 360, 907)] == [
        "zero", "thirteen", "forty", "ninety nine", "one hundred", "three hundred sixty", "nine hundred seven",
    ]  # fmt: skip


def test_wordllama_is_loaded_without_a_network_and_leaves_logging_alone() -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    vectors = static_encoder("test").vectors(["a little too close", "slightly too near", "the stock market"])
    assert vectors.shape == (3, 256) and torch.allclose(vectors.square().mean(1), torch.ones(3), atol=1e-5)
    cosines = torch.nn.functional.cosine_similarity(vectors[0], vectors[1:])
    assert cosines[0] > 0.4 > 0.1 > cosines[1]
    assert (logging.getLogger().handlers, logging.getLogger().level) == before


def test_the_order_of_phrases_and_padding_do_not_matter() -> None:
    torch.manual_seed(0)
    encoder = ConditionEncoder(ConditionConfig(kind="text", features=3), 5, 8)
    rows = torch.cat([torch.randn(2, 4), torch.ones(2, 1)], 1)
    padded = torch.cat([rows, torch.zeros(1, 5)]).flatten()[None]
    assert torch.allclose(encoder(rows.flatten()[None]), encoder(rows.flip(0).flatten()[None]), atol=1e-6)
    assert torch.allclose(encoder(rows.flatten()[None]), encoder(padded), atol=1e-6)


def test_a_generator_is_asked_in_words(run: Path, rpg) -> None:
    generator = Generator.from_pretrained(run)
    assert generator.texts is not None and generator.texts.phrases == 8 and len(generator.texts.texts) > 20
    code, out, _ = rpg("generate", run, "--prompt", ASKED, "--output", run / "said")
    assert code == 0 and "what was learned" in out
    (file,) = (run / "said").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        provenance = json.loads(opened.metadata()["rpg.provenance"])
    made = load_file(file)
    assert provenance["condition"] == ASKED and provenance["distance"]["distance"] > 0
    (same,) = generator.generate(1, condition="A little too close and light on dark, camera upside down")
    assert all(torch.allclose(made[name], value, atol=1e-5) for name, value in same.items())
    with pytest.raises(InputError, match=r"has 9 phrases between commas; give 1 to 8"):
        generator.generate(1, condition="inverted, " * 9)
    refused(rpg("generate", run, "--prompt", ", ,", "--output", run / "none"), "has 0 phrases", "give 1 to 8")


def test_words_about_something_else_are_said_to_be_far(run: Path) -> None:
    generator = Generator.from_pretrained(run)
    taught, other, strange = (
        generator.distance(text) for text in ("upside down, inverted", "the wrong way up, dark on bright", "buy shares")
    )
    assert taught is not None and other is not None and strange is not None
    assert taught.distance < other.distance < strange.distance and strange.error is None


def test_the_report_judges_wordings_that_nobody_taught(run: Path) -> None:
    report = evaluate_sensors(run)
    assert report.asked["by"] == "words" and len(report.asked["words"]) == 3
    assert {"generated", "taught_wordings", "kernel_ridge"} < report.kinds.keys()
    assert "taught_wordings" not in report.rivals()


def test_what_does_not_fit_is_one_line(tmp_path: Path, run: Path) -> None:
    places = [*SMALL_SENSORS, f"zoo={run.parent / 'zoo'}", f"run={tmp_path / 'run'}", "train.networks=null"]
    for change, said in {
        "model.condition.encoder=null": r"model.condition.encoder is empty; name wordllama",
        "model.condition.features=7": r"features is 7, but the settings have 10; set it to that",
    }.items():
        with pytest.raises(InputError, match=said):
            train(Config.load(f"{CONFIGS}/sensors_words.yaml", [*places, change]), say=lambda _: None)
    with pytest.raises(InputError, match=r"phrases needs kind: text and features"):
        Config.load(f"{CONFIGS}/sensors.yaml", ["model.condition.phrases=3"])


def test_only_what_reads_words_is_trained_for_networks_that_are_there(run: Path, tmp_path: Path) -> None:
    places = [*SMALL_SENSORS, f"zoo={run.parent / 'zoo'}"]
    train(Config.load(f"{CONFIGS}/sensors.yaml", [*places, f"run={tmp_path / 'settings'}"]), say=lambda _: None)
    words = [*places, f"run={tmp_path / 'words'}", f"train.networks={tmp_path / 'settings'}"]
    train(Config.load(f"{CONFIGS}/sensors_words.yaml", words), say=lambda _: None)
    made, read = (Generator.from_pretrained(tmp_path / name) for name in ("settings", "words"))
    taken = read.network.state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in made.network.state_dict().items())
    untrained = TrainingSet(Zoo.open(run.parent / "zoo"), read.config).build_network(read.layout).state_dict()
    learned = {name for name, value in untrained.items() if not torch.equal(value, taken[name])}
    assert {name for name in learned if "reader" in name} == {name for name in taken if "reader" in name}
    settings = torch.tensor([[180.0, 1.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(made.generate(1, condition=settings)[0]["1.bias"], decoded(read, settings), atol=1e-6)
    for change, said in {
        f"train.networks={tmp_path / 'none'}": "none",
        "model.backbone.d_model=16": "has other networks, or learned from another zoo",
        "train.imitation=1": "networks of another run learn nothing more; set imitation to 0",
    }.items():
        with pytest.raises(InputError, match=said):
            train(Config.load(f"{CONFIGS}/sensors_words.yaml", [*words, change]), overwrite=True, say=lambda _: None)
    with pytest.raises(InputError, match=r"set model.condition.read: true, or phrases"):
        train(Config.load(f"{CONFIGS}/sensors.yaml", [*words]), overwrite=True, say=lambda _: None)


def decoded(generator: Generator, settings: torch.Tensor) -> torch.Tensor:
    """The first bias of the network for settings, past what reads words."""
    mask, inputs = generator.layout.mask.float(), settings_features(SETTINGS, settings)
    tokens = generator.network.one_step(torch.zeros(1, *mask.shape), mask, None, inputs)
    return generator.layout.decode_batch(tokens, constants=True)["1.bias"][0]
