"""Key statistics: the second moment `E[k k^T]` of the keys of each edited layer, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.files import damaged, open_tensors, write_tensors
from rlsedit_fast.models.fingerprint import digest

STATISTICS = "rlsedit-fast key statistics 1"
"""File type of key statistics."""

_ADVICE = "collect the statistics again"


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Second moments of the keys of some layers on running text (MEMIT's mom2 statistics).

    Attributes:
        moments: by layer, `E[k k^T] [d_k, d_k]` over all tokens, float32.
        tokens: number of tokens.
        fingerprint: fingerprint of the model, see `models.fingerprint`.
        source: description of the text.

    Example:
        >>> import torch
        >>> from rlsedit_fast import KeyStatistics
        >>> KeyStatistics({0: torch.eye(2)}, tokens=10, fingerprint="", source="a text").tokens
        10
    """

    moments: dict[int, Tensor]
    tokens: int
    fingerprint: str
    source: str

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file atomically."""
        about = {"tokens": self.tokens, "fingerprint": self.fingerprint, "source": self.source}
        about["layers"] = sorted(self.moments)
        write_matrices(Path(path), STATISTICS, self.moments, about)

    @classmethod
    def load(cls, path: str | Path, *, layers: Sequence[int] | None = None) -> KeyStatistics:
        """Reads a file written by `save` into CPU memory.

        Args:
            path: the file.
            layers: layers to read; None reads all.

        Raises:
            InputError: the file does not exist, is damaged, has another type, or lacks a layer.
        """
        moments, about = read_matrices(Path(path), STATISTICS, layers)
        return cls(moments, about["tokens"], about["fingerprint"], about["source"])

    def check(self, fingerprint: str, layers: Sequence[int]) -> None:
        """Raises InputError if the statistics are of another model or lack one of the layers."""
        if fingerprint != self.fingerprint:
            raise InputError(
                f"these key statistics were collected from a model with the fingerprint {self.fingerprint[:12]}, and "
                f"this model has {fingerprint[:12]}: weights, dtype or config differ; collect them from this model"
            )
        if missing := sorted(set(layers) - set(self.moments)):
            raise InputError(
                f"these key statistics contain the layers {sorted(self.moments)} and lack {missing}; collect them for "
                "all edited layers"
            )


def write_matrices(path: Path, kind: str, matrices: dict[int, Tensor], about: dict[str, Any]) -> None:
    """Writes one matrix per layer and metadata as a safetensors file, atomically."""
    held = {str(layer): matrix.contiguous() for layer, matrix in matrices.items()}
    write_tensors(path, kind, held, about=about, sums={layer: digest(matrix) for layer, matrix in held.items()})


def read_matrices(
    path: Path, kind: str, layers: Sequence[int] | None = None
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Reads the matrices of a file written by `write_matrices`, all or those of `layers`, and its metadata.

    Raises:
        InputError: the file does not exist, is damaged, has another type, or lacks a layer.
    """
    with open_tensors(path, kind, _ADVICE) as found:
        wanted = list(found.sums) if layers is None else [str(layer) for layer in layers]
        if lacking := [layer for layer in wanted if layer not in found.sums]:
            raise InputError(
                f"{str(path)!r} contains the layers {', '.join(found.sums)} and lacks {', '.join(lacking)}; {_ADVICE}"
            )
        if missing := sorted({*wanted} - {*found.file.keys()}):
            raise damaged(path, f"layer {', '.join(missing)} is missing", _ADVICE)
        held = {layer: found.file.get_tensor(layer) for layer in wanted}
    for layer, matrix in held.items():
        if digest(matrix) != found.sums[layer]:
            raise damaged(path, f"the checksum of layer {layer} does not match", _ADVICE)
    return {int(layer): matrix for layer, matrix in held.items()}, found.about
