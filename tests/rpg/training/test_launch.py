"""Real launches by every configuration of configs/accelerate that needs no GPU, against one plain process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.training.batches import BatchSampler
from rpg.training.data import TrainingSet
from rpg.training.loop import train
from tests.conftest import make_zoo, small_config
from tokenization.layout.layout import TokenLayout
from tokenization.zoo.zoo import Zoo

BIN = Path(sys.executable).parent
LAUNCHED = str(Path(__file__).with_name("launched.py"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."}
ON_CPU = {"ACCELERATE_USE_CPU": "true"}  # the launchers for GPUs, on gloo
# Each way's environment, how it says that it spreads the weights, and whether it is one process's arithmetic.
WAYS = {
    "ddp": (ON_CPU, "2 processes on cpu, each with all weights"),
    "fsdp2": (ON_CPU, "2 processes on cpu, weights spread by FSDP"),
    "deepspeed_zero2": ({}, "2 processes on cpu, weights spread by DeepSpeed"),
    "deepspeed_zero3": ({}, "2 processes on cpu, weights spread by DeepSpeed"),
}


def launch(way: str, *command: str, environment: dict[str, str] | None = None) -> str:
    launcher = [str(BIN / "accelerate-launch"), "--config_file", f"configs/accelerate/{way}.yaml"]
    result = subprocess.run(
        [*launcher, *command], env={**ENVIRONMENT, **(environment or {})}, timeout=300, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def losses(run: str | Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def assert_close(run: str | Path, other: str | Path) -> None:
    """Same losses to 1e-5, the same checkpoint at the end: weights, their average and the optimizer."""
    assert losses(run) == pytest.approx(losses(other), abs=1e-5)
    last = sorted((Path(other) / "checkpoints").iterdir())[-1].name
    for name in ("model", "ema", "optimizer"):
        mine, theirs = (load_file(Path(each) / "checkpoints" / last / f"{name}.safetensors") for each in (run, other))
        assert mine.keys() == theirs.keys()
        for key in theirs:
            scale = 1 if name == "optimizer" else 10  # a small gradient of another rounding moves a weight further
            assert mine[key].sub(theirs[key]).abs().max() < 1e-5 * scale, (name, key)
    generator = Generator.from_pretrained(run)
    generator.generate(1)


def demanding_config(folder: Path, run: str) -> Config:
    """Everything that could go wrong when weights are spread; layers too large for DeepSpeed to leave whole."""
    model = {
        "position": "learned",
        "state": {"of": "checkpoint", "noise": 0.3},
        "backbone": {"kind": "lstm", "d_model": 64, "num_layers": 1, "checkpointing": True},
        "denoiser": {"kind": "mlp", "width": 64, "hidden": 32, "depth": 1, "checkpoint_rows": 7},
    }
    training = {"gradient_accumulation": 2, "gradient_clip": 0.05, "keep": 3, "steps": 8, "save_every": 3}
    return small_config(folder, run=str(folder / run), model=model, train=training)


def normalised_config(folder: Path, run: str) -> Config:
    """Batch normalisation, whose statistics are those of all processes' rows."""
    model = {
        "backbone": {"kind": "lstm", "d_model": 64, "num_layers": 1},
        "denoiser": {"kind": "unet1d", "channels": [1, 8, 12, 16, 12, 8, 1], "checkpointing": True},
    }
    return small_config(folder, run=str(folder / run), model=model, train={"ema_decay": 0.5, "steps": 8})


def mamba2_config(folder: Path, run: str) -> Config:
    """The paper's backbone, whose parameters are used outside the ``forward`` of the layers that hold them."""
    backbone = {"kind": "mamba2", "d_model": 64, "d_state": 16, "headdim": 16, "chunk_size": 4, "num_layers": 2}
    model = {"backbone": backbone, "denoiser": {"kind": "mlp", "width": 64, "hidden": 32, "depth": 1}}
    return small_config(folder, run=str(folder / run), model=model, train={"keep": 3, "steps": 8, "save_every": 3})


