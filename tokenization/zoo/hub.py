"""Folders and zoos on the Hugging Face hub: pulled through its cache, published in one commit, without local paths."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.files import atomic_folder
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.zoo.manifest import Description, ZooEntry, read_manifest, require_new_folder

Kind = Literal["model", "dataset"]


def pull(repo: str, kind: Kind, patterns: Sequence[str], **options: Any) -> Path:
    """Fetch the files ``patterns`` of a repository into the hub's cache, or find them there where it cannot be reached.

    Args:
        repo: its id, ``name/repository``.
        options: ``revision`` (branch, tag or commit), ``cache_dir``, ``token``, ``local_files_only`` and
            ``force_download``, as `huggingface_hub.snapshot_download` takes them.

    Raises:
        InputError: there is no such repository or revision, or neither the hub nor the cache can give it.
    """
    from huggingface_hub import snapshot_download

    with _explained(repo, kind, options.get("revision"), options.get("local_files_only", False)):
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(patterns), **options))


def publish(
    files: Mapping[str, Path | bytes],
    repo: str,
    kind: Kind,
    patterns: Sequence[str],
    *,
    private: bool | None = None,
    branch: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Make the files the contents of a repository, in a single commit: an upload that breaks off publishes nothing.

    The commit is made here and not by ``upload_folder``, which may spread a folder over several.

    Args:
        files: what to publish, by path in the repository.
        repo: its id, ``name/repository``; made if it is not there, as ``branch`` is.
        patterns: what else is of an earlier version; it is deleted in the same commit.
        private: whether a new repository is private; as the account has it when None.
        token: what ``hf auth login`` or HF_TOKEN left when None.

    Raises:
        InputError: a file holds a path of this machine or a token, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    for name, content in files.items():
        _refuse_secrets(name, content, [token, get_token()])
    with _explained(repo, kind, branch, upload=True):
        api = HfApi(token=token)
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repo, branch=branch, repo_type=kind, exist_ok=True)
        there = api.list_repo_files(repo, repo_type=kind, revision=branch)
        old = [name for name in there if name not in files and any(fnmatch(name, each) for each in patterns)]
        operations: list[Any] = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in old),
        ]
        said = message or f"Upload a {kind} with rpg"
        return api.create_commit(repo, operations, commit_message=said, repo_type=kind, revision=branch).commit_url


def is_local_path(text: object) -> bool:
    """Whether a text is a path that means something on this machine alone: absolute, of a home, or through a parent."""
    if not isinstance(text, str) or "\n" in text:
        return False
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return absolute or text.startswith("~") or ".." in PurePosixPath(text).parts


def without_local_paths(tree: Any) -> Any:
    """Plain values with every local path cut to its last name."""
    if isinstance(tree, Mapping):
        return {key: without_local_paths(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_local_paths(value) for value in tree]
    return re.split(r"[/\\]", str(tree).rstrip("/\\"))[-1] if is_local_path(tree) else tree


def _refuse_secrets(name: str, content: Path | bytes, tokens: Sequence[str | None]) -> None:
    """Look through a text, or the header of a safetensors file. Raises InputError if it tells of this machine."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            size = int.from_bytes(file.read(8), "little") if content.suffix == ".safetensors" else -1
            content = file.read(min(size, 100_000_000))
    home = str(Path.home()).encode()
    if len(home) > 1 and re.search(rb"(?<![\w.-])" + re.escape(home) + rb"(?![\w.-])", content):
        raise InputError(f"{name} names your home folder, {home.decode()}, and would be public; take that out first")
    if any(token and token.encode() in content for token in tokens):
        raise InputError(f"{name} holds your access token and would be public; take that out first")


