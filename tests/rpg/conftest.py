"""The command line in this process, as a user meets it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rpg import cli
from rpg.config import Config
from rpg.tasks import build_task
from rpg.training.loop import train
from tests.rpg.commands import write_configs
from tests.rpg.forks import ForkServer

CONFIGS = Path(__file__).parents[2] / "configs"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rpg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rpg", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return int(str(code or 0)), out, err

    return run


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2, at most a progress bar on standard output, one line on standard error that names the parts."""
    code, out, err = result
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert all("/" in line and "%" not in line for line in out.splitlines()), out
    for part in parts:
        assert part in err, err


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Starts commands that can really be killed."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> Path:
    """A folder with the zoo and the run of ``digits.yaml`` of `tests.rpg.commands`."""
    folder = tmp_path_factory.mktemp("prepared")
    write_configs(folder)
    for command in ("collect", "train"):
        places = [each for name in ("run", "zoo") for each in ("--set", f"{name}={folder / name}")]
        forks.start(folder, command, "digits.yaml", *places, log=folder / "log")
        assert forks.finish() == 0, (folder / "log").read_text()
    return folder


SMALL_SENSORS = (
    "task.seen=12", "task.validation=2", "task.unseen=3", "task.generalist.steps=20", "task.specialist.steps=10",
    "train.steps=6", "train.save_every=6", "train.precision=fp32", "train.batch_size=4",
    "train.behaviour.weight=1",
)  # fmt: skip


@pytest.fixture(scope="session")
def words_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hardly trained generator of networks for sensors in words; its zoo lies beside it."""
    folder = tmp_path_factory.mktemp("words")
    places = (f"zoo={folder / 'zoo'}", f"run={folder / 'run'}")
    config = Config.load(f"{CONFIGS}/sensors_words.yaml", [*SMALL_SENSORS, *places, "evaluate.informed=0",
                         "evaluate.fine_tuning=[]", "train.networks=null"])  # fmt: skip
    build_task(config.task).collect(folder / "zoo", processes=1)  # type: ignore[arg-type, call-arg]
    train(config, say=lambda _: None)
    return folder / "run"


@pytest.fixture(scope="session")
def example_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of sensors and two hardly trained generators that take examples."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("examples", "examples_zoo", "draws"):
        places = (f"zoo={folder / 'zoo'}", f"run={folder / name}")
        config = Config.load(f"{CONFIGS}/sensors_{name}.yaml", [*SMALL_SENSORS, *places, "train.networks=null"])
        build_task(config.task).collect(folder / "zoo", processes=1)  # type: ignore[arg-type, call-arg]
        train(config, say=lambda _: None)
    return folder
