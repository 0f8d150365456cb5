"""Generators on the hub, with a server that speaks its API on this machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from rpg.experiments.evaluating import Judge, evaluate_run
from rpg.generation.folders import FILES
from rpg.generation.generator import Generator
from rpg.generation.model_card import scores_of
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config, small_network
from tests.hub_server import HubServer
from tests.rpg.conftest import Run, refused
from tests.rpg.generation.test_adapters import adapters_at, generator_of
from tests.rpg.generation.test_texts import config_of, encoder_at, zoo_at
from tokenization.errors import InputError
from tokenization.zoo.zoo import ConditionSpec, Zoo

QUIET: dict[str, Any] = {"say": lambda _: None}


def size_of(state_dict: dict[str, Tensor]) -> dict[str, float]:
    return {"size": sum(float(value.float().square().mean()) for value in state_dict.values()), "tensors": 7}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a zoo in binary conditions, scored."""
    folder = tmp_path_factory.mktemp("shared")
    make_zoo(folder / "zoo", condition_size=2)
    config = small_config(folder, model={"condition": {"kind": "binary"}}, train={"steps": 2}, evaluate={"num": 2})
    train(config, **QUIET)
    evaluate_run(config.run, Judge(f"{__name__}:size_of"))
    return Path(config.run)


def card_of(hub: HubServer, repo: str) -> tuple[dict[str, Any], str]:
    text = hub.files(repo)["README.md"].decode()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return yaml.safe_load(front), body


