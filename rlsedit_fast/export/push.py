"""Uploads an edited checkpoint, an adapter or GGUF files to the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsedit_fast._version import __version__
from rlsedit_fast.errors import InputError, listed
from rlsedit_fast.export.card import CARD

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_IGNORED = (".git/**", ".cache/**", "**/.cache/**", "*.tmp", ".*.tmp", "**/.DS_Store", "**/__pycache__/**")
"""Files of a folder that are not uploaded."""

_LOGIN = (
    "create a token with write access at https://huggingface.co/settings/tokens, and run `hf auth login`, set "
    "HF_TOKEN, or pass --token (Python: token=...)"
)


@dataclass(frozen=True)
class Pushed:
    """A folder that was uploaded.

    Attributes:
        repo_id: the repository, with its owner.
        url: its address.
        revision: branch that the files are on.
        commit: hash of the commit; None if the repository had the same files.
        private: whether the repository is private.
        created: whether it was created.
        files: names of the files.
        bytes: their size.

    Example:
        >>> from rlsedit_fast.export.push import Pushed
        >>> done = Pushed("me/model", "https://huggingface.co/me/model", "main", "01", True, True, ("README.md",), 10)
        >>> done.private
        True
    """

    repo_id: str
    url: str
    revision: str
    commit: str | None
    private: bool
    created: bool
    files: tuple[str, ...]
    bytes: int


def check_repo_id(repo_id: str) -> None:
    """Raises InputError unless a name is one of a repository on the Hub, such as `me/model`."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"repository {repo_id!r} is not a valid name: {error}", hint="pass OWNER/NAME") from error


def check_folder(folder: str | Path) -> list[str]:
    """Returns the names of the files of a folder that `push_folder` uploads.

    Raises:
        InputError: the folder does not exist, or contains no checkpoint, adapter or GGUF file.
    """
    from huggingface_hub.utils import filter_repo_objects

    place = Path(folder)
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise InputError(f"{str(folder)!r} {what}; pass the folder of a checkpoint or an adapter")
    present = {path.name for path in place.iterdir()}
    if (place / "journal.db").exists():
        raise InputError(
            f"{str(folder)!r} is a store, which contains the history of its edits; upload the edited model",
            hint="pass the folder with --store, or write a checkpoint with `rlsedit export`",
        )
    weights = any(any(place.glob(pattern)) for pattern in _WEIGHTS)
    described = {"config.json", "adapter_config.json"} & present or any(place.glob("*.gguf"))
    if not weights or not described:
        raise InputError(
            f"{str(folder)!r} contains no checkpoint: expected config.json or adapter_config.json with weights "
            f"(*.safetensors), or a GGUF file, and found {', '.join(listed(sorted(present), 5)) or 'nothing'}; pass a "
            "folder that --out or --adapter wrote"
        )
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    return list(filter_repo_objects(names, ignore_patterns=list(_IGNORED)))


