"""A configuration proposed for a zoo is one that trains it, and fits the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rpg.config import Config
from rpg.generation.generator import Generator
from rpg.models.conditioning import ConditionConfig
from rpg.planning import plan
from rpg.planning.proposal import asked, propose, write_config
from rpg.training.loop import train
from tests.conftest import make_zoo
from tests.rpg.conftest import Run
from tests.rpg.generation.test_adapters import adapters_at
from tests.tokenization.lora.test_collected import EXPERTS, save
from tokenization.errors import InputError
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.importing import collect_from
from tokenization.zoo.zoo import Zoo

FEW = {"steps": 2, "batch_size": 2, "splits": ("train",)}


def trained(zoo: Zoo, folder: Path) -> Generator:
    """A generator trained for two steps as proposed."""
    config = propose(zoo, str(folder / "run")).config
    config = config.model_copy(update={"train": config.train.model_copy(update=FEW)})
    return Generator.from_pretrained(train(config, say=lambda _: None))


def test_from_names_to_networks_without_a_line_of_yaml(rpg: Run, tmp_path: Path) -> None:
    source = make_zoo(tmp_path / "source", num=6, num_runs=2)
    (tmp_path / "mine").mkdir()
    for index, entry in enumerate(source.entries):
        torch.save(dict(source.state_dict(index)), tmp_path / "mine" / f"run{entry.run}_step{entry.step + index}.pth")
    zoo, config = tmp_path / "zoo", tmp_path / "mine.yaml"
    code, out, _ = rpg("collect", "--from", f"{tmp_path}/mine/*.pth", "--zoo", zoo)
    assert code == 0 and "2 runs found in the names" in out
    code, out, _ = rpg("inspect", zoo, "--write-config", config)
    assert code == 0 and f"rpg train {config}" in out
    code, _, err = rpg("inspect", zoo, "--write-config", config)
    assert code == 2 and "already exists" in err
    run = f"run={tmp_path / 'run'}"
    assert rpg("train", config, "--set", run, "--set", "train.steps=3")[0] == 0
    assert rpg("generate", tmp_path / "run", "-n", "2", "--output", tmp_path / "new")[0] == 0
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == 2
    assert Config.load(config).model.state.width == 5  # directions in which six checkpoints differ


def test_conditions_are_heeded(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "binary", num=6, num_runs=6, condition_size=3)
    config = propose(zoo).config
    assert config.model.condition.kind == "binary" and config.tokens.centre == "condition"
    assert len(trained(zoo, tmp_path / "binary-run").generate(1, seed=0, condition=torch.tensor([[1.0, 0, 1]]))) == 1
    several = Zoo.create(tmp_path / "class", condition=ConditionSpec("class", 2))
    for index in range(10):
        state = make_zoo(tmp_path / f"one{index}", num=1).state_dict(0)
        several.append({n: v + 0.1 * index for n, v in state.items()}, run=index, step=0, condition=(float(index % 2),))
    config = propose(several).config
    assert config.model.state.prior is not None and config.generate.state == "prior"
    assert len(trained(several, tmp_path / "class-run").generate(1, seed=0, condition=torch.tensor([[1.0]]))) == 1


@pytest.mark.parametrize(("num", "runs", "state"), [(4, 4, "density"), (4, 1, "density"), (6, 2, "density")])
def test_without_conditions_networks_are_new(tmp_path: Path, num: int, runs: int, state: str) -> None:
    """A stored code of a single checkpoint gives that checkpoint; one of a run that has several does not."""
    assert propose(make_zoo(tmp_path / "zoo", num=num, num_runs=runs)).config.generate.state == state


def test_adapters(tmp_path: Path) -> None:
    folder = adapters_at(tmp_path, "llama")
    zoo = collect_from(folder, tmp_path / "zoo")
    generator = trained(zoo, tmp_path)
    assert generator.adapter is not None and set(generator.generate(1, seed=0)[0]) == set(zoo.state_dict(0))


def test_large_networks_have_spectral_tokens_and_fit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = Zoo.create(tmp_path / "zoo")
    for step in range(3):
        torch.manual_seed(step)
        zoo.append({"weight": torch.randn(800, 800)}, run=0, step=step)
    config = propose(zoo).config
    assert config.tokens.rank == "auto" and config.generate.state == "density"
    assert set(trained(zoo, tmp_path).generate(1, seed=0)[0]) == {"weight"}
    need = plan.Need("training", 0, 0, "")
    monkeypatch.setattr(
        "rpg.planning.proposal.training_need",
        lambda config: plan.Need(need.what, config.train.batch_size, 0, "lower train.batch_size"),
    )
    monkeypatch.setattr(plan, "free_memory", lambda: 3)
    proposal = propose(zoo)
    assert proposal.config.train.batch_size == 2 and "train.batch_size 2" in proposal.text()
    monkeypatch.setattr(plan, "free_memory", lambda: 0)
    with pytest.raises(InputError, match="needs"):
        propose(zoo)


def test_what_no_configuration_suits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one checkpoint"):
        propose(make_zoo(tmp_path / "one", num=1, num_runs=1))
    with pytest.raises(InputError, match="is not one"):
        write_config(tmp_path, tmp_path / "c.yaml")


def test_changes_are_kept_in_what_is_proposed(tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    written = write_config(zoo.path, tmp_path / "mine.yaml", ["train.steps=7", "tokens.size=16", "run=runs/other"])
    found = Config.load(tmp_path / "mine.yaml")
    assert (found.train.steps, found.tokens.size, found.run) == (7, 16, "runs/other") == (
        written.config.train.steps, written.config.tokens.size, written.tree["run"],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"train\.stpes"):
        write_config(zoo.path, tmp_path / "other.yaml", ["train.stpes=7"])
    assert not (tmp_path / "other.yaml").exists()


def test_adapters_whose_pairs_are_no_products_are_learned_as_saved(rpg: Run, tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "a" / str(number), number, **EXPERTS)
    zoo = collect_from(tmp_path / "a", tmp_path / "zoo")
    assert propose(zoo).config.tokens.lora_canonical == "none"
    code, _, errors = rpg("inspect", zoo.path, "--verify", "--write-config", tmp_path / "mine.yaml")
    assert code == 0, errors
    assert trained(zoo, tmp_path).layout.canonical is None


def test_the_command_that_an_evaluation_names_runs(rpg: Run, tmp_path: Path) -> None:
    zoo = make_zoo(tmp_path / "binary", num=6, num_runs=6, condition_size=3)
    trained(zoo, tmp_path)
    few = ("--num", "2", "--set", "evaluate.num_baseline=2")
    code, out, err = rpg("evaluate", tmp_path / "run", *few)
    assert code == 0, err
    command = out.splitlines()[-1].partition("next: rpg ")[2].split()
    assert command[:2] == ["generate", f"{tmp_path}/run"] and "--condition" in command
    assert rpg(*command, "--output", tmp_path / "new")[0] == 0 and len(list((tmp_path / "new").iterdir())) == 10


def test_a_generator_is_asked_as_its_condition_wants(tmp_path: Path) -> None:
    scored = make_zoo(tmp_path / "scored", num=3)
    value = scored.entries[0].metrics
    binary = make_zoo(tmp_path / "binary", num=6, num_runs=6, condition_size=3)
    first = ",".join(f"{each:g}" for each in binary.entries[0].condition or ())
    name = next(iter(value), "loss")
    for zoo, condition, words in (
        (scored, ConditionConfig(), ""),
        (scored, ConditionConfig(kind="examples", counts=(1,)), " --examples FOLDER"),
        (scored, ConditionConfig(kind="metric", name=name), f" --metric {name}={value.get(name, 'VALUE')}"),
        (scored, ConditionConfig(kind="metric", name="none"), " --metric none=VALUE"),
        (binary, ConditionConfig(kind="binary"), f" --condition {first}"),
        (tmp_path / "gone", ConditionConfig(kind="binary"), " --condition VALUES"),
        (tmp_path / "gone", ConditionConfig(kind="text"), " --prompt TEXT"),
    ):
        assert asked(zoo, condition) == words
