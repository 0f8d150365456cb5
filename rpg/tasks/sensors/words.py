"""What people say of a sensor: a grammar with synonyms, one phrase for each setting. Some wordings are never taught.

Scale and shifts are told in five grades; the angle in degrees, or in words where it is near a quarter turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenization.zoo.settings import Setting

Wordings = tuple[tuple[str, ...], tuple[str, ...]]
"""Those that are taught, and those that are held out."""

GRADES = 5
NEAR = 7.5
"""Degrees from a quarter turn that are told as one."""
OMITTED = 0.5
"""Chance that what is as it should be is not mentioned."""

GRADED: dict[str, tuple[Wordings, ...]] = {
    "scale": (
        (("much too far away", "far too distant", "everything very small", "zoomed out a lot"),
         ("way too far away", "much too distant", "everything tiny")),
        (("a little too far away", "slightly too distant", "a bit too far", "everything a little small"),
         ("somewhat too far away", "a touch too distant", "slightly zoomed out")),
        (("at the right distance", "true to size", "neither too close nor too far"), ("at the proper distance",)),
        (("a little too close", "slightly too near", "a bit too close", "everything a little large"),
         ("somewhat too close", "a touch too near", "slightly zoomed in")),
        (("much too close", "far too near", "everything very large", "zoomed in a lot"),
         ("way too close", "much too near", "everything huge")),
    ),
    "shift_right": (
        (("far to the left", "shifted a lot to the left", "moved far left"), ("pushed well to the left", "way left")),
        (("a little to the left", "shifted slightly left", "a bit left of the middle"),
         ("somewhat to the left", "moved a touch left")),
        (("centred", "in the middle"), ("right in the centre",)),
        (("a little to the right", "shifted slightly right", "a bit right of the middle"),
         ("somewhat to the right", "moved a touch right")),
        (("far to the right", "shifted a lot to the right", "moved far right"),
         ("pushed well to the right", "way right")),
    ),
    "shift_down": (
        (("far up", "shifted a lot upwards", "much too high"), ("pushed well up", "way too high")),
        (("a little up", "shifted slightly upwards", "a bit too high"), ("somewhat too high", "moved a touch up")),
        (("at the right height", "neither too high nor too low"), ("at the proper height",)),
        (("a little down", "shifted slightly downwards", "a bit too low"), ("somewhat too low", "moved a touch down")),
        (("far down", "shifted a lot downwards", "much too low"), ("pushed well down", "way too low")),
    ),
    "inverted": (
        (("light on dark", "white on black", "not inverted"), ("bright on dark", "light digits on a dark ground")),
        (("dark on light", "black on white", "inverted"), ("dark on bright", "dark digits on a light ground")),
    ),
}  # fmt: skip

QUARTERS: tuple[Wordings, ...] = (
    (("upright", "the right way up", "not turned"), ("straight up", "level")),
    (("on its left side", "a quarter turn to the left", "turned 90 degrees to the left"), ("lying on the left side",)),
    (("upside down", "on its head", "turned by 180 degrees"), ("the wrong way up", "turned upside down")),
    (("on its right side", "a quarter turn to the right", "turned 90 degrees to the right"),
     ("lying on the right side",)),
)  # fmt: skip
"""Of 0, 90, 180 and 270 degrees counter-clockwise."""

TURNED: Wordings = (
    ("turned {} degrees {}", "rotated by {} degrees {}", "{} degrees {}", "tilted {} degrees {}"),
    ("twisted {} degrees {}", "turned {} by {} degrees", "with a rotation of {} degrees {}"),
)
LEFT: Wordings = (("counterclockwise", "anticlockwise", "to the left"), ("to the left", "counterclockwise"))
RIGHT: Wordings = (("clockwise", "to the right"), ("to the right", "clockwise"))

BEGINNINGS: Wordings = (("", "", "camera ", "a sensor "), ("", "mounted ", "our camera: "))


def describe(settings: Sequence[Setting], values: Tensor, rng: torch.Generator, held_out: bool = False) -> list[str]:
    """Sensors ``[T, C]`` in words, phrases in any order; ``held_out`` chooses among wordings that nobody taught."""
    return [_description(settings, row, rng, held_out) for row in values.tolist()]


def _description(settings: Sequence[Setting], row: Sequence[float], rng: torch.Generator, held_out: bool) -> str:
    def pick(wordings: Wordings) -> str:
        among = wordings[held_out]
        return among[int(torch.randint(len(among), (), generator=rng))]

    phrases = []
    for setting, value in zip(settings, row, strict=True):
        wordings, usual = _wordings(setting, value)
        if usual and float(torch.rand((), generator=rng)) < OMITTED:
            continue
        phrase = pick(wordings)
        if "{}" in phrase:
            left = value % 360 <= 180
            told = [f"{min(value % 360, -value % 360):.0f}", pick(LEFT if left else RIGHT)]
            phrase = phrase.format(*(told[::-1] if phrase.startswith("turned {} by") else told))
        phrases.append(phrase)
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
