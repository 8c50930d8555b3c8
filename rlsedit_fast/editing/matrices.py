"""Files of a matrix per layer, written whole or not at all, that tell when they are damaged or something else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.files import written_whole
from rlsedit_fast.models.fingerprint import digest


def write_matrices(path: Path, kind: str, matrices: dict[int, Tensor], about: dict[str, Any]) -> None:
    """Writes a matrix per layer, and what there is to say about them, as one safetensors file.

    The file takes its name once it lies whole on the disk: whatever was there is kept until then.
    """
    from safetensors.torch import save_file

    held = {str(layer): matrix.contiguous() for layer, matrix in matrices.items()}
    sums = {layer: digest(matrix) for layer, matrix in held.items()}
    with written_whole(path) as (fresh,):
        save_file(held, fresh, metadata={"kind": kind, "about": json.dumps(about), "sums": json.dumps(sums)})


def read_matrices(
    path: Path, kind: str, layers: Sequence[int] | None = None
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """The matrices of a file of `write_matrices`, all or those of `layers`, and what it says about them.

    Raises:
        InputError: the file is not there, is damaged, is of another kind, or lacks a layer.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                raise InputError(f"{str(path)!r} is a safetensors file, but none of {kind!r}; name the right one")
            sums = json.loads(metadata["sums"])
            wanted = list(sums) if layers is None else [str(layer) for layer in layers]
            if lacking := [layer for layer in wanted if layer not in sums]:
                raise InputError(
                    f"{str(path)!r} has the layers {', '.join(sums)} and lacks {', '.join(lacking)}; collect them anew"
                )
            held = {layer: file.get_tensor(layer) for layer in wanted}
    except FileNotFoundError as error:
        raise InputError(f"{str(path)!r} is not there; name a file of {kind!r}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{str(path)!r} is damaged, or no file of {kind!r} ({error}); collect it anew") from error
    for layer, matrix in held.items():
        if digest(matrix) != sums[layer]:
            raise InputError(f"{str(path)!r} is damaged: layer {layer} is not what was written; collect it anew")
    return {int(layer): matrix for layer, matrix in held.items()}, json.loads(metadata["about"])
