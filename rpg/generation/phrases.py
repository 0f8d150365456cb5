"""A description as a set of phrases, each of which is encoded by itself: static embeddings know no order of words."""

from __future__ import annotations

import re

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def phrases_of(text: str) -> list[str]:
    """The parts between commas, full stops and the like, ``and``, ``but``, and before ``on``; whole numbers as words.

    The average of a phrase's words would not tell the digits of 137 from those of 173, or light on dark from dark on
    light.
    """
    parts = re.split(r"[,;!]+|\.(?!\d)|\bbut\b|(?<!hundred )\band\b|(?<=\w) (?=on\b)", text.lower())
    return [
        re.sub(r"\b\d{1,3}\b", lambda found: spelled(int(found[0])), part.strip()) for part in parts if part.strip()
    ]


def spelled(number: int) -> str:
    """A whole number from 0 to 999 in words."""
    if number >= 100:
        return f"{ONES[number // 100]} hundred{f' {spelled(number % 100)}' if number % 100 else ''}"
    if number < 20:
        return ONES[number]
    return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")