def check_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Any:
    """Checks, without a change, whether `push_folder` can upload to a repository; see there for arguments and errors.

    Returns:
        What huggingface_hub knows of the repository, or None if it does not exist.
    """
    check_repo_id(repo_id)
    api = _api(token)
    with _errors_named(api, repo_id):
        known = _existing(api, repo_id)
        if known is not None:
            _check_existing(api, known, revision or "main", private=private, overwrite=overwrite)
    return known


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi, get_token

    held = token.strip() if token is not None else get_token()
    if not held:
        raise InputError("there is no access token for the Hugging Face Hub", hint=_LOGIN)
    return HfApi(token=held, library_name="rlsedit-fast", library_version=__version__)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    card: str | None = None,
) -> Pushed:
    """Uploads a folder to a repository of models on the Hub, in one commit; the repository is created if necessary.

    Args:
        folder: folder of a checkpoint, an adapter, or GGUF files.
        repo_id: `OWNER/NAME`, or a name of the user that the token belongs to.
        private: visibility of a new repository: private by default. False also allows uploads to a public one.
        token: access token; by default that of `HF_TOKEN` or `hf auth login`.
        revision: branch, created if it does not exist; by default `main`.
        message: message of the commit.
        overwrite: replace weights that the branch contains.
        card: text of a model card, if the folder has no README.md.

    Returns:
        What was uploaded, and where.

    Raises:
        InputError: the folder is not one of a model, the name is invalid, there is no token or it has no write access,
            the Hub cannot be reached or refuses the upload, the repository is public and `private` is not False, or it
            contains weights and `overwrite` is False.

    Example:
        >>> from rlsedit_fast.errors import InputError
        >>> from rlsedit_fast.export.push import push_folder
        >>> try:
        ...     push_folder("missing", "me/model")
        ... except InputError as error:
        ...     print(error)
        'missing' does not exist; pass the folder of a checkpoint or an adapter
    """
    from huggingface_hub import CommitOperationAdd

    names = check_folder(folder)
    place, branch = Path(folder), revision or "main"
    known = check_repository(repo_id, private=private, token=token, revision=revision, overwrite=overwrite)
    api = _api(token)
    created = known is None
    with _errors_named(api, repo_id):
        if known is None:
            known = api.model_info(api.create_repo(repo_id, private=private is not False, exist_ok=True).repo_id)
        if branch != "main":
            api.create_branch(known.id, branch=branch, exist_ok=True)
        operations = [CommitOperationAdd(name, place / name) for name in names]
        if CARD not in names and card is not None:
            operations.append(CommitOperationAdd(CARD, card.encode()))
            names = sorted([*names, CARD])
        done: Any = api.create_commit(
            known.id,
            operations,
            commit_message=message or f"Upload with rlsedit-fast {__version__}",
            revision=branch,
        )
    size = sum((place / name).stat().st_size for name in names if (place / name).exists())
    url = f"{api.endpoint}/{known.id}"
    return Pushed(known.id, url, branch, done.oid, bool(known.private), created, tuple(names), size)


def _existing(api: Any, repo_id: str) -> Any:
    """Returns the repository, or None if there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    try:
        return api.model_info(name)
    except RepositoryNotFoundError as error:
        # The Hub also answers 401 for repositories that do not exist, and for invalid tokens.
        if error.response.status_code == 401:
            api.whoami()
        return None


def _check_existing(api: Any, known: Any, branch: str, *, private: bool | None, overwrite: bool) -> None:
    from huggingface_hub.errors import RevisionNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    if not known.private and private is not False:
        raise InputError(
            f"the repository {known.id!r} exists and is public; nothing was uploaded",
            hint="pass --public to upload to it (Python: private=False), or choose another name",
        )
    try:
        names = api.list_repo_files(known.id, revision=branch)
    except RevisionNotFoundError:
        return
    weights = list(filter_repo_objects(names, allow_patterns=list(_WEIGHTS)))
    if weights and not overwrite:
        raise InputError(
            f"the repository {known.id!r} exists and its branch {branch!r} contains {', '.join(listed(weights, 3))}; "
            "nothing was uploaded",
            hint="pass --overwrite to add a commit that replaces them (Python: overwrite=True), --revision with a new "
            "branch, or another name",
        )


@contextmanager
def _errors_named(api: Any, repo_id: str) -> Iterator[None]:
    """Turns errors of huggingface_hub and of the connection into InputError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except InputError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = getattr(error, "server_message", None) or " ".join(str(error).split())
        if status == 401:
            raise InputError(f"the Hub does not accept the access token: {reason}", hint=_LOGIN) from error
        if status == 403:
            raise InputError(
                f"the access token may not write to {repo_id!r}: {reason}",
                hint="use a token with write access to the repositories of this owner, or another name, OWNER/NAME",
            ) from error
        raise InputError(f"the Hub refuses the upload to {repo_id!r} ({status}): {reason}") from error
    except OfflineModeIsEnabled as error:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be uploaded", hint="unset HF_HUB_OFFLINE") from error
    except Exception as error:
        # The HTTP library differs between versions of huggingface_hub.
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _HTTP:
            raise
        raise InputError(
            f"the Hub ({api.endpoint}) cannot be reached: {' '.join(str(error).split()) or type(error).__name__}",
            hint=f"check the network connection{' and HF_ENDPOINT' if 'HF_ENDPOINT' in os.environ else ''}, and repeat "
            "the command",
        ) from error


_HTTP = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
