"""What people say of a sensor: a grammar with synonyms, one phrase for each setting. Some wordings are never taught.

Scale and shifts are told in five grades; the angle in degrees, or in words where it is near a quarter turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenization.zoo.condition import Setting

Wordings = tuple[tuple[str, ...], tuple[str, ...]]
"""Those that are taught, and those that are held out."""

GRADES = 5
NEAR = 7.5
"""Degrees from a quarter turn that are told as one."""
OMITTED = 0.5
"""Chance that what is as it should be is not mentioned."""

SLIGHT: Wordings = (("a little", "slightly", "a bit", "a tad", "just a little", "faintly"), ("somewhat", "a touch"))
STRONG: Wordings = (
    ("much", "far", "a lot", "very much", "strongly", "a great deal", "way", "heavily"), ("considerably", "greatly"),
)  # fmt: skip
LEFT: Wordings = (("counterclockwise", "anticlockwise", "to the left"), ("leftwards", "anti-clockwise"))
RIGHT: Wordings = (("clockwise", "to the right", "in clockwise direction"), ("rightwards", "clockwise round"))


def _graded(low: Wordings, usual: Wordings, high: Wordings) -> tuple[Wordings, ...]:
    """Wordings of five grades: strongly low, slightly low, as it should be, slightly high, strongly high."""

    def told(wordings: Wordings, degree: str) -> Wordings:
        taught, held_out = (tuple(each.replace("DEGREE", degree) for each in part) for part in wordings)
        return taught, held_out

    return told(low, "{strong}"), told(low, "{slight}"), usual, told(high, "{slight}"), told(high, "{strong}")


GRADED: dict[str, tuple[Wordings, ...]] = {
    "scale": _graded(
        (("DEGREE too far away", "DEGREE too distant", "everything DEGREE too small", "zoomed out DEGREE",
          "the digits are DEGREE too tiny", "DEGREE smaller than it should be", "too far by DEGREE"),
         ("DEGREE too remote", "things look DEGREE too small", "DEGREE zoomed out")),
        (("at the right distance", "true to size", "neither too close nor too far"), ("at the proper distance",)),
        (("DEGREE too close", "DEGREE too near", "everything DEGREE too large", "zoomed in DEGREE",
          "the digits are DEGREE too big", "DEGREE larger than it should be", "too close by DEGREE"),
         ("DEGREE too close up", "things look DEGREE too large", "DEGREE zoomed in")),
    ),
    "shift_right": _graded(
        (("DEGREE to the left", "shifted DEGREE to the left", "moved DEGREE left", "DEGREE left of the middle",
          "off to the left DEGREE", "DEGREE too far left"), ("pushed DEGREE to the left", "DEGREE left of centre")),
        (("centred", "in the middle", "not shifted"), ("in the centre",)),
        (("DEGREE to the right", "shifted DEGREE to the right", "moved DEGREE right", "DEGREE right of the middle",
          "off to the right DEGREE", "DEGREE too far right"), ("pushed DEGREE to the right", "DEGREE right of centre")),
    ),
    "shift_down": _graded(
        (("DEGREE up", "shifted DEGREE upwards", "moved DEGREE up", "DEGREE too high", "DEGREE above the middle",
          "DEGREE higher than it should be"), ("pushed DEGREE up", "DEGREE above centre")),
        (("at the right height", "neither too high nor too low"), ("at the proper height",)),
        (("DEGREE down", "shifted DEGREE downwards", "moved DEGREE down", "DEGREE too low", "DEGREE below the middle",
          "DEGREE lower than it should be"), ("pushed DEGREE down", "DEGREE below centre")),
    ),
    "inverted": (
        (("light on dark", "white on black", "not inverted", "white digits on black", "light digits on dark ground"),
         ("bright on dark", "light figures on a dark background")),
        (("dark on light", "black on white", "inverted", "black digits on white", "dark digits on light ground",
          "as a negative"), ("dark on bright", "dark figures on a light background")),
    ),
}  # fmt: skip

QUARTERS: tuple[Wordings, ...] = (
    (("upright", "the right way up", "not turned", "straight"), ("fully upright", "not tilted")),
    (("on its left side", "a quarter turn {left}", "turned 90 degrees {left}", "lying on the left side"),
     ("tipped onto its left side", "turned a quarter {left}")),
    (("upside down", "on its head", "turned by 180 degrees", "the wrong way up", "half a turn"),
     ("turned upside down", "head upside down")),
    (("on its right side", "a quarter turn {right}", "turned 90 degrees {right}", "lying on the right side"),
     ("tipped onto its right side", "turned a quarter {right}")),
)  # fmt: skip
"""Of 0, 90, 180 and 270 degrees counter-clockwise."""

TURNED: Wordings = (
    ("turned {number} degrees {side}", "rotated by {number} degrees {side}", "{number} degrees {side}",
     "tilted {number} degrees {side}", "turned {side} by {number} degrees", "{side} by {number} degrees",
     "at an angle of {number} degrees {side}"),
    ("twisted {number} degrees {side}", "rotated {side} by {number} degrees",
     "with a rotation of {number} degrees {side}"),
)  # fmt: skip

BEGINNINGS: Wordings = (
    ("", "", "camera ", "a sensor ", "the camera is ", "sensor: "),
    ("", "the sensor is ", "our camera is "),
)


def describe(settings: Sequence[Setting], values: Tensor, rng: torch.Generator, held_out: bool = False) -> list[str]:
    """Sensors ``[T, C]`` in words, phrases in any order.

    Of ``held_out`` ones every phrase has a template that nobody taught, or words that nobody taught.
    """
    return [_description(settings, row, rng, held_out) for row in values.tolist()]


def _description(settings: Sequence[Setting], row: Sequence[float], rng: torch.Generator, held_out: bool) -> str:
    draws = iter(torch.rand(10 * len(row) + 10, generator=rng).tolist())

    def pick(wordings: Wordings, new: bool = held_out) -> str:
        among = wordings[new]
        return among[int(next(draws) * len(among))]

    phrases = []
    for setting, value in zip(settings, row, strict=True):
        wordings, usual = _wordings(setting, value)
        if usual and next(draws) < OMITTED:
            continue
        angle, new = value % 360, held_out
        phrase = pick(wordings)
        if held_out and "{" in wordings[0][0] and next(draws) < 0.5:
            phrase = pick(wordings, False)  # a taught template of new words
        elif held_out:
            new = False  # a new template of taught words
        phrases.append(phrase.format(
            strong=pick(STRONG, new), slight=pick(SLIGHT, new), left=pick(LEFT, new), right=pick(RIGHT, new),
            number=f"{min(angle, -angle % 360):.0f}", side=pick(LEFT if angle <= 180 else RIGHT, new),
        ))  # fmt: skip
    phrases = phrases or [pick(QUARTERS[0])]
    order = torch.randperm(len(phrases), generator=rng).tolist()
    return pick(BEGINNINGS) + ", ".join(phrases[place] for place in order)


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
