"""Key statistics: the second moments of the keys of each edited layer, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.files import damaged, open_tensors, write_tensors
from rlsedit_fast.models.fingerprint import digest
from rlsedit_fast.rls import BlockMoment

Moment = Tensor | BlockMoment
"""The moment of a layer: `E[k k^T] [d_k, d_k]`, or that of each expert of a mixture of experts."""

STATISTICS = "rlsedit-fast key statistics 1"
"""File type of key statistics."""

_ADVICE = "collect the statistics again"


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Second moments of the keys of some layers on running text (MEMIT's mom2 statistics).

    Attributes:
        moments: by layer, `E[k k^T] [d_k, d_k]` over all tokens, float32; for a mixture of experts a `BlockMoment`.
        tokens: number of tokens.
        fingerprint: fingerprint of the model, see `models.fingerprint`.
        source: description of the text.

    Example:
        >>> import torch
        >>> from rlsedit_fast import KeyStatistics
        >>> KeyStatistics({0: torch.eye(2)}, tokens=10, fingerprint="", source="a text").tokens
        10
    """

    moments: dict[int, Moment]
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


def write_matrices(path: Path, kind: str, moments: Mapping[int, Moment], about: dict[str, Any]) -> None:
    """Writes one moment per layer and metadata as a safetensors file, atomically."""
    held, mixtures = dict[str, Tensor](), dict[str, dict[str, float]]()
    for layer, moment in moments.items():
        if isinstance(moment, BlockMoment):
            held |= {f"{layer}.{name}": tensor.contiguous() for name, tensor in moment.tensors().items()}
            mixtures[str(layer)] = {"tokens": moment.tokens, "energy": moment.energy}
        else:
            held[str(layer)] = moment.contiguous()
    about = about | ({"mixtures": mixtures} if mixtures else {})
    write_tensors(path, kind, held, about=about, sums={name: digest(tensor) for name, tensor in held.items()})


def read_matrices(
    path: Path, kind: str, layers: Sequence[int] | None = None
) -> tuple[dict[int, Moment], dict[str, Any]]:
    """Reads the moments of a file written by `write_matrices`, all or those of `layers`, and its metadata.

    Raises:
        InputError: the file does not exist, is damaged, has another type, or lacks a layer.
    """
    with open_tensors(path, kind, _ADVICE) as found:
        parts = dict[str, list[str]]()
        for name in found.sums:
            parts.setdefault(name.partition(".")[0], []).append(name)
        wanted = list(parts) if layers is None else [str(layer) for layer in layers]
        if lacking := [layer for layer in wanted if layer not in parts]:
            raise InputError(
                f"{str(path)!r} contains the layers {', '.join(parts)} and lacks {', '.join(lacking)}; {_ADVICE}"
            )
        names = [name for layer in wanted for name in parts[layer]]
        if missing := sorted({*names} - {*found.file.keys()}):
            raise damaged(path, f"layer {', '.join(missing)} is missing", _ADVICE)
        held = {name: found.file.get_tensor(name) for name in names}
    for name, tensor in held.items():
        if digest(tensor) != found.sums[name]:
            raise damaged(path, f"the checksum of layer {name} does not match", _ADVICE)
    mixtures = found.about.pop("mixtures", {})
    moments: dict[int, Moment] = {
        int(layer): _mixture(held, layer, mixtures[layer]) if layer in mixtures else held[layer] for layer in wanted
    }
    return moments, found.about


def _mixture(held: Mapping[str, Tensor], layer: str, about: Mapping[str, Any]) -> BlockMoment:
    tensors = {name.partition(".")[2]: tensor for name, tensor in held.items() if name.startswith(f"{layer}.")}
    return BlockMoment.of_tensors(tensors, tokens=int(about["tokens"]), energy=float(about["energy"]))
