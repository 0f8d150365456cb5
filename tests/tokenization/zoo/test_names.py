from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from tokenization.zoo.importing import collect_from, recognise

NAMES = {
    "run0_step220.pth run0_step240.pth run1_step220.pth": ["0 220", "0 240", "1 220"],
    "seed1/epoch_03.pth seed1/epoch_04.pth seed2/epoch_03.pth": ["1 03", "1 04", "2 03"],
    "out/checkpoint-500 out/checkpoint-1000": ["out 500", "out 1000"],
    "a/checkpoint-500 b/checkpoint-500": ["a 500", "b 500"],
    "v/version_0/epoch=3-step=100.ckpt v/version_1/epoch=4-step=200.ckpt": ["0 100", "1 200"],
    "epoch=3-step=9-val_loss=0.31.ckpt epoch=4-step=12-val_loss=0.2.ckpt": ["0 9", "0 12"],
    "resnet18_s2_e10.pth resnet18_s2_e11.pth resnet18_s3_e10.pth": ["2 10", "2 11", "3 10"],
    "r1_s200.pt r1_s300.pt r2_s200.pt": ["1 200", "1 300", "2 200"],
    "lr0.1_run0_step1.pt lr0.01_run0_step1.pt": ["lr0.1_run0 1", "lr0.01_run0 1"],
    "lr1e-3_ep10.pt lr1e-4_ep10.pt": ["lr1e-3 10", "lr1e-4 10"],
    "run0_step5.pth run0_best.pth": ["0 5", "0"],
    "bs32_global_step7 bs32_global_step8": ["bs32 7", "bs32 8"],
    "exp1/weights/best.pt exp1/weights/last.pt exp2/weights/best.pt exp2/weights/last.pt": ["1", "1 1", "2", "2 1"],
    "a/checkpoint.pth.tar a/model_best.pth.tar b/checkpoint.pth.tar b/model_best.pth.tar": ["a 1", "a", "b 1", "b"],
    "run0_step5.pth run0_last.pth run1_step9.pth run1_final.pth": ["0 5", "0 6", "1 9", "1 11"],
    "v/version_0/epoch=2.ckpt v/version_0/epoch=2-v1.ckpt v/version_0/last.ckpt v/version_0/last-v1.ckpt": [
        "v/version_0 2",
        "v/version_0-v1 2",
        "v/version_0 3",
        "v/version_0-v1 3",
    ],
    "out out/checkpoint-500 out/checkpoint-1000": ["out 1002", "out 500", "out 1000"],
    "s1.pth s2.pth.tar": ["1", "2"],
    "seed0.pth seed1.pth": ["0", "1"],
}


@pytest.mark.parametrize("names", NAMES)
def test_common_names_tell_runs_and_steps(names: str) -> None:
    found = recognise([Path(name) for name in names.split()])
    assert [" ".join(row.values()) for row in found.rows] == NAMES[names]
    assert "found in the names, e.g. run" in found.notice


@pytest.mark.parametrize("names", ["model_0001.pth model_0002.pth", "run0_1.pth run0_2.pth", "0/100.pth 0/200.pth"])
def test_a_number_that_may_count_anything_is_not_guessed_at(names: str) -> None:
    found = recognise([Path(name) for name in names.split()])
    assert not found.rows and "every checkpoint is a run of its own" in found.notice and "--pattern" in found.notice


def test_nothing_is_said_of_names_that_tell_nothing_nor_taken_from_such_as_contradict_themselves() -> None:
    assert recognise([Path("a.pth"), Path("b.pth")]).notice == ""
    twice = recognise([Path("model_step1.pth"), Path("checkpoint_step1.pth")])
    assert not twice.rows and "twice" in twice.notice


def test_a_zoo_of_named_runs(tmp_path: Path) -> None:
    for run in range(2):
        for step in (8, 9, 10):
            file = tmp_path / "mine" / f"run{run}_step{step}.safetensors"
            file.parent.mkdir(exist_ok=True)
            safetensors.torch.save_file({"w": torch.full((2,), float(10 * run + step))}, file)
    said: list[str] = []
    zoo = collect_from(tmp_path / "mine", tmp_path / "zoo", say=said.append)
    assert [(entry.run, entry.step) for entry in zoo.entries] == [(0, 8), (0, 9), (0, 10), (1, 8), (1, 9), (1, 10)]
    assert zoo.runs == ["0", "1"] and said == [
        "2 runs found in the names, e.g. run 0, step 8 from mine/run0_step8.safetensors"
    ]
    assert collect_from(tmp_path / "mine", tmp_path / "off", find_runs=False).num_runs == 6
    table = tmp_path / "mine" / "t.csv"
    table.write_text("file,run\n" + "\n".join(f"run{run}_step8.safetensors,name{run}" for run in range(2)))
    zoo = collect_from(tmp_path / "mine", tmp_path / "table", table=table)
    assert zoo.runs == ["name0", "name1"] and {entry.step for entry in zoo.entries} == {8}
