"""JSON requests to an inference server, and the requests that all servers answer alike."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from rlsedit_fast.errors import InputError, ServerError

_SHOWN = 500
"""Characters shown of the answer of a server to a failed request."""


@dataclass(frozen=True)
class Completion:
    """Continuation of a prompt.

    Attributes:
        text: the generated text.
        tokens: its tokens, as text.
        logprobs: log probability of each token.

    Example:
        >>> from rlsedit_fast.serving import Completion
        >>> Completion(" Lyon", (" Lyon",), (-0.1,)).text
        ' Lyon'
    """

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


class Refused(ServerError):
    """The server answered with an error status.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.status = status


class Server(ABC):
    """An inference server with an OpenAI-compatible API.

    Attributes:
        url: address of the server without a path.
        timeout: seconds to wait for an answer; loading large weights takes long.
    """

    name: str
    """Name of the program, for messages."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"url={url!r}: expected the address of a server, such as 'http://localhost:8000'")
        if not timeout > 0:
            raise InputError(f"timeout={timeout!r}: expected a number of seconds above 0")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> dict[str, str]:
        """Returns the served models: name, and path of the checkpoint or adapter (empty if unknown).

        Raises:
            ServerError: the server cannot be reached, or refused the request.
        """
        answer = self.request("GET", "/v1/models")
        try:
            return {str(card["id"]): str(card.get("root") or "") for card in answer["data"]}
        except (TypeError, KeyError) as error:
            raise ServerError(
                f"{self.url}/v1/models answered {_short(answer)}; expected a list of models",
                hint=f"pass the address of a {self.name} server",
            ) from error

    def complete(self, prompts: Sequence[str], *, model: str | None = None, max_tokens: int = 16) -> list[Completion]:
        """Continues prompts greedily, with `/v1/completions`.

        Args:
            prompts: prompts, at least one.
            model: name of a served model or adapter; by default the first one, the base model.
            max_tokens: maximum number of tokens of each continuation.

        Returns:
            One continuation per prompt, in order.

        Raises:
            InputError: there are no prompts, or `max_tokens` is below 1.
            ServerError: the server cannot be reached, or refused the request.
        """
        if not prompts or isinstance(prompts, str):
            raise InputError(f"prompts={prompts!r}: expected a list of at least one prompt")
        if max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens!r}: expected an integer of at least 1")
        body = {"prompt": list(prompts), "max_tokens": max_tokens, "temperature": 0.0, "logprobs": 1}
        answer = self.request("POST", "/v1/completions", body | self._selected(model))
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [_completion(choice) for choice in choices]
        except (TypeError, KeyError) as error:
            raise ServerError(f"{self.url}/v1/completions answered {_short(answer)}; expected choices") from error
        if len(found) != len(prompts):
            raise ServerError(f"{self.url}/v1/completions answered {len(found)} of {len(prompts)} prompts")
        return found

    @abstractmethod
    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Loads a LoRA adapter, which is then served beside the base model under `name`."""

    @abstractmethod
    def unload_adapter(self, name: str) -> None:
        """Unloads a LoRA adapter."""

    @abstractmethod
    def reload_weights(self, path: str | Path) -> None:
        """Replaces the weights of the served model by those of another checkpoint."""

    @abstractmethod
    def _selected(self, model: str | None) -> dict[str, str]:
        """Returns the fields of a request that select a model or an adapter."""

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Sends a request and returns the answer.

        Args:
            method: GET or POST.
            path: path with query, such as "/v1/models".
            body: fields of the request, JSON-serializable.

        Returns:
            The decoded JSON; text if the answer is not JSON; None if it is empty.

        Raises:
            ServerError: the server cannot be reached, or answered with an error status.
        """
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(
                Request(f"{self.url}{path}", data, self._headers, method=method), timeout=self.timeout
            ) as answer:
                text = answer.read().decode(errors="replace")
        except HTTPError as error:
            said = _reason(error.read().decode(errors="replace"))
            hint = None
            if error.code in (401, 403):
                hint = "pass the key of the server with --api-key (Python: api_key=...)"
            raise Refused(f"{self.url}{path} answered {error.code}: {said}", error.code, hint) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(
                f"{self.url}{path}: no answer ({reason})",
                hint=f"start {self.name}, wait until it serves requests, or pass its address with --url (Python: url)",
            ) from error
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text


def served_path(path: str | Path, what: str, files: Sequence[str]) -> tuple[str, bool]:
    """Returns the path that is sent to the server, and whether the files were found and checked here.

    Args:
        path: a folder on this machine, or an absolute path on the machine of the server.
        what: what the folder contains, for messages.
        files: patterns of files of which each must occur in a folder on this machine.

    Raises:
        InputError: the folder lacks a file, or the path is relative and does not exist.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if folder.is_absolute():
            return str(folder), False
        raise InputError(
            f"{str(path)!r} does not exist; pass the folder of {what}, or its absolute path on the machine of the "
            "server"
        )
    if missing := [pattern for pattern in files if not any(folder.glob(pattern))]:
        raise InputError(f"{str(path)!r} does not contain {' or '.join(missing)}; pass the folder of {what}")
    return str(folder.resolve()), True


def read_config(path: str | Path, name: str) -> dict[str, Any]:
    """Returns a JSON object of a folder.

    Raises:
        InputError: the file cannot be read, or is not a JSON object.
    """
    from rlsedit_fast.files import read_json

    found = read_json(Path(path) / name, "a JSON object")
    if not isinstance(found, dict):
        raise InputError(f"{Path(path) / name}: expected a JSON object; write the folder again")
    return found


def _completion(choice: Mapping[str, Any]) -> Completion:
    measured = choice.get("logprobs") or {}
    return Completion(
        str(choice["text"]), tuple(measured.get("tokens") or ()), tuple(measured.get("token_logprobs") or ())
    )


def _reason(text: str) -> str:
    """Returns the message of an error answer."""
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            inner = found.get("error", found)
            for key in ("message", "error_message", "detail"):
                if isinstance(inner, dict) and isinstance(inner.get(key), str) and inner[key]:
                    return _short(inner[key])
    except ValueError:
        pass
    return _short(text)


def _short(answer: object) -> str:
    text = " ".join(str(answer).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
