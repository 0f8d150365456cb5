"""What people say of a sensor: a grammar with synonyms, one phrase for each setting. Some wordings are never taught:
choices are made by some of these, and others are kept for the test.

Scale and shifts are told in five grades; the angle in degrees, or in words where it is near a quarter turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenization.zoo.condition import Setting

Wordings = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
"""Those that are taught, those to choose by, and those of the test."""

PLACES = {"train": 0, "validation": 1, "test": 2}

NEAR = 7.5
"""Degrees from a quarter turn that are told as one."""
OMITTED = 0.5
"""Chance that what is as it should be is not mentioned."""

SLIGHT: Wordings = (
    ("a little", "slightly", "a bit", "a tad", "just a little", "faintly"),
    ("somewhat", "a touch"),
    ("marginally", "ever so slightly"),
)
STRONG: Wordings = (
    ("much", "far", "a lot", "very much", "strongly", "a great deal", "way", "heavily"), ("considerably", "greatly"),
    ("substantially", "quite a lot"),
)  # fmt: skip
LEFT: Wordings = (
    ("counterclockwise", "anticlockwise", "to the left"), ("leftwards", "anti-clockwise"),
    ("towards the left", "counter-clockwise"),
)  # fmt: skip
RIGHT: Wordings = (
    ("clockwise", "to the right", "in clockwise direction"), ("rightwards", "clockwise round"),
    ("towards the right", "in a clockwise sense"),
)  # fmt: skip


def _graded(low: Wordings, usual: Wordings, high: Wordings) -> tuple[Wordings, ...]:
    """Wordings of five grades: strongly low, slightly low, as it should be, slightly high, strongly high."""

    def told(wordings: Wordings, degree: str) -> Wordings:
        taught, validation, test = (tuple(each.replace("DEGREE", degree) for each in part) for part in wordings)
        return taught, validation, test

    return told(low, "{strong}"), told(low, "{slight}"), usual, told(high, "{slight}"), told(high, "{strong}")


GRADED: dict[str, tuple[Wordings, ...]] = {
    "scale": _graded(
        (("DEGREE too far away", "DEGREE too distant", "everything DEGREE too small", "zoomed out DEGREE",
          "the digits are DEGREE too tiny", "DEGREE smaller than it should be", "too far by DEGREE"),
         ("DEGREE too remote", "things look DEGREE too small", "DEGREE zoomed out"),
         ("DEGREE too far off", "it all looks DEGREE too small", "shown DEGREE too small")),
        (("at the right distance", "true to size", "neither too close nor too far"), ("at the proper distance",),
         ("at the correct distance",)),
        (("DEGREE too close", "DEGREE too near", "everything DEGREE too large", "zoomed in DEGREE",
          "the digits are DEGREE too big", "DEGREE larger than it should be", "too close by DEGREE"),
         ("DEGREE too close up", "things look DEGREE too large", "DEGREE zoomed in"),
         ("DEGREE nearer than it should be", "it all looks DEGREE too big", "shown DEGREE too large")),
    ),
    "shift_right": _graded(
        (("DEGREE to the left", "shifted DEGREE to the left", "moved DEGREE left", "DEGREE left of the middle",
          "off to the left DEGREE", "DEGREE too far left"), ("pushed DEGREE to the left", "DEGREE left of centre"),
         ("slid DEGREE to the left", "DEGREE off centre to the left")),
        (("centred", "in the middle", "not shifted"), ("in the centre",), ("exactly centred",)),
        (("DEGREE to the right", "shifted DEGREE to the right", "moved DEGREE right", "DEGREE right of the middle",
          "off to the right DEGREE", "DEGREE too far right"), ("pushed DEGREE to the right", "DEGREE right of centre"),
         ("slid DEGREE to the right", "DEGREE off centre to the right")),
    ),
    "shift_down": _graded(
        (("DEGREE up", "shifted DEGREE upwards", "moved DEGREE up", "DEGREE too high", "DEGREE above the middle",
          "DEGREE higher than it should be"), ("pushed DEGREE up", "DEGREE above centre"),
         ("slid DEGREE upwards", "DEGREE over the middle")),
        (("at the right height", "neither too high nor too low"), ("at the proper height",),
         ("at the usual height",)),
        (("DEGREE down", "shifted DEGREE downwards", "moved DEGREE down", "DEGREE too low", "DEGREE below the middle",
          "DEGREE lower than it should be"), ("pushed DEGREE down", "DEGREE below centre"),
         ("slid DEGREE downwards", "DEGREE under the middle")),
    ),
    "inverted": (
        (("light on dark", "white on black", "not inverted", "white digits on black", "light digits on dark ground"),
         ("bright on dark", "light figures on a dark background"),
         ("pale on dark", "white numbers on a black page")),
        (("dark on light", "black on white", "inverted", "black digits on white", "dark digits on light ground",
          "as a negative"), ("dark on bright", "dark figures on a light background"),
         ("dark on pale", "black numbers on a white page")),
    ),
}  # fmt: skip

QUARTERS: tuple[Wordings, ...] = (
    (("upright", "the right way up", "not turned", "straight"), ("fully upright", "not tilted"),
     ("standing upright", "not rotated")),
    (("on its left side", "a quarter turn {left}", "turned 90 degrees {left}", "lying on the left side"),
     ("tipped onto its left side", "turned a quarter {left}"),
     ("rolled onto its left side", "a quarter of a turn {left}")),
    (("upside down", "on its head", "turned by 180 degrees", "the wrong way up", "half a turn"),
     ("turned upside down", "head upside down"),
     ("bottom side up", "rotated by half a turn")),
    (("on its right side", "a quarter turn {right}", "turned 90 degrees {right}", "lying on the right side"),
     ("tipped onto its right side", "turned a quarter {right}"),
     ("rolled onto its right side", "a quarter of a turn {right}")),
)  # fmt: skip
"""Of 0, 90, 180 and 270 degrees counter-clockwise."""

TURNED: Wordings = (
    ("turned {number} degrees {side}", "rotated by {number} degrees {side}", "{number} degrees {side}",
     "tilted {number} degrees {side}", "turned {side} by {number} degrees", "{side} by {number} degrees",
     "at an angle of {number} degrees {side}"),
    ("twisted {number} degrees {side}", "rotated {side} by {number} degrees",
     "with a rotation of {number} degrees {side}"),
    ("swivelled {number} degrees {side}", "turned through {number} degrees {side}",
     "pivoted {side} by {number} degrees"),
)  # fmt: skip

BEGINNINGS: Wordings = (
    ("", "", "camera ", "a sensor ", "the camera is ", "sensor: "),
    ("", "the sensor is ", "our camera is "),
    ("", "this sensor is ", "my camera is "),
)


def describe(settings: Sequence[Setting], values: Tensor, rng: torch.Generator, split: str = "train") -> list[str]:
    """Sensors ``[T, C]`` in words, phrases in any order.

    Of other splits than ``train`` every phrase has a template that nobody taught, or words that nobody taught.
    """
    return [_description(settings, row, rng, PLACES[split]) for row in values.tolist()]


def _description(settings: Sequence[Setting], row: Sequence[float], rng: torch.Generator, place: int) -> str:
    draws = iter(torch.rand(10 * len(row) + 10, generator=rng).tolist())

    def pick(wordings: Wordings, among: int = place) -> str:
        return wordings[among][int(next(draws) * len(wordings[among]))]

    phrases = []
    for setting, value in zip(settings, row, strict=True):
        wordings, usual = _wordings(setting, value)
        if usual and next(draws) < OMITTED:
            continue
        angle, words = value % 360, place
        phrase = pick(wordings)
        if place and "{" in wordings[0][0] and next(draws) < 0.5:
            phrase = pick(wordings, 0)  # a taught template of new words
        elif place:
            words = 0  # a new template of taught words
        phrases.append(phrase.format(
            strong=pick(STRONG, words), slight=pick(SLIGHT, words), left=pick(LEFT, words), right=pick(RIGHT, words),
            number=f"{min(angle, -angle % 360):.0f}", side=pick(LEFT if angle <= 180 else RIGHT, words),
        ))  # fmt: skip
    phrases = phrases or [pick(QUARTERS[0])]
    order = torch.randperm(len(phrases), generator=rng).tolist()
    return pick(BEGINNINGS) + ", ".join(phrases[each] for each in order)


def _wordings(setting: Setting, value: float) -> tuple[Wordings, bool]:
    """What may be said of a setting's value, and whether that is as it should be."""
    if setting.name == "angle":
        quarter = round(value / 90)
        near = abs(value - 90 * quarter) <= NEAR
        return (QUARTERS[quarter % 4] if near else TURNED), near and quarter % 4 == 0
    grades = GRADED[setting.name]
    share = (value - setting.low) / (setting.high - setting.low)
    usual = (setting.default - setting.low) / (setting.high - setting.low)
    grade, default = (min(int(each * len(grades)), len(grades) - 1) for each in (share, usual))
    return grades[grade], grade == default
