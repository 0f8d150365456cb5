"""A user's own checkpoints become a zoo: safetensors where they lie, pickles converted once.

Runs and steps are read from common file names: ``run0_step220``, ``seed1/epoch_03``, ``checkpoint-500`` (transformers),
``epoch=3-step=100`` (Lightning), ``resnet18_s2_e10``: a word that names a step and a number after it. The rest
of the path is the run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.pickles import SUFFIXES
from tokenization.checkpoint.safetensors import natural_key
from tokenization.checkpoint.structure import Structure
from tokenization.checkpoint.weights import AS_FOUND, Chosen
from tokenization.errors import InputError
from tokenization.lora.adapter import CollectedAdapters
from tokenization.zoo.condition import ConditionKind, ConditionSpec
from tokenization.zoo.locks import locks
from tokenization.zoo.manifest import ZooEntry, entry_of, require_new_folder, with_digest
from tokenization.zoo.metadata_table import Label, infer_condition, label_of, read_name, read_table, resolve_condition
from tokenization.zoo.reading import Reading, Row, Source, and_more, find_checkpoints, folder_of
from tokenization.zoo.zoo import Zoo

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
    """What names of checkpoints tell: ``run`` and ``step`` of each, and a line about it; either may be empty."""

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
    notice = f"{_count(runs)} found in the names, e.g. run {runs[shown]}, step {int(steps[shown] or 0)} from "
    notice += _short(paths[shown])
    if any(late):
        last = _short(paths[late.index(True)])
        notice += f"; {sum(late)} last or final, e.g. {last}, taken as a step after the others"
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


@locks(lambda source, zoo_path, **_: zoo_path)
def collect_from(
    source: Path | str | Sequence[Path | str],
    zoo_path: Path | str,
    *,
    table: Path | str | None = None,
    pattern: str | None = None,
    condition: ConditionSpec | ConditionKind | None = None,
    base: str | None = None,
    find_runs: bool = True,
    chosen: Chosen = AS_FOUND,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Zoo:
    """Make a zoo of checkpoints that exist, or add those that are not yet in it.

    Everything is read and checked before anything is written. Safetensors with plain names stay where they are, all
    else is converted. A killed collection resumes with the first that is missing.

    Args:
        source: a folder (searched at any depth), a glob, or several of them.
        zoo_path: the zoo; made if it is not there. It may be the source folder itself.
        table: CSV or JSONL with ``file`` (relative to the table or the source's folder), ``run``, ``step``, ``split``,
            ``condition`` (or ``condition.NAME``); other columns are metrics. Its rows choose the checkpoints.
        pattern: regular expression on each path; named groups mean the same as the columns, which go first.
        find_runs: without a pattern, take what a table leaves open from common names; otherwise each is a run.
        condition: what the conditions mean, or their kind; inferred if left out.
        base: of adapters the base of all of them, whatever path each names.
        chosen: which of several sets of weights in a file, and the prefix to cut off names.
        skip_bad: go on past checkpoints that cannot be read or do not belong.
        say: receives a line on all that was told or left out.

    Raises InputError for no checkpoints, a broken one, one of another structure, with NaN, or a bad label.
    """
    zoo_path = Path(zoo_path)
    exists = (zoo_path / "zoo.json").exists()
    zoo = Zoo.open(zoo_path, repair=True) if exists else Zoo(zoo_path)
    kind = wanted.kind if isinstance(wanted := zoo.condition or condition, ConditionSpec) else wanted
    rows = _rows(source, zoo_path, table, pattern, say)
    if not exists:
        require_new_folder(zoo_path, [row.path for row in rows])
    known = {Path(entry.source or zoo.path / entry.file).resolve() for entry in zoo.entries}
    fresh = [row for row in rows if row.path.resolve() not in known]
    adapters = CollectedAdapters(zoo.path if zoo.entries else None, base)
    sources = (reading := Reading(zoo, adapters, chosen, skip_bad, say)).read(fresh)
    rows = [row for row in rows if row not in fresh or any(row is each.row for each in sources)]
    labels = _labels(rows, kind, say if find_runs and pattern is None else None)
    if not exists:
        spec = condition if isinstance(condition, ConditionSpec) else infer_condition(list(labels.values()), condition)
        zoo = Zoo(zoo_path, condition=spec)
    named = table is not None or pattern is not None
    runs, entries = _entries(zoo, reading.without_twins([(each, labels[each.row.path]) for each in sources], named))
    if not entries:
        return zoo
    zoo = _opened(zoo, exists, runs, sources, reading.comparison.structure)
    adapters.finish(zoo.path, say)
    _write(zoo, entries, chosen)
    return zoo


def _entries(zoo: Zoo, kept: Sequence[tuple[Source, Label]]) -> tuple[list[str], list[tuple[Source, dict[str, Any]]]]:
    """The names of all runs, and the sources with the fields of their lines in the manifest."""
    # Weights of unknown origin may be permuted against each other: none share a run unless the user says so.
    names = [label.run if label.run is not None else each.row.path.as_posix() for each, label in kept]
    runs = zoo.runs + [str(run) for run in range(len(zoo.runs), zoo.num_runs)]  # a task's runs have no names
    runs += sorted(set(names) - set(runs), key=natural_key)
    fields = [
        {
            "run": runs.index(name),
            "step": label.step,
            "condition": resolve_condition(label, zoo.condition),
            "metrics": label.metrics,
            "split": label.split,
        }
        for name, (_, label) in zip(names, kept, strict=True)
    ]
    return runs, [(each, its) for (each, _), its in zip(kept, fields, strict=True)]


def _opened(zoo: Zoo, exists: bool, runs: list[str], sources: Sequence[Source], structure: Structure) -> Zoo:
    """The zoo on disk, made if need be, with the runs' names."""
    if not exists:
        what: Any = {"task": zoo.task, "condition": zoo.condition, "runs": runs, "structure": structure}
        return Zoo.create(zoo.path, among=[each.row.path for each in sources], **what)
    if runs != zoo.runs:
        zoo.rename_runs(runs)
    return zoo


def _rows(
    source: Path | str | Sequence[Path | str],
    zoo_path: Path,
    table: Path | str | None,
    pattern: str | None,
    say: Callable[[str], None],
) -> list[Row]:
    """Every checkpoint that the sources stand for or the table names, with what table and pattern say of it."""
    sources = [source] if isinstance(source, str | Path) else list(source)
    rows: list[Row] = []
    if table is None:
        ignored: list[str] = []
        for item in sources:
            rows += [Row(path, str(path), {}) for path in find_checkpoints(item, zoo_path, ignored)]
        if ignored:
            say(f"left out: {ignored[0]}{and_more(ignored)}")
    else:
        folders = [Path(table).parent, *(folder_of(item) for item in sources)]
        for where, told in read_table(Path(table)):
            path = next((folder / told["file"] for folder in folders if (folder / told["file"]).exists()), None)
            if path is None:
                what = f"{where}: file {told['file']!r} does not exist"
                raise InputError(f"{what}; name a checkpoint beside the table or in the source")
            rows.append(Row(path, where, told))
    kept: list[Row] = []
    seen: dict[Path, str] = {}
    for row in rows:
        if row.path.resolve() in seen:
            if table is None:
                continue
            what = f"{row.where}: file {row.known['file']!r} is already in {seen[row.path.resolve()]}"
            raise InputError(f"{what}; drop one of the lines")
        seen[row.path.resolve()] = row.where
        named = read_name(pattern, row.path.as_posix()) if pattern is not None else {}
        kept.append(Row(row.path, row.where, {**named, **row.known}))
    return kept


def _labels(rows: list[Row], kind: ConditionKind | None, say: Callable[[str], None] | None) -> dict[Path, Label]:
    """What is known of every checkpoint; where ``say`` is given, names are asked what the table leaves open."""
    told: Sequence[Mapping[str, Any]] = ()
    if say is not None and not all("run" in row.known and "step" in row.known for row in rows):
        recognised = recognise([row.path for row in rows])
        say(recognised.notice) if recognised.notice else None
        told = recognised.rows
    more = told or [{}] * len(rows)
    return {row.path: label_of({**named, **row.known}, row.where, kind) for row, named in zip(rows, more, strict=True)}


def _write(zoo: Zoo, entries: Sequence[tuple[Source, dict[str, Any]]], chosen: Chosen) -> None:
    adopted: list[ZooEntry] = []
    for source, fields in entries:
        path = source.row.path
        if source.adopted is not None:
            adopted.append(with_digest(_adopted(source.adopted, zoo, fields), source.adopted))
            continue
        zoo.extend(adopted)
        adopted = []
        state_dict = source.state_dict(chosen, zoo.structure if zoo.entries else None)
        zoo.append(state_dict, source=str(path.resolve()), **fields)
    zoo.extend(adopted)


def _adopted(checkpoint: Checkpoint, zoo: Zoo, fields: dict[str, Any]) -> ZooEntry:
    # Not resolved: the hub's cache links readable names to blobs that have none.
    absolute, folder = Path(os.path.abspath(checkpoint.path)), Path(os.path.abspath(zoo.path))
    inside = absolute.is_relative_to(folder) and all(zoo.contains(file) for file in checkpoint.sizes)
    file = absolute.relative_to(folder).as_posix() if inside else str(absolute)
    return entry_of({**fields, "file": file, "external": not inside}, str(checkpoint.path))
