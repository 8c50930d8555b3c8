"""Loads weights into a `vllm.LLM` object of a Python program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsedit_fast.errors import ServerError
from rlsedit_fast.export.patch import WeightPatch, read_patch
from rlsedit_fast.serving.http import served_path
from rlsedit_fast.serving.vllm import CHECKPOINT, check_same_architecture


def reload_llm(llm: Any, path: str | Path) -> None:
    """Replaces the weights of a `vllm.LLM` in place and drops its prefix cache.

    Args:
        llm: the `vllm.LLM`, which generates nothing at present.
        path: checkpoint of the same architecture.

    Raises:
        InputError: the folder is not a checkpoint, or its config differs from that of the served model.
        ServerError: the prefix cache could not be dropped.

    Example:
        >>> from rlsedit_fast.serving import reload_llm
        >>> reload_llm(llm, "edited")  # doctest: +SKIP
    """
    where, local = served_path(path, "a checkpoint", CHECKPOINT)
    if local:
        check_same_architecture(where, str(llm.llm_engine.model_config.model))
    llm.collective_rpc("reload_weights", kwargs={"weights_path": where})
    _reset(llm)


def patch_llm(llm: Any, path: str | Path) -> None:
    """Writes the changed entries of a patch file into the weights of a `vllm.LLM` and drops its prefix cache.

    The weights are then those of the edited model if they were those of the base model. vLLM 0.32 or newer; it must
    run in the process of the caller (VLLM_ENABLE_V1_MULTIPROCESSING=0), or accept functions from it
    (VLLM_ALLOW_INSECURE_SERIALIZATION=1).

    Args:
        llm: the `vllm.LLM`, which generates nothing at present.
        path: file that `write_patch` wrote.

    Raises:
        InputError: the file is missing, damaged or not a patch file.
        ServerError: this version of vLLM does not apply patches, or the prefix cache could not be dropped.

    Example:
        >>> from rlsedit_fast.serving import patch_llm
        >>> patch_llm(llm, "patch.safetensors")  # doctest: +SKIP
    """
    patches = read_patch(path)
    try:
        llm.collective_rpc(_apply, args=(patches,))
    except ImportError as error:
        raise ServerError(
            f"this version of vLLM does not apply sparse patches ({error})",
            hint="install vLLM 0.32 or newer, or use reload_llm with a checkpoint",
        ) from error
    _reset(llm)


def _apply(worker: Any, patches: Sequence[WeightPatch]) -> None:
    """Applies patches to the model of a vLLM worker."""
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    load_checkpoint_weight_patches(
        worker.get_model(),
        [
            CheckpointWeightPatch(patch.name, patch.full_shape, patch.values.dtype, patch.values, patch.indices)
            for patch in patches
        ],
    )


def _reset(llm: Any) -> None:
    if llm.reset_prefix_cache() is False:
        raise ServerError(
            "the weights are replaced, but the prefix cache was not reset, because requests are running",
            hint="call llm.reset_prefix_cache() when they are finished",
        )