def poisoned_config(folder: Path, run: str) -> tuple[Config, int]:
    """One checkpoint's values cannot be squared. Also returns the step, from 1, in which a process meets it."""
    path = folder / "poisoned"
    if not path.exists():
        zoo = make_zoo(path)
        state = zoo.state_dict(0)
        state["3.bias"].fill_(1e30)
        zoo.append(state, run=0, step=9)
    zoo = Zoo.open(path)
    config = small_config(folder, run=str(folder / run), zoo=str(path), tokens={"normalization": "none"})
    sampler = BatchSampler(TrainingSet(zoo, config), TokenLayout.fit(zoo, config.tokens))
    return config, next(step + 1 for step in range(2) if len(zoo) - 1 in sampler.examples(step))


def keep_first_save(run: Path) -> None:
    for later in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    shutil.rmtree(run / "generator")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a zoo, in which the runs of one plain process are trained when they are needed."""
    folder = tmp_path_factory.mktemp("launch")
    make_zoo(folder / "zoo")
    return folder


def trained(config: Config) -> Path:
    """The run of one plain process."""
    if not Path(config.run).exists():
        train(config)
    return Path(config.run)


SLOW = {way: pytest.mark.slow for way in WAYS if way != "ddp"}


@pytest.mark.parametrize("way", [pytest.param(way, marks=SLOW.get(way, ())) for way in WAYS])
def test_every_way_trains_saves_and_resumes_as_one_process_does(reference, way):
    if way.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    environment, spread = WAYS[way]
    kinds = {"one": demanding_config}
    if way != "ddp":  # where every process has all weights, nothing depends on what the layers are
        kinds |= {"normalised": normalised_config, "mamba2": mamba2_config}
    ones = {name: trained(make(reference, name)) for name, make in kinds.items()}
    steep = demanding_config(reference, f"{way}-steep")
    poisoned, step = poisoned_config(reference, f"{way}-poisoned")
    whole = {name: make(reference, f"{way}-{name}") for name, make in kinds.items()}
    resumed = {name: make(reference, f"{way}-{name}-resumed") for name, make in kinds.items() if name != "normalised"}
    for name, config in resumed.items():
        shutil.copytree(ones[name], config.run)
        keep_first_save(Path(config.run))
    marks = dict.fromkeys(whole.values(), "") | dict.fromkeys(resumed.values(), "+") | {poisoned: "", steep: "!"}
    for config in marks:
        config.save(f"{config.run}.yaml")
    runs = [f"{mark}{config.run}.yaml" for config, mark in marks.items()]
    said = launch(way, LAUNCHED, *runs, environment=environment)
    assert said.count(spread) == len(runs)
    for error in (f"step {step}, layer '3.bias' has a loss that is not finite", "a gradient of step 1 is not finite"):
        assert said.count(f"error: {error}") == 2  # each process says it
    for name, config in (*whole.items(), *resumed.items()):
        assert_close(config.run, ones[name])
    for name in resumed:
        keep_first_save(Path(whole[name].run))  # and back to one process
        train(whole[name], resume=True)
        assert_close(whole[name].run, ones[name])


@pytest.mark.slow
def test_the_launched_command_is_the_same_code(tmp_path, zoo):
    config = small_config(tmp_path, run=str(tmp_path / "launched"))
    config.save(tmp_path / "config.yaml")
    launch("cpu", "-m", "rpg", "train", str(tmp_path / "config.yaml"), "--set", "train.steps=7")
    here = small_config(tmp_path, run=str(tmp_path / "here"), train={"steps": 7})
    train(here)
    assert losses(config.run) == losses(here.run)
    launched, local = (load_file(Path(run) / "generator" / "model.safetensors") for run in (config.run, here.run))
    assert all(launched[name].equal(local[name]) for name in local)
