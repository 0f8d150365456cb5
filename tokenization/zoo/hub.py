"""Folders on the Hugging Face hub: pulled through its cache, published whole or not at all, without local paths."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from tokenization.errors import InputError

Kind = Literal["model", "dataset"]


def pull(
    repo: str,
    kind: Kind,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Fetch a repository into the hub's cache, or find it there where the hub cannot be reached.

    Args:
        repo: its id, ``name/repository``.
        kind: of repository.
        patterns: the files to fetch.
        revision: a branch, tag or commit; the main branch when None.
        cache_dir: the cache; the hub's own when None.
        token: for a private repository; what ``hf auth login`` or HF_TOKEN left when None.
        local_files_only: look into the cache alone.
        force_download: fetch what the cache has, too.

    Raises:
        InputError: there is no such repository or revision, or neither the hub nor the cache can give it.
    """
    from huggingface_hub import snapshot_download

    with _explained(repo, kind, revision, local_files_only):
        folder = snapshot_download(
            repo, repo_type=kind, allow_patterns=list(patterns), revision=revision, cache_dir=cache_dir, token=token,
            local_files_only=local_files_only, force_download=force_download,
        )  # fmt: skip
        return Path(folder)


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
        repo: its id, ``name/repository``; made if it is not there.
        kind: of repository.
        patterns: what else is of an earlier version; it is deleted in the same commit.
        private: whether a new repository is private; as the account has it when None.
        branch: made if it is not there; the main one when None.
        token: what ``hf auth login`` or HF_TOKEN left when None.
        message: of the commit.

    Returns:
        The address of the commit.

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
        message = message or f"Upload a {kind} with rpg"
        made = api.create_commit(repo, operations, commit_message=message, repo_type=kind, revision=branch)
        return str(made.commit_url)


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
            return "it is no id of a repository; write name/repository"
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
    except InputError:
        raise
    except Exception as error:  # the client has a class for every mishap, other ones in every version
        if isinstance(error, OSError) and error.filename:  # of this machine's disk
            raise
        raise InputError(f"{kind} {repo}: {because(error)}") from error
    finally:
        logging.set_verbosity(level)
        if hide:
            enable_progress_bars()