@contextlib.contextmanager
def _explained(
    repo: str, kind: Kind, revision: str | None, local_files_only: bool = False, *, upload: bool = False
) -> Iterator[None]:
    """Turn what the hub's client raises into an InputError, and keep its notes of every try to itself."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    def because(error: Exception) -> str:
        status = getattr(getattr(error, "response", None), "status_code", None)
        where = re.sub(r"^https?://", "", constants.ENDPOINT)
        if constants.HF_HUB_OFFLINE and (upload or isinstance(error, FileNotFoundError)):
            return f"HF_HUB_OFFLINE is set{'' if upload else ' and it is not in the cache'}; unset it to reach {where}"
        if local_files_only and isinstance(error, FileNotFoundError):
            return "it is not in the cache; leave out local_files_only to fetch it"
        if status == 401 and (upload or not isinstance(error, errors.RepositoryNotFoundError)):
            return f"{where} asks who you are; log in with `hf auth login`, or set HF_TOKEN"
        if status == 403:
            return f"{where} does not let you{' write there' if upload else ''}; use a token that may, or ask its owner"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"there is no revision {revision}; name a branch, a tag or a commit"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"{where} has no such {kind}, or it is private; check the id, or log in with `hf auth login`"
        if isinstance(error, errors.HFValidationError):
            return "it is not an id of a repository; write name/repository"
        if status is not None:
            return f"{where} answered {status} ({str(error).strip().splitlines()[-1]}); try again later"
        root: BaseException = error  # of a broken connection, several deep
        while root.__cause__ is not None or root.__context__ is not None:
            root = root.__cause__ or root.__context__  # type: ignore[assignment]
        reason = " ".join(str(root).split()) or type(root).__name__
        if upload:
            return f"the upload to {where} broke off ({reason}) and nothing was published; repeat it to go on"
        return f"{where} could not be reached ({reason}) and it is not in the cache; check the network and HF_ENDPOINT"

    level, hide = logging.get_verbosity(), not (are_progress_bars_disabled() or sys.stderr.isatty())
    logging.set_verbosity_error()
    if hide:  # its bars are for people
        disable_progress_bars()
    try:
        yield
    except (InputError, TypeError):
        raise
    except Exception as error:  # the client has a class for every mishap, other ones in every version
        if isinstance(error, OSError) and error.filename:  # of this machine's disk
            raise
        raise InputError(f"{kind} {repo}: {because(error)}") from error
    finally:
        logging.set_verbosity(level)
        if hide:
            enable_progress_bars()


FETCHED = ("*.json", "*.jsonl", "README.md", "*.safetensors")
REPLACED = ("checkpoints/*", "base.safetensors", CONFIG_NAME)
"""What of a repository a zoo consists of, and what of it an earlier version may have left."""


def fetch_zoo(repo: str, path: Path | None, **options: Any) -> Path:
    """The folder of a zoo that lies on the hub; arguments and errors as of `tokenization.zoo.zoo.Zoo.from_hub`."""
    from huggingface_hub import cached_assets_path

    snapshot = pull(repo, "dataset", FETCHED, **options)
    if not (snapshot / "zoo.json").is_file():
        raise InputError(f"dataset {repo} is not a zoo: it has no zoo.json; make one with `rpg push ZOO {repo}`")
    if any(entry.external for entry in read_manifest(snapshot / "manifest.jsonl")):
        raise InputError(f"dataset {repo}: its manifest.jsonl names files outside the zoo; ask its owner to fix it")
    target = path or Path(cached_assets_path("rpg", f"zoos--{repo}", snapshot.name))
    if path is not None:
        require_new_folder(path)
    elif (target / "zoo.json").is_file():
        return target
    with atomic_folder(target) as temporary:
        for file in (each for each in snapshot.rglob("*") if each.is_file()):
            _place(file.resolve(), temporary / file.relative_to(snapshot))
    return target


def publish_zoo(
    folder: Path, content: Description, checkpoints: Sequence[tuple[ZooEntry, Checkpoint]], repo: str, **options: Any
) -> str:
    """Publish the zoo in a folder; the rest and errors as of `tokenization.zoo.zoo.Zoo.push_to_hub`.

    Args:
        content: of its ``zoo.json``.
        checkpoints: those that its manifest lists.
    """
    files: dict[str, Path | bytes] = {}
    lines = [_published_line(folder, index, *each, files) for index, each in enumerate(checkpoints)]
    runs = without_local_paths(content.runs)
    runs = runs if len(set(runs)) == len(runs) else [f"run {index}" for index in range(len(runs))]
    for name in ("base.safetensors", CONFIG_NAME):
        if (folder / name).is_file():
            files[name] = _content(folder / name)
    shared = dataclasses.replace(content, task=without_local_paths(content.task), runs=runs)
    files["zoo.json"] = shared.to_text().encode()
    files["manifest.jsonl"] = "".join(lines).encode()
    files["README.md"] = _card(repo, content, [entry for entry, _ in checkpoints]).encode()
    return publish(files, repo, "dataset", REPLACED, **options)


def _published_line(
    folder: Path, index: int, entry: ZooEntry, checkpoint: Checkpoint, files: dict[str, Path | bytes]
) -> str:
    """Add the files of an entry, and give its line in the published manifest."""
    path, parts = folder / entry.file, set(checkpoint.sizes)
    if path.is_dir():
        parts |= {*path.glob("*.index.json"), *path.glob(CONFIG_NAME)}
    else:
        parts.add(path)  # of a sharded one the index
    names = {part: Path(os.path.relpath(part, folder)) for part in (path, *parts)}
    if entry.external:
        adopted = Path("checkpoints") / f"adopted-{index:06}"
        names = {part: adopted / part.name for part in names}
        if path.is_dir():
            names[path] = adopted
        elif len(parts) == 1:
            names[path] = adopted.with_suffix(path.suffix)
    files |= {names[part].as_posix(): _content(part) for part in parts}
    return dataclasses.replace(entry, file=names[path].as_posix(), source="", external=False).to_line()


def _card(repo: str, content: Description, entries: Sequence[ZooEntry]) -> str:
    from huggingface_hub import DatasetCardData

    assert content.structure is not None
    tensors, condition = content.structure.tensors, content.condition
    values = sum(math.prod(shape) for _, shape in tensors.values())
    rows = {
        "checkpoints": len(entries),
        "training runs": len({entry.run for entry in entries}),
        "values of a checkpoint": f"{values:,} in {len(tensors)} tensors",
        "condition": f"{condition.kind}, {condition.size}" if condition else "none",
        "splits": ", ".join(f"{name} {count}" for name, count in Counter(each.split for each in entries).items()),
    }
    for name in {key: None for entry in entries for key in entry.metrics}:
        found = [entry.metrics[name] for entry in entries if name in entry.metrics]
        rows[f"mean {name}"] = f"{sum(found) / len(found):.4g}"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    data = DatasetCardData(pretty_name=repo.partition("/")[2], tags=["rpg", "model-zoo", "neural-network-weights"])
    return f"""---
{data.to_yaml()}
---
# A zoo of trained networks

Checkpoints of one structure, for learning to generate such weights.

| | |
| --- | --- |
{table}

```python
from rpg import Zoo

zoo = Zoo.from_hub("{repo}")
state_dict = zoo.state_dict(0)
```

Every checkpoint is a safetensors file that any loader takes; `manifest.jsonl` has its run, step, condition and scores.
"""


def _content(path: Path) -> Path | bytes:
    """A file to publish: as it is, or if it is PEFT's configuration, without the paths of this machine."""
    if path.name != CONFIG_NAME:
        return path
    return (json.dumps(without_local_paths(json.loads(path.read_text(encoding="utf-8"))), indent=2) + "\n").encode()


def _place(source: Path, target: Path) -> None:
    """Put a file of the hub's cache into a zoo: weights, which nobody changes, as a link where the disk can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one without links
            pass
    shutil.copyfile(source, target)
