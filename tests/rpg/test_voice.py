"""What machines and people are told: --json, --quiet, interruptions, progress."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer

from rpg.console import INTERRUPTED, progress_bar, run_command, voice_of
from rpg.training import loop
from rpg.training.loop import train, train_to_the_end
from rpg.training.run_folder import RunFolder
from tests.conftest import make_zoo, small_config
from tests.rpg.conftest import Run
from tokenization.checkpoint import progress
from tokenization.checkpoint.checkpoint import Checkpoint


def test_both_words_are_taken_at_any_place() -> None:
    assert voice_of(["train", "--json", "x.yaml"])[0] == ["train", "x.yaml"]
    words, voice = voice_of(["--quiet", "score", "--", "--json"])
    assert words == ["score", "--", "--json"] and voice.quiet and not voice.as_json
    assert not voice_of(["train", "--help", "--json"])[1].as_json


def test_json_is_all_there_is_on_standard_output(rpg: Run, tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path)
    config.save(tmp_path / "c.yaml")
    code, out, err = rpg("train", tmp_path / "c.yaml", "--json")
    assert code == 0 and err == "" and json.loads(out)["steps"] == json.loads(out)["of"] == 12
    code, out, _ = rpg("--json", "generate", config.run, "-n", "2")
    written = json.loads(out)["networks"]
    assert code == 0 and len(written) == 2 and all(Path(each).is_file() for each in written)
    (tmp_path / "talks.py").write_text(
        "import os\nprint('loaded')\ndef score(weights):\n    print('hello'); os.system('echo child')\n    return 0.5\n"
    )
    code, out, _ = rpg("score", *written, "--score", f"{tmp_path / 'talks.py'}:score", "--json")
    assert code == 0 and next(iter(json.loads(out)["checkpoints"][written[0]][""].values())) == 0.5
    assert json.loads(rpg("inspect", tmp_path / "zoo", "--json")[1])["checkpoints"] == 6


def test_mistakes_for_machines_and_silence_for_people(rpg: Run, tmp_path: Path) -> None:
    code, out, err = rpg("train", tmp_path / "none.yaml", "--json")
    assert code == 2 and out == "" and json.loads(err)["exit_code"] == 2 and "none.yaml" in json.loads(err)["error"]
    make_zoo(tmp_path / "zoo")
    assert rpg("inspect", tmp_path / "zoo", "--quiet") == (0, "", "")
    code, out, err = rpg("inspect", tmp_path / "none", "--quiet")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("inside_typer", [False, True])
def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str], inside_typer: bool) -> None:
    app = typer.Typer()

    @app.command()
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command((lambda: app([], standalone_mode=False)) if inside_typer else stop, None, "run it again")
    assert ended.value.code == INTERRUPTED == 130
    assert capsys.readouterr().err.strip() == "error: interrupted; run it again"


def test_what_comes_after_a_stopped_training_is_left_out(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo")
    config = small_config(tmp_path)

    def stop(done: int, total: int, loss: float) -> None:
        if done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_to_the_end(config, progress=stop, say=lambda _: None)
    assert RunFolder(config.run).newest() is not None
    assert train_to_the_end(config, resume=True, say=lambda _: None) == Path(config.run) / "generator"


def test_watching_changes_nothing_and_keeps_to_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_zoo(tmp_path / "zoo")
    shown: list[int] = []

    def weights(name: str, watch: Callable[..., None] | None) -> dict[str, torch.Tensor]:
        folder = train(small_config(tmp_path, run=str(tmp_path / name)), watch=watch, say=lambda _: None)
        return Checkpoint.open(folder / "model.safetensors").state_dict()

    plain = weights("plain", lambda _: shown.append(0))
    assert shown == []  # a run of a second has no time to be watched
    monkeypatch.setattr(loop, "WATCHED", 1e9)
    monkeypatch.setattr(loop, "FIRST_WATCHED", 0.0)
    watched = weights("watched", lambda generator: shown.append(len(generator.generate(1, seed=0))))
    assert 5 <= len(shown) <= 10 and set(shown) == {1}
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_validation_accuracy_of_a_generator(tmp_path: Path) -> None:
    from rpg.experiments.comparison import Validation
    from rpg.experiments.single import collect
    from rpg.generation.generator import Generator
    from tokenization.errors import InputError
    from tokenization.zoo.zoo import Zoo

    task = {"name": "digits", "network": "mlp-mini", "train_steps": 30, "steps": 4}
    config = small_config(tmp_path, task=task)
    collect(config)
    validation = Validation(config, Zoo.open(config.zoo), 4)
    told = validation.told(Generator.from_pretrained(train(config, say=lambda _: None)))
    assert told.startswith("accuracy ") and told.endswith("%") and len(validation.wanted) == 4
    other = make_zoo(tmp_path / "none" / "zoo")
    with pytest.raises(InputError, match="a task that scores"):
        Validation(small_config(tmp_path / "none"), other)


def test_steps_tell_who_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    @contextmanager
    def listener(title: str, after: float) -> Iterator[Callable[[int, int], None]]:
        assert title == "working"
        yield lambda done, total: told.append((done, total))

    assert list(progress.steps("working", "ab")) == ["a", "b"] and told == []
    progress.listen(listener)
    try:
        assert list(progress.steps("working", iter("ab"), 2)) == ["a", "b"]
    finally:
        progress.listen(None)
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_a_bar_appears_once_and_not_for_what_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("short", after=60) as advance:
        advance(1, 2)
        advance(2, 2)
    assert capsys.readouterr().out == ""
    with progress_bar("long") as advance, progress_bar("inside") as inner:
        advance(1, 2)
        inner(1, 2)
        advance(2, 2, loss=0.25, note="accuracy 97.0%")
        advance(2, 2)
    out = capsys.readouterr().out
    assert out.count("long") == 1 and "inside" not in out and "loss 0.25, accuracy 97.0%" in " ".join(out.split())


def test_of_several_runs_each_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("runs") as advance:
        for total in (20, 30, 40):
            advance(1, total)
            advance(total, total)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line.count("runs") for line in lines] == [1, 1, 1]
    assert all(f"{total}/{total}" in line for total, line in zip((20, 30, 40), lines, strict=True))


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_zoo(tmp_path / "zoo")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = small_config(tmp_path, train={"log_with": ["tensorboard", "wandb"]})
    train(config, say=lambda _: None)
    assert list((Path(config.run) / "tensorboard").rglob("events*")) and list(Path(config.run).rglob("*.wandb"))
