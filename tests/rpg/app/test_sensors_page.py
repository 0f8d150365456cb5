"""The page of sensors: knobs, words, pictures and draws; once in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from rpg.app.controls import condition_controls, knob_values
from rpg.app.loaded import LoadedRun, PageRequest
from rpg.app.panels import condition_for, look, settings_of
from rpg.app.serve import served
from tests.processes import free_port
from tests.rpg.app.test_browser import (
    CHROMIUM,
    DRIVER,
    Page,
    nothing_else_is_asked_for_and_nothing_complained_of,
)
from tests.rpg.app.test_browser import nothing_sticks_out as fits
from tokenization.errors import InputError

TURNED, UPRIGHT = [137.0, 1.1, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def shipped() -> LoadedRun:
    return LoadedRun("sensors")


def test_a_network_for_the_sensor_stays_level_where_the_fixed_one_falls_off(shipped: LoadedRun) -> None:
    assert shipped.missing == [] and shipped.zoo is None
    for values, fixed in ((UPRIGHT, 0.9), (TURNED, 0.0)):
        made_for_it, same = look(shipped, values, None).accuracies.values()
        assert made_for_it > 0.9 and same >= fixed
    assert same < 0.5
    panel = look(shipped, UPRIGHT, None)
    assert panel.num == 1 and panel.answers.eq(torch.arange(10)).sum() >= 8
    assert panel.pictures.min() >= 0 and panel.pictures.max() > 0.9 and panel.pictures.shape == (10, 1, 8, 8)


def test_draws_are_a_fan_of_votes(example_runs: Path, tmp_path: Path) -> None:
    run = LoadedRun(example_runs / "draws")
    condition = condition_for(run, TURNED, num=3)
    assert condition.shape == (3, 64 + 10 + 1) and not condition[:, 64:74].any()  # no class is told
    assert torch.equal(condition[:1], condition_for(run, TURNED, num=1))  # what closes the fan are the further pictures
    made = run.make(PageRequest(num=5, condition=condition), tmp_path)
    assert made.wanted == "3 examples" and "what was learned" in made.distance
    panel = look(run, TURNED, made)
    assert panel.votes.sum(1).tolist() == [5] * 10 and list(panel.accuracies) == ["5 networks together"]
    assert torch.equal(panel.answers >= 0, torch.ones(10, dtype=torch.bool))


def test_pictures_of_ones_own_are_the_condition(example_runs: Path, tmp_path: Path) -> None:
    run = LoadedRun(example_runs / "draws")
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    read = condition_controls(run).read
    own = read(1, [str(tmp_path / "white.png")], *UPRIGHT)["condition"]
    assert own.shape == (1, 75) and own[0, :64].eq(1).all()
    assert read(4, None, *UPRIGHT)["condition"].shape == (4, 75)


def test_an_empty_knob_is_one_line(shipped: LoadedRun) -> None:
    assert knob_values(shipped, [137, 1.1, 0, 0, False]) == TURNED
    with pytest.raises(InputError, match=r"setting scale is nan; give 0.8 to 1.2"):
        knob_values(shipped, [137, None, 0, 0, False])
    assert settings_of(shipped)[0].name == "angle"


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or its driver is not installed")
def test_somebody_turns_the_knobs(shipped: LoadedRun, tmp_path: Path) -> None:
    with served(shipped, port=free_port()) as address:
        page = Page(address, tmp_path)
        try:
            page.until("#sensor h2", "What the sensor sees")
            before = page.find("#sensor img").get_attribute("src")
            page.write("#knob-angle input[type=number]", 137)
            page.wait.until(lambda _: page.find("#sensor img").get_attribute("src") != before)
            expected = look(shipped, [137.0, *UPRIGHT[1:]], None).accuracies
            for share in expected.values():
                page.until("#sensor .bars", f"{100 * share:.1f}")
            page.find("#generate").click()
            assert "1 network for angle 137" in page.until("#result h2", "network for")
            assert "expected error" in page.find("#result").text
            nothing_else_is_asked_for_and_nothing_complained_of(page, address)
            fits(page)
        finally:
            page.driver.quit()


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or its driver is not installed")
def test_somebody_says_in_words_what_the_sensor_is(words_run: Path, tmp_path: Path) -> None:
    said = "on its head, dark on light, a little too close"
    run = LoadedRun(words_run)
    with served(run, port=free_port()) as address:
        page = Page(address, tmp_path)
        try:
            page.until("#sensor h2", "What the sensor sees")
            box = page.find("#condition textarea, #condition input")
            box.clear()
            box.send_keys(said)
            page.find("#generate").click()
            assert f"1 network for {said}" in page.until("#result h2", "network for").replace("\xa0", " ")
            assert "from what was learned" in page.find("#result").text
            made = look(run, [180.0, 1.08, *UPRIGHT[2:]], run.make(PageRequest(num=1, condition=said), tmp_path))
            page.until("#sensor .bars", f"{100 * made.accuracies['made for it']:.1f}")
            box.clear()
            box.send_keys(", ,")
            page.find("#generate").click()
            assert "has 0 phrases between commas; give 1 to 8" in page.until(".mistake", "phrases")
            assert said in page.find("#result h2").text
            nothing_else_is_asked_for_and_nothing_complained_of(page, address)
            fits(page)
        finally:
            page.driver.quit()