def how_to_use(body: str) -> dict[str, Any]:
    """Run the code of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_a_generator_comes_back_as_it_was_with_its_scores_and_pictures(hub: HubServer, run: Path) -> None:
    generator = Generator.from_pretrained(run)
    assert generator.push_to_hub("me/gen", private=True).startswith(f"{hub.url}/me/gen/commit/")
    published = hub.files("me/gen")
    assert {*FILES, "README.md", "evaluation.json", "pictures/scatter.png"} == published.keys()
    assert not any(str(run.parent).encode() in content for content in published.values())
    front, body = card_of(hub, "me/gen")
    assert front["library_name"] == "rpg" and "rpg" in front["tags"]
    (entry,) = front["model-index"]
    scores = json.loads((run / "evaluation.json").read_text())["kinds"]
    metrics = {each["type"]: each["value"] for each in entry["results"][0]["metrics"]}
    assert metrics == {"size": scores["generated"]["summaries"]["size"]["mean"], "tensors": 7}
    assert f"| original | {scores['original']['summaries']['size']['mean']:.4g} | 7 |" in body
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", body):
        assert published[picture] == (run / Path(picture).name).read_bytes()
    used = how_to_use(body)
    assert isinstance(used["generator"], Generator) and len(used["networks"]) == 4
    small_network().load_state_dict(used["networks"][0])
    asked: dict[str, Any] = {"condition": [0, 1], "seed": 3}
    before, after = (each.generate(1, **asked)[0] for each in (generator, used["generator"]))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", ["none", "class", "vector", "metric"])
def test_how_to_use_runs_with_every_kind_of_condition(kind: str, hub: HubServer, tmp_path: Path) -> None:
    spec = ConditionSpec(kind, 3) if kind in ("class", "vector") else None  # type: ignore[arg-type]
    source, zoo = make_zoo(tmp_path / "source"), Zoo.create(tmp_path / "zoo", condition=spec)
    for index in range(len(source)):
        condition = {"class": [index % 3], "vector": [0.1, index, 2.0]}.get(kind)
        zoo.append(
            source.state_dict(index), run=0, step=index, condition=condition, metrics={"loss": 1.0 / (index + 1)}
        )
    model: dict[str, Any] = {"condition": {"kind": kind, **({"name": "loss"} if kind == "metric" else {})}}
    config = small_config(tmp_path, model=model, train={"steps": 1})
    Generator.from_pretrained(train(config, **QUIET)).push_to_hub("me/gen")
    front, body = card_of(hub, "me/gen")
    assert "model-index" not in front and "not promised here" in body
    small_network().load_state_dict(how_to_use(body)["networks"][3])


def test_texts_lose_the_place_of_their_encoder(hub: HubServer, tmp_path: Path) -> None:
    zoo_at(tmp_path)
    train(config_of(tmp_path, encoder_at(tmp_path / "encoder")), **QUIET)
    Generator.from_pretrained(tmp_path / "run").push_to_hub("me/texts")
    assert not any(str(tmp_path).encode() in content for content in hub.files("me/texts").values())
    used = how_to_use(card_of(hub, "me/texts")[1])
    assert used["generator"].texts.encoder == "encoder" and used["networks"][0]["w"].shape == (4, 8)


def test_adapters_name_their_base_model_and_not_its_place(hub: HubServer, tmp_path: Path) -> None:
    adapters_at(tmp_path, "llama")
    generator_of(tmp_path).push_to_hub("me/adapters")
    published = hub.files("me/adapters")
    assert not any(str(tmp_path).encode() in content for content in published.values())
    assert json.loads(published["adapter_config.json"])["base_model_name_or_path"] == "base"
    front, body = card_of(hub, "me/adapters")
    assert front["base_model"] == "base"
    generator = how_to_use(body)["generator"]
    assert generator.generate(1, output=tmp_path / "new")[0].is_dir()
    make_zoo(tmp_path / "other")
    train(small_config(tmp_path, zoo=str(tmp_path / "other"), run=str(tmp_path / "plain"), train={"steps": 1}), **QUIET)
    Generator.from_pretrained(tmp_path / "plain").push_to_hub("me/adapters")
    assert "adapter_config.json" not in hub.files("me/adapters"), "a file of the version before"


def test_revisions_the_cache_and_the_hub_out_of_reach(
    hub: HubServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    generator = Generator.from_pretrained(run)
    first = generator.push_to_hub("me/gen").rpartition("/")[2]
    generator.facts = {"changed": "yes"}
    generator.push_to_hub("me/gen", branch="next")
    for asked in ({"revision": "next"}, {"revision": first}, {}):
        facts = Generator.from_pretrained("me/gen", **asked).facts
        assert (facts == {"changed": "yes"}) == (asked.get("revision") == "next")
    assert Generator.from_pretrained("me/gen@next").facts == {"changed": "yes"}
    elsewhere = Generator.from_pretrained("me/gen", cache_dir=tmp_path / "elsewhere").folder
    assert elsewhere.is_relative_to(tmp_path / "elsewhere")
    for repo, words in (("me/gen@never", "there is no revision never"), ("me/none", "has no such model")):
        with pytest.raises(InputError, match=words):
            Generator.from_pretrained(repo)
    hub.stop()
    assert Generator.from_pretrained("me/gen").facts == Generator.from_pretrained(run).facts
    with pytest.raises(InputError, match=r"model me/none: 127\S+ could not be reached .* check the network"):
        Generator.from_pretrained("me/none")
    with pytest.raises(InputError, match="it is not in the cache; leave out local_files_only"):
        Generator.from_pretrained("me/none", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Generator.from_pretrained("me/gen")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set and it is not in the cache; unset it"):
        Generator.from_pretrained("me/none")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set; unset it"):
        generator.push_to_hub("me/gen")


def test_the_command_line_pushes_pulls_and_generates(
    hub: HubServer, rpg: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = rpg("push", run, "me/gen", "--message", "a first version")
    assert (code, err) == (0, "") and out.startswith(f"{hub.url}/me/gen/commit/")
    code, out, err = rpg("push", run.parent / "zoo", "me/zoo", "--type", "dataset")
    assert (code, err) == (0, "") and f"{hub.url}/datasets/me/zoo/commit/" in out
    monkeypatch.chdir(tmp_path)
    assert rpg("pull", "me/zoo", "mine/zoo", "--type", "dataset")[0] == 0
    assert len(Zoo.open("mine/zoo")) == 6
    assert rpg("pull", "me/gen", "mine/gen")[0] == 0
    assert Generator.from_pretrained("mine/gen").generate(1, condition=[1, 0])
    code, out, err = rpg("generate", "me/gen", "--num", "2", "--condition", "1,0")
    assert code == 0 and len(list(Path("generated").glob("*.safetensors"))) == 2
    refused(rpg("pull", "me/gen", "mine/gen"), "already exists")
    refused(rpg("pull", "me/zoo", "other"), "has no such model")
    refused(rpg("push", run.parent / "zoo", "me/zoo", "--type", "model"), "is a zoo")
    refused(rpg("push", run, "me/gen", "--type", "dataset"), "is not a zoo")
    refused(rpg("push", tmp_path / "nothing", "me/gen"), "there is no folder")
    refused(rpg("push", run, "not an id"), "write name/repository")


def test_a_push_that_breaks_off_or_may_not_be_is_one_line(
    hub: HubServer, rpg: Run, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = make_zoo(tmp_path / "zoo", num=1).path
    hub.drop = lambda method, path: "/commit/" in path
    refused(rpg("push", run, "me/gen"), "nothing was published")
    command = [sys.executable, "-m", "rpg", "push", str(zoo), "me/zoo"]  # with the client's notes as users meet them
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    refused((made.returncode, made.stdout, made.stderr), "nothing was published")
    hub.drop = lambda method, path: False
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(rpg("push", run, "me/gen"), "log in with `hf auth login`")
    assert hub.files("me/gen") == hub.files("me/zoo", "dataset") == {}


def test_scores_are_the_means_of_every_kind() -> None:
    def kinds(**means: float | None) -> dict[str, Any]:
        return {k: {"summaries": {"size": None if mean is None else {"mean": mean}}} for k, mean in means.items()}

    assert scores_of({"kinds": kinds(original=1.0, generated=0.5, noise=None)}) == {
        "generated": {"size": 0.5}, "original": {"size": 1.0},
    }  # fmt: skip
    assert scores_of({"kinds": kinds(original=1.0, generated=None)}) == {}, "of a zoo, which generates nothing"
    assert scores_of({"generated": {"accuracy": 1.0}}) == {}, "of an earlier version"
