"""Zoos on the hub, with a server that speaks its API on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import make_zoo
from tests.hub_server import TOKEN, HubServer
from tokenization.errors import InputError
from tokenization.zoo.hub import is_local_path, publish, without_local_paths
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo


def same(zoo: Zoo, other: Zoo) -> bool:
    return len(zoo) == len(other) and all(
        torch.equal(value, other.state_dict(index)[name])
        for index in range(len(zoo))
        for name, value in zoo.state_dict(index).items()
    )


def test_a_zoo_comes_back_as_it_was(hub: HubServer, tmp_path: Path) -> None:
    made = make_zoo(tmp_path / "zoo", condition_size=2)
    (made.path / "cache").mkdir()
    (made.path / "cache" / "junk.safetensors").write_bytes(b"12345678")
    address = made.push_to_hub("me/zoo")
    assert address.startswith(f"{hub.url}/datasets/me/zoo/commit/")
    published = hub.files("me/zoo", "dataset")
    assert {"zoo.json", "manifest.jsonl", "README.md"} < published.keys() and not any(
        "cache" in name for name in published
    )
    for path in (None, tmp_path / "again"):
        zoo = Zoo.from_hub("me/zoo", path)
        zoo.verify()
        assert same(zoo, made) and zoo.entries == made.entries and zoo.condition == made.condition
        assert zoo.digest() == made.digest()
    assert zoo.path == tmp_path / "again"
    before = len(hub.requests)
    assert Zoo.from_hub("me/zoo").path == Zoo.from_hub("me/zoo", local_files_only=True).path
    assert not any("resolve" in path for _, path in hub.requests[before:])
    zoo.append(made.state_dict(0), run=0, step=9, condition=[0, 1])  # what is written there stays there
    assert len(Zoo.from_hub("me/zoo")) == len(made)


def test_adopted_checkpoints_go_with_the_zoo_and_their_places_do_not(hub: HubServer, tmp_path: Path) -> None:
    elsewhere = make_zoo(tmp_path / "elsewhere")
    torch.save({k: v + 1 for k, v in elsewhere.state_dict(0).items()}, tmp_path / "elsewhere" / "checkpoints" / "a.pth")
    zoo = collect_from(str(elsewhere.path / "checkpoints"), tmp_path / "zoo")
    assert any(entry.external for entry in zoo.entries) and any(entry.source for entry in zoo.entries)
    zoo.push_to_hub("me/adopted")
    assert not any(str(tmp_path).encode() in content for content in hub.files("me/adopted", "dataset").values())
    shutil.rmtree(elsewhere.path)
    pulled = Zoo.from_hub("me/adopted", tmp_path / "pulled")
    pulled.verify()
    assert len(pulled) == 7 and not any(entry.external for entry in pulled.entries)


def test_a_smaller_zoo_leaves_nothing_of_the_larger(hub: HubServer, tmp_path: Path) -> None:
    make_zoo(tmp_path / "large", num=6).push_to_hub("me/zoo")
    make_zoo(tmp_path / "small", num=2).push_to_hub("me/zoo", branch="small")
    names = hub.files("me/zoo", "dataset", "small")
    assert sum(name.startswith("checkpoints/") for name in names) == 2
    assert len(Zoo.from_hub("me/zoo")) == 6 and len(Zoo.from_hub("me/zoo", revision="small")) == 2


def test_an_interrupted_upload_publishes_nothing_and_a_retry_goes_on(hub: HubServer, tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    uploads = 0

    def drop(method: str, path: str) -> bool:
        nonlocal uploads
        uploads += method == "PUT"
        return method == "PUT" and uploads > 2

    hub.drop = drop
    with pytest.raises(
        InputError, match=r"dataset me/zoo: the upload to 127.* broke off .*nothing was published"
    ) as caught:
        zoo.push_to_hub("me/zoo")
    assert "\n" not in str(caught.value)
    assert hub.files("me/zoo", "dataset") == {} and hub.commits("me/zoo", "dataset") == 1
    hub.drop = lambda method, path: "/commit/" in path
    with pytest.raises(InputError, match="nothing was published"):
        zoo.push_to_hub("me/zoo")
    assert hub.files("me/zoo", "dataset") == {}
    hub.drop = lambda method, path: False
    hub.requests.clear()
    zoo.push_to_hub("me/zoo")
    assert sum(method == "PUT" for method, _ in hub.requests) == 0, "what had come through was sent a second time"
    assert same(Zoo.from_hub("me/zoo"), zoo) and hub.commits("me/zoo", "dataset") == 2


def test_an_interrupted_download_is_no_zoo_until_it_is_repeated(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # it tries five times
    zoo = make_zoo(tmp_path / "zoo")
    zoo.push_to_hub("me/zoo")
    hub.drop = lambda method, path: method == "GET" and path.endswith("000003.safetensors")
    with pytest.raises(InputError, match="dataset me/zoo: "):
        Zoo.from_hub("me/zoo", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    hub.drop = lambda method, path: False
    assert same(Zoo.from_hub("me/zoo", tmp_path / "pulled"), zoo)


def test_what_the_hub_holds_is_not_trusted(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no such dataset"):
        Zoo.from_hub("me/nothing")
    zoo = make_zoo(tmp_path / "zoo", num=1)
    files: dict[str, Path | bytes] = {"README.md": b"---\ntags: [rpg]\n---\n"}
    publish(files, "me/empty", "dataset", ())
    with pytest.raises(InputError, match=r"is not a zoo: it has no zoo\.json"):
        Zoo.from_hub("me/empty")
    line = {**json.loads(zoo.entries[0].to_line()), "file": "/etc/passwd", "external": True}
    files |= {"zoo.json": zoo.path / "zoo.json", "manifest.jsonl": json.dumps(line).encode() + b"\n"}
    publish(files, "me/thief", "dataset", ())
    with pytest.raises(InputError, match="names files outside the zoo"):
        Zoo.from_hub("me/thief", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_nothing_of_this_machine_is_published(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.md").write_text(f"see {tmp_path}/zoo")
    with pytest.raises(InputError, match="names your home folder"):
        publish({"notes.md": tmp_path / "notes.md"}, "me/notes", "model", ())
    with pytest.raises(InputError, match="holds your access token"):
        publish({"notes.md": f"token {TOKEN}".encode()}, "me/notes", "model", ())
    assert hub.requests == []


@pytest.mark.parametrize("text", ["/home/a/b", "~/b", "C:\\a\\b", "../b", "a/../../b", "\\\\host\\b"])
def test_local_paths_are_cut_to_their_names(text: str) -> None:
    assert is_local_path(text) and without_local_paths({"a": [text, 1, "runs/b"]}) == {"a": ["b", 1, "runs/b"]}


def test_other_texts_stay() -> None:
    for text in ("runs/demo", "name/model", "a text, ~ or / in it", "", "timm/resnet18.a1_in1k"):
        assert not is_local_path(text) and without_local_paths(text) == text
