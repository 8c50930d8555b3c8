"""Loads adapters and weights into a running SGLang server. Tested with a stub of the server only."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from multiprocessing.reduction import ForkingPickler  # torch registers its tensors with it
from pathlib import Path
from typing import Any

from torch import Tensor, multiprocessing

from rlsedit_fast.errors import InputError, ServerError
from rlsedit_fast.export.changes import WeightChange, check_distinct, check_no_experts
from rlsedit_fast.serving.http import Server, served_path
from rlsedit_fast.serving.vllm import ADAPTER, CHECKPOINT


class SGLang(Server):
    """A running SGLang server (`python -m sglang.launch_server`).

    Adapters need `--enable-lora` and `--max-lora-rank R`, with any rank. The requests follow the interface of
    SGLang 0.5; they were tested with a stub of the server, not with a real one.

    Args:
        url: address of the server.
        api_key: key of the server (its `--api-key` or `--admin-api-key`), if it has one.
        timeout: seconds to wait for an answer.

    Raises:
        InputError: `url` is not the address of a server, or `timeout` is not above 0.

    Example:
        >>> from rlsedit_fast.serving import SGLang
        >>> SGLang().url
        'http://localhost:30000'
    """

    name = "SGLang"

    def __init__(
        self, url: str = "http://localhost:30000", *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        super().__init__(url, api_key=api_key, timeout=timeout)

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Loads a LoRA adapter, which requests select by `name`.

        Args:
            name: name of the adapter.
            path: folder that `save_adapter` wrote, or its absolute path on the machine of the server.
            replace: unload the adapter of this name first.

        Raises:
            InputError: the folder is not an adapter, or the name is empty.
            ServerError: the server cannot be reached, or refused the adapter.
        """
        if not name:
            raise InputError("the name of the adapter is empty; pass the name under which clients request it")
        where, _ = served_path(path, "an adapter", ADAPTER)
        if replace and name in self.models():
            self.unload_adapter(name)
        self._post("/load_lora_adapter", {"lora_name": name, "lora_path": where})

    def unload_adapter(self, name: str) -> None:
        """Unloads a LoRA adapter.

        Args:
            name: name of the adapter.

        Raises:
            ServerError: the server cannot be reached, or has no adapter of this name.
        """
        self._post("/unload_lora_adapter", {"lora_name": name})

    def reload_weights(self, path: str | Path) -> None:
        """Replaces the weights of the served model by those of another checkpoint, and drops the prefix cache.

        Args:
            path: checkpoint of the same architecture, or its absolute path on the machine of the server.

        Raises:
            InputError: the folder is not a checkpoint.
            ServerError: the server cannot be reached, or failed to load the weights.
        """
        where, _ = served_path(path, "a checkpoint", CHECKPOINT)
        self._post("/update_weights_from_disk", {"model_path": where, "flush_cache": True})

    def update_weights(self, changes: Sequence[WeightChange], *, ranks: int = 1) -> None:
        """Replaces only the edited weights, from the memory of this process; the server must run on the same machine.

        Args:
            changes: weight changes of an editor (`editor.changes()`); the stored weights are sent.
            ranks: number of tensor-parallel ranks of the server (its `--tp`).

        Raises:
            InputError: there are no changes, a module occurs twice, a change is that of a routed expert, or `ranks` is
                below 1.
            ServerError: the server cannot be reached, or failed to load the weights.
        """
        if not changes:
            raise InputError("there are no changes to send; edit the model first")
        if ranks < 1:
            raise InputError(f"ranks={ranks!r}: expected an integer of at least 1")
        check_distinct(changes)
        check_no_experts(changes, "an update of a server")
        tensors = [
            (f"{change.name}.weight", (change.stored.T if change.transposed else change.stored).contiguous())
            for change in changes
        ]
        body = {"serialized_named_tensors": [serialized(tensors)] * ranks, "flush_cache": True}
        self._post("/update_weights_from_tensor", body)

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        answer = self.request("POST", path, body)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(f"{self.url}{path}: {answer.get('message') or answer.get('error_message') or answer}")

    def _selected(self, model: str | None) -> dict[str, str]:
        served = self.models()
        base = next(iter(served))
        return {"model": base} | ({"lora_path": model} if model is not None and model != base else {})


def serialized(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """Returns named tensors in the form of SGLang's `MultiprocessingSerializer`: pickled handles, in base64.

    CPU tensors are shared by file name, so that a process that is not a child of this one can open them.
    """
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = BytesIO()
        ForkingPickler(buffer).dump(list(tensors))
    finally:
        multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode()
