"""Files of a matrix per layer, written whole or not at all, that tell when they are damaged or something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.files import damaged, open_tensors, write_tensors
from rlsedit_fast.models.fingerprint import digest

_AGAIN = "collect it anew"


def write_matrices(path: Path, kind: str, matrices: dict[int, Tensor], about: dict[str, Any]) -> None:
    """Writes a matrix per layer, and what there is to say about them, as one safetensors file.

    The file takes its name once it lies whole on the disk: whatever was there is kept until then.
    """
    held = {str(layer): matrix.contiguous() for layer, matrix in matrices.items()}
    write_tensors(path, kind, held, about=about, sums={layer: digest(matrix) for layer, matrix in held.items()})


def read_matrices(
    path: Path, kind: str, layers: Sequence[int] | None = None
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """The matrices of a file of `write_matrices`, all or those of `layers`, and what it says about them.

    Raises:
        InputError: the file is not there, is damaged, is of another kind, or lacks a layer.
    """
    with open_tensors(path, kind, _AGAIN) as found:
        wanted = list(found.sums) if layers is None else [str(layer) for layer in layers]
        if lacking := [layer for layer in wanted if layer not in found.sums]:
            raise InputError(
                f"{str(path)!r} has the layers {', '.join(found.sums)} and lacks {', '.join(lacking)}; {_AGAIN}"
            )
        if missing := sorted({*wanted} - {*found.file.keys()}):
            raise damaged(path, f"it lacks layer {', '.join(missing)}", _AGAIN)
        held = {layer: found.file.get_tensor(layer) for layer in wanted}
    for layer, matrix in held.items():
        if digest(matrix) != found.sums[layer]:
            raise damaged(path, f"layer {layer} is not what was written", _AGAIN)
    return {int(layer): matrix for layer, matrix in held.items()}, found.about
