"""The experiment on lottery tickets, small: it runs as one command, and compares masks as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rpg.config import Config
from rpg.experiments import driver
from rpg.experiments.sweep import row_of
from rpg.labs.tickets import experiment as tickets
from rpg.labs.tickets.experiment import compare, evaluate_tickets, simple_baselines, tickets_task
from rpg.tasks import collecting
from tests.reports import checked_report
from tests.rpg.conftest import Run, refused
from tokenization.errors import InputError

SMALL = (
    "task.family.tasks=24", "task.family.unseen.num=5", "task.family.validation=3", "task.family.group=24",
    "task.family.finetune.stages=[{steps: 25, learning_rate: 0.01}]", "task.rounds=3", "task.kept=0.5",
    "task.sparsity=0.9", "train.steps=3", "model.backbone.d_model=16",
)  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(collecting, "num_cores", lambda: 1)
    changes = (*SMALL, f"run={tmp_path / 'run'}", f"zoo={tmp_path / 'zoo'}")
    return [word for each in changes for word in ("--set", each)]


def test_one_command_leaves_every_kind_of_mask_and_a_picture(rpg: Run, settings: list[str], tmp_path: Path) -> None:
    code, out, err = rpg("run", "configs/tickets.yaml", *settings)
    assert code == 0, err
    assert "masks of 90% zeros" in out and "Generated networks have accuracy" in out
    report = checked_report(tmp_path / "run", "tickets", "tickets")
    assert set(report.kinds) == {
        "original", "generated", "no_condition", "kernel_ridge", "nearest_seen", "average", "random", "shuffled",
        "start_magnitude", "one_shot",
    }  # fmt: skip
    means = {name: report.mean(name) for name in report.kinds}
    assert means["original"] > means["random"] + 0.05 and means["generated"] > means["random"]
    overlaps = {name: report.mean(name, "overlap") for name in report.kinds}
    assert overlaps["original"] == 1 and overlaps["random"] < 0.15
    assert report.facts["seconds_of_one"]["generated"] < report.facts["seconds_of_one"]["original"]
    assert (tmp_path / "run" / "accuracy_by_share_of_zeros.png").stat().st_size > 10_000
    row = row_of("tickets", [], tmp_path / "run")  # of a sweep's table
    assert (row["mean"], row["original_mean"], row["metric"]) == (means["generated"], means["original"], "accuracy")
    before = (tmp_path / "run" / "evaluation.json").read_bytes()
    chosen = evaluate_tickets(tmp_path / "run", split="validation")
    assert chosen.kinds["generated"].count == 3 and (tmp_path / "run" / "evaluation.json").read_bytes() == before


def test_an_interrupted_run_is_not_judged(rpg: Run, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = driver.train_to_the_end

    def interrupted(config: Config, **options: Any) -> Path:
        return real(config, max_seconds=0, **options)

    monkeypatch.setattr(driver, "train_to_the_end", interrupted)
    monkeypatch.setattr(tickets, "evaluate_tickets", lambda *_, **__: pytest.fail("judged half-trained"))
    code, _, err = rpg("run", "configs/tickets.yaml", *settings, "--device", "cpu")
    assert code == 130 and "run it again" in err


def test_kinds_are_compared_task_by_task() -> None:
    scores = {name: torch.rand(3, 20) for name in ("original", "generated", "random")}
    right = {"original": [0.9, 0.8, 0.7], "generated": [0.8, 0.8, 0.8], "random": [0.6, 0.9, 0.5]}
    known = {id(scores[name]): torch.tensor(values) for name, values in right.items()}
    kinds, curve = compare(scores, lambda each, share: known[id(each)] - share, 0.9, torch.zeros(3, 2), seed=0)
    assert kinds["generated"].extras["better_than_random"] == pytest.approx(2 / 3)
    assert kinds["original"].extras["generated_better"] == pytest.approx(1 / 3)
    assert dict(zip(curve.x, curve.lines["generated"], strict=True))[0.98] == pytest.approx(0.8 - 0.98, abs=1e-5)


def test_trivial_scores_follow_the_bits() -> None:
    seen = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    tickets = torch.cat([seen.float(), 1 - seen.float()], 1)  # linear in the bits
    asked = torch.tensor([[1, 0, 1]])
    made = simple_baselines(tickets, seen, asked)
    assert torch.equal(made["average"][0], tickets.mean(0))
    assert torch.equal(made["nearest_seen"][0], tickets[0])
    own = torch.tensor([1.0, 0, 1, 0, 1, 0])
    assert (made["kernel_ridge"][0] - own).norm() < (made["average"][0] - own).norm()


def test_another_task_is_refused(rpg: Run) -> None:
    with pytest.raises(InputError, match="experiment on tickets"):
        tickets_task(Config.load("configs/digits.yaml"))
    refused(rpg("run", "configs/tickets.yaml", "--set", "task.family.copies=2"), "one ticket")
