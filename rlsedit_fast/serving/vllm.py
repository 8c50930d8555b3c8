"""Loads adapters and weights into a running vLLM server."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlsedit_fast.errors import InputError, ServerError
from rlsedit_fast.export.engines import VLLM_RANKS
from rlsedit_fast.models.fingerprint import settings
from rlsedit_fast.serving.http import Refused, Server, read_config, served_path

logger = logging.getLogger(__name__)

_DEV_MODE = "start the server with VLLM_SERVER_DEV_MODE=1 in its environment, on a network that you trust"
_TRIES = 20
_PAUSE = 0.25  # seconds between tries to reset the prefix cache

CHECKPOINT = ("config.json", "*.safetensors")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class VLLM(Server):
    """A running vLLM server (`vllm serve`).

    Adapters need `--enable-lora --max-lora-rank R` and, to be loaded while the server runs,
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment. Reloading weights needs VLLM_SERVER_DEV_MODE=1. Both give
    every client of the server these rights.

    Args:
        url: address of the server.
        api_key: key of the server (its `--api-key`), if it has one.
        timeout: seconds to wait for an answer.

    Raises:
        InputError: `url` is not the address of a server, or `timeout` is not above 0.

    Example:
        >>> from rlsedit_fast.serving import VLLM
        >>> VLLM("http://localhost:8000/v1").url
        'http://localhost:8000'
    """

    name = "vLLM"

    def __init__(
        self, url: str = "http://localhost:8000", *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        super().__init__(url, api_key=api_key, timeout=timeout)

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Loads a LoRA adapter, which is then served beside the base model under `name`.

        Args:
            name: name of the adapter; clients pass it as `model`.
            path: folder that `save_adapter(..., engine="vllm")` wrote, or its absolute path on the machine of the
                server.
            replace: replace the adapter of this name. Cached prefixes of the previous adapter are dropped.

        Raises:
            InputError: the folder is not an adapter, or has a rank that vLLM does not take.
            ServerError: the server cannot be reached, was started without support for adapters or for one of this rank,
                serves a model of this name already, or cannot drop the cached prefixes of a replaced adapter.
        """
        if not name:
            raise InputError("the name of the adapter is empty; pass the name under which clients request it")
        where, local = served_path(path, "an adapter", ADAPTER)
        if local:
            rank = read_config(where, ADAPTER[0]).get("r")
            if not isinstance(rank, int) or not 1 <= rank <= VLLM_RANKS[-1]:
                raise InputError(
                    f"{str(path)!r} has rank {rank}, and vLLM takes at most {VLLM_RANKS[-1]}",
                    hint="write the adapter with --for vllm (Python: save_adapter(..., engine='vllm'))",
                )
        served = self.models()
        if name in served and not replace:
            raise InputError(
                f"{self.url} serves {name!r} already ({served[name] or 'unknown path'})",
                hint="choose another name, or replace it with --overwrite (Python: replace=True)",
            )
        if served.get(name) == where and not self._reset_prefix_cache():
            raise ServerError(
                f"{name!r} was loaded from the same path {where}, and the server would answer from prefixes that it "
                "cached with the previous weights; nothing was loaded",
                hint=f"write the new adapter to another folder, or {_DEV_MODE}",
            )
        body = {"lora_name": name, "lora_path": where} | ({"load_inplace": True} if replace else {})
        try:
            self.request("POST", "/v1/load_lora_adapter", body)
        except Refused as error:
            raise _explained(error) from error
        if replace:
            self._reset_prefix_cache()

    def unload_adapter(self, name: str) -> None:
        """Unloads a LoRA adapter.

        Args:
            name: name of the adapter.

        Raises:
            ServerError: the server cannot be reached, has no adapter of this name, or does not unload adapters while it
                runs.
        """
        try:
            self.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as error:
            raise _explained(error) from error

    def reload_weights(self, path: str | Path) -> None:
        """Replaces the weights of the served model in place, without a restart.

        Running requests are finished first. New requests wait until the weights are loaded. The prefix cache is
        dropped.

        Args:
            path: checkpoint of the same architecture, or its absolute path on the machine of the server.

        Raises:
            InputError: the folder is not a checkpoint, or its config differs from that of the served model.
            ServerError: the server cannot be reached, was started without VLLM_SERVER_DEV_MODE=1, or failed to load the
                weights.
        """
        where, local = served_path(path, "a checkpoint", CHECKPOINT)
        served = self.models()
        if local:
            for root in served.values():
                check_same_architecture(where, root)
        if len(served) > 1:
            others = ", ".join(list(served)[1:])
            logger.warning("the adapters of the server (%s) are applied to the new weights from now on", others)
        with self._paused():
            try:
                self.request("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": where}})
            except Refused as error:
                if error.status == 404:
                    raise ServerError(f"{self.url} does not reload weights", hint=_DEV_MODE) from error
                raise ServerError(
                    f"{error.message}; the server may have incomplete weights",
                    hint="reload a complete checkpoint of the same architecture, or restart the server",
                ) from error
            if not self._reset_prefix_cache():
                raise ServerError(
                    "the weights are loaded, but the prefix cache was not reset: the server may answer from prefixes "
                    "that it cached with the previous weights",
                    hint="reload once more when no requests are running",
                )

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Finishes the running requests and holds new ones back, if the server can."""
        try:
            self.request("POST", "/pause?mode=wait")
        except Refused as error:
            if error.status != 404:  # versions before 0.13 have no such request
                raise
            yield
            return
        try:
            yield
        finally:
            with suppress(ServerError):
                self.request("POST", "/resume")

    def _reset_prefix_cache(self) -> bool:
        """Drops the prefix cache; returns False if the server cannot, or requests keep it in use."""
        for _ in range(_TRIES):
            try:
                answer = self.request("POST", "/reset_prefix_cache")
            except Refused as error:
                if error.status == 404:
                    return False
                raise
            if not isinstance(answer, dict) or answer.get("success", True):
                return True
            time.sleep(_PAUSE)
        return False

    def _selected(self, model: str | None) -> dict[str, str]:
        return {"model": model or next(iter(self.models()))}


def check_same_architecture(checkpoint: str, served: str) -> None:
    """Raises InputError if two folders on this machine have configs of different models; others are not compared."""
    if not served or not Path(served, CHECKPOINT[0]).is_file():
        return
    before, after = (settings(read_config(folder, CHECKPOINT[0])) for folder in (served, checkpoint))
    for found in (before, after):
        for name in ("dtype", "torch_dtype"):
            found.pop(name, None)
    if other := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise InputError(
            f"the config of {checkpoint!r} differs from that of the served model {served!r} in {', '.join(other)}; "
            "nothing was loaded",
            hint="pass an edited checkpoint of the served model, or start a new server",
        )


def _explained(error: Refused) -> ServerError:
    """Adds what to do to an error of a request for adapters."""
    if "max_lora_rank" in error.message:
        return ServerError(
            error.message,
            hint="start the server with --max-lora-rank of at least this rank (values: "
            f"{', '.join(map(str, VLLM_RANKS))}), or reload the edited checkpoint instead",
        )
    if error.status == 404 and "adapter" not in error.message.lower().partition("answered")[2]:
        return ServerError(
            error.message,
            hint="start the server with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment",
        )
    if "lora is not enabled" in error.message.lower():
        return ServerError(error.message, hint="start the server with --enable-lora --max-lora-rank R")
    return error
