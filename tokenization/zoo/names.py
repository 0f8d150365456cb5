"""Which training run a checkpoint is of, and after which step it was saved, as common file names tell it.

``run0_step220``, ``seed1/epoch_03``, ``checkpoint-500`` (transformers), ``epoch=3-step=100`` (Lightning),
``resnet18_s2_e10``: a word that names a step and a number after it. What remains of the path is the run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenization.checkpoint.formats import SUFFIXES

STEP_WORDS = (
    "global[_-]?steps?|steps?|iterations?|iters?|it|updates?",
    "epochs?|ep|e",
    "checkpoints?|ckpts?|chkpts?|snapshots?",
    "s",  # a seed, unless the run is named and nothing else is a step
)
"""Kinds of words before a step's number; the first kind that is there counts, and epochs go with steps."""

RUN_WORDS = "runs?|seeds?|trials?|replicas?|reps?|versions?|folds?|members?|experiments?|exps?|s|r"

_START, _GAP, _END = r"(?<![A-Za-z0-9.])", r"[ _=-]{0,2}", r"(?![A-Za-z0-9]|\.\d)"
_SCORE = re.compile(
    rf"{_START}(?:(?:validation|valid|val|test|train|eval|best)[_-]?)?"
    rf"(?:accuracy|acc|loss|error|err|score|top[15]|f1|auc|mse|ppl|psnr|bleu){_GAP}\d+(?:\.\d+)?{_END}",
    re.IGNORECASE,
)
_SAYS_NOTHING = re.compile(
    rf"{_START}(?:best|last|latest|final|models?|checkpoints?|ckpts?|weights|state[_-]?dict|network|net|params)"
    r"(?![A-Za-z0-9])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Recognised:
    """What the names of some checkpoints tell.

    Attributes:
        rows: ``run`` and ``step``, as far as each name tells them, in the order of the checkpoints; empty where
            nothing was recognised.
        notice: one line about it for the user; empty where there is nothing to say.
    """

    rows: tuple[dict[str, str], ...] = ()
    notice: str = ""


def recognise(paths: Sequence[Path]) -> Recognised:
    """Runs and steps of checkpoints, from all their names together.

    A number without a word before it is not guessed at, and where two checkpoints would have the same run and step, the
    names are not understood. A name without a step beside others that have one is step 0 of its run (``best``), or the
    step after all others (``last``, ``final``, and a folder whose own folders are the others).
    """
    if not paths:
        return Recognised()
    common = Path(os.path.commonpath([path.parent for path in paths]))
    texts, versions = _versions([_plain(path.relative_to(common)) for path in paths])
    kind = next((kind for kind in STEP_WORDS if any(_find(kind, text) for text in texts)), None)
    if kind == "s" and not any(_find("runs?|r", text) for text in texts):
        kind = None
    ranks = [_rank(path, text, paths) for path, text in zip(paths, texts, strict=True)]
    by_rank = kind is None and None not in ranks
    rests = [_rest(text, "" if by_rank else kind) for text in texts]
    runs = [run + version for run, version in zip(_run_names(rests, common), versions, strict=True)]
    if by_rank and len(set(runs)) == len(runs):  # a best or a last one of each run: names as they are
        by_rank, runs = False, _run_names(texts, common)
    if kind is None and not by_rank:
        return _without_steps(paths, texts, runs)
    steps = [_find(kind, text)[-1][1] if kind and _find(kind, text) else None for text in texts]
    after = dict.fromkeys(runs, 0)
    for run, step in zip(runs, steps, strict=True):
        after[run] = max(after[run], int(step or 0))
    late = [step is None and bool(rank) for step, rank in zip(steps, ranks, strict=True)]
    steps = [
        str(after[run] + (rank or 0)) if is_late else step
        for run, step, rank, is_late in zip(runs, steps, ranks, late, strict=True)
    ]
    told = [(run, int(step)) for run, step in zip(runs, steps, strict=True) if step is not None]
    if len(set(told)) < len(told):
        return Recognised(notice=f"the names tell one step of a run twice, so they are not used; {_cure(texts)}")
    shown = next(place for place, step in enumerate(steps) if step is not None)
    notice = (
        f"{_count(runs)} found in the names, e.g. run {runs[shown]}, step {int(steps[shown] or 0)} from "
        f"{_short(paths[shown])}"
    )
    if any(late):
        notice += (
            f"; {sum(late)} last or final, e.g. {_short(paths[late.index(True)])}, taken as a step after the others"
        )
    if None in steps:
        notice += f"; {steps.count(None)} without a step, e.g. {_short(paths[steps.index(None)])}, taken as step 0"
    rows = ({"run": run} | ({} if step is None else {"step": step}) for run, step in zip(runs, steps, strict=True))
    return Recognised(tuple(rows), notice)


def _without_steps(paths: Sequence[Path], texts: Sequence[str], runs: Sequence[str]) -> Recognised:
    """Names with runs alone, or with numbers that may count anything."""
    if all(_find(RUN_WORDS, text) for text in texts) and len(set(runs)) == len(runs) and runs[0].isdigit():
        notice = f"{_count(runs)} found in the names, e.g. run {runs[0]} from {_short(paths[0])}"
        return Recognised(tuple({"run": run} for run in runs), notice)
    if len(texts) > 1 and all(re.search(r"\d$", text) for text in texts):
        number = f"numbers as in {_short(paths[0])} may count runs or steps"
        return Recognised(notice=f"{number}: every checkpoint is a run of its own; if they are steps, {_cure(texts)}")
    return Recognised()


def _versions(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names without Lightning's ``-v1``, by which a later run keeps off an earlier one's file; and these suffixes."""
    found = [re.search(r"-v\d+$", text) for text in texts]
    versions = [
        match[0] if match and text[: match.start()] in texts else "" for match, text in zip(found, texts, strict=True)
    ]
    return [text.removesuffix(version) for text, version in zip(texts, versions, strict=True)], versions


def _rank(path: Path, text: str, paths: Sequence[Path]) -> int | None:
    """Where a name without a step stands in its run: 0 for the best, 1 for the last, 2 for the final one."""
    name = text.rpartition("/")[2]
    words = [match[0].lower() for match in _SAYS_NOTHING.finditer(name)]
    if "final" in words or any(path in other.parents for other in paths):
        return 2
    if "best" in words:
        return 0
    plain = not _SAYS_NOTHING.sub("", name).strip("_=-. ")
    return 1 if "last" in words or "latest" in words or plain else None


def _plain(path: Path) -> str:
    """The path without the suffixes of checkpoints."""
    text = path.as_posix()
    while ending := next((each for each in (".index.json", ".safetensors", *SUFFIXES) if text.endswith(each)), ""):
        text = text.removesuffix(ending)  # .pth.tar has two
    return text


def _find(words: str, text: str) -> list[re.Match[str]]:
    return list(re.finditer(rf"{_START}(?:{words}){_GAP}(\d+){_END}", text, re.IGNORECASE))


def _rest(text: str, kind: str | None) -> str:
    """What remains of a path without step, scores and words that tell no run; all of it if ``kind`` is None."""
    if kind is None:
        return text
    for words in STEP_WORDS[: max(2, STEP_WORDS.index(kind) + 1)] if kind else ():
        for match in _find(words, text)[-1:]:  # that of the file rather than of a folder
            text = f"{text[: match.start()]} {text[match.end() :]}"
    folder, _, name = _SCORE.sub(" ", text).rpartition("/")
    parts = (*folder.split("/"), _SAYS_NOTHING.sub(" ", name))
    plain = (re.sub(r"[_=-]*\s+[_=-]*", "_", part).strip("_=-") for part in parts)
    return "/".join(part for part in plain if part)


def _run_names(rests: Sequence[str], common: Path) -> list[str]:
    """The run's number where that alone tells runs apart, else all that remains of the path."""
    numbers = {}
    for rest in dict.fromkeys(rests):
        found = _find(RUN_WORDS, rest)
        numbers[rest] = str(int(found[-1][1])) if found else None
    if None not in numbers.values() and len(set(numbers.values())) == len(numbers):
        return [str(numbers[rest]) for rest in rests]
    names = ((common / rest).as_posix() for rest in rests)
    return ["0" if name == "." else name for name in names]


def _count(runs: Sequence[str]) -> str:
    num = len(set(runs))
    return f"{num} {'run' if num == 1 else 'runs'}"


def _short(path: Path) -> str:
    return "/".join(path.parts[-2:]) if len(path.name) < 24 else path.name


def _cure(texts: Sequence[str]) -> str:
    """How the last number of the first name would be said to be a step."""
    name = texts[0].rsplit("/", 1)[-1]
    numbers = list(re.finditer(r"\d+", name))[-2:]
    pattern = "(?P<run>[^/]*[^/0-9])(?P<step>[0-9]+)"
    if len(numbers) == 2:
        pattern = f"(?P<run>[0-9]+){re.escape(name[numbers[0].end() : numbers[1].start()])}(?P<step>[0-9]+)"
    return f"say so with --pattern '{pattern}' or a --table"
