"""Loads weights into a `vllm.LLM` object of a Python program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

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
    (VLLM_ALLOW_INSECURE_SERIALIZATION=1). On a CPU, where vLLM keeps packed copies of the weights instead of the
    weights, the checkpoint that was loaded last is loaded again with the changed entries.

    Args:
        llm: the `vllm.LLM`, which generates nothing at present.
        path: file that `write_patch` wrote.

    Raises:
        InputError: the file is missing, damaged or not a patch file.
        ServerError: this version of vLLM does not apply patches, it does not accept functions, the checkpoint does not
            have a weight of the patch, or the prefix cache could not be dropped.

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
    except TypeError as error:
        if "VLLM_ALLOW_INSECURE_SERIALIZATION" not in str(error):
            raise
        raise ServerError(
            "vLLM runs in another process and accepts no functions; nothing was changed",
            hint="set VLLM_ENABLE_V1_MULTIPROCESSING=0 in the environment before vllm is imported, or use reload_llm",
        ) from error
    _reset(llm)


def _apply(worker: Any, patches: Sequence[WeightPatch]) -> None:
    """Applies patches to the model of a vLLM worker."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _reload_patched(worker, patches)
    else:
        _patch_in_place(worker.get_model(), patches)


def _patch_in_place(model: Any, patches: Sequence[WeightPatch]) -> None:
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    load_checkpoint_weight_patches(
        model,
        [
            CheckpointWeightPatch(patch.name, patch.full_shape, patch.values.dtype, patch.values, patch.indices)
            for patch in patches
        ],
    )


def _reload_patched(worker: Any, patches: Sequence[WeightPatch]) -> None:
    """Loads the checkpoint of a worker again, with the changed entries."""
    from vllm.model_executor.model_loader import get_model_loader

    config = worker.vllm_config
    weights = get_model_loader(config.load_config).get_all_weights(config.model_config, worker.get_model())
    worker.reload_weights(weights_iterator=_patched(weights, patches))


def _patched(weights: Iterable[tuple[str, Tensor]], patches: Sequence[WeightPatch]) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of a checkpoint with the changed entries; raises ServerError if a patch does not fit."""
    left = {patch.name: patch for patch in patches}
    for name, given in weights:
        weight = given
        if patch := left.pop(name, None):
            if tuple(weight.shape) != patch.full_shape:
                shapes = f"{list(weight.shape)} in the checkpoint and {list(patch.full_shape)} in the patch"
                raise ServerError(
                    f"{name} has shape {shapes}",
                    hint="load the base model of the patch with reload_llm, and patch it then",
                )
            weight = weight.flatten().index_put((patch.indices.long(),), patch.values.to(weight.dtype)).view_as(given)
        yield name, weight
    if left:
        raise ServerError(
            f"the checkpoint has no {', '.join(sorted(left))}; the weights of the checkpoint are loaded without them",
            hint="load the base model of the patch with reload_llm, and patch it then",
        )


def _reset(llm: Any) -> None:
    if llm.reset_prefix_cache() is False:
        raise ServerError(
            "the weights are replaced, but the prefix cache was not reset, because requests are running",
            hint="call llm.reset_prefix_cache() when they are finished",
        )
