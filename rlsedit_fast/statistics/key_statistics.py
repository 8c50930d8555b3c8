"""Key statistics: the second moments of the keys of each edited layer, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.files import damaged, open_tensors, write_tensors
from rlsedit_fast.models.fingerprint import digest
from rlsedit_fast.rls import BlockMoment

Moment = Tensor | BlockMoment
"""The moment of a layer: `E[k k^T] [d_k, d_k]`, or that of each expert of a mixture of experts."""

STATISTICS = "rlsedit-fast key statistics 2"
"""File type of key statistics."""

EARLIER_STATISTICS = "rlsedit-fast key statistics 1"
"""The file type without held-out tokens, which is read as well."""

_HELD_OUT = "held-out"

_ADVICE = "collect the statistics again"


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """Second moments of the keys of some layers on running text (MEMIT's mom2 statistics).

    Attributes:
        moments: by layer, `E[k k^T] [d_k, d_k]` over the tokens, float32; for a mixture of experts a `BlockMoment`.
        tokens: number of tokens.
        fingerprint: fingerprint of the model, see `models.fingerprint`.
        source: description of the text.
        held_out: by layer, the same over other tokens of the text, on which edits are measured; empty without them.
        held_out_tokens: number of these tokens.

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
    held_out: dict[int, Moment] = field(default_factory=dict)
    held_out_tokens: int = 0

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file atomically."""
        about = {
            "tokens": self.tokens,
            "held_out_tokens": self.held_out_tokens,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "layers": sorted(self.moments),
        }
        write_matrices(Path(path), STATISTICS, self.moments, about, held_out=self.held_out)

    @classmethod
    def load(cls, path: str | Path, *, layers: Sequence[int] | None = None) -> KeyStatistics:
        """Reads a file written by `save` into CPU memory.

        Args:
            path: the file.
            layers: layers to read; None reads all.

        Raises:
            InputError: the file does not exist, is damaged, has another type, or lacks a layer.
        """
        moments, held_out, about = read_matrices(Path(path), STATISTICS, layers, earlier=EARLIER_STATISTICS)
        numbers = about["tokens"], about["fingerprint"], about["source"]
        return cls(moments, *numbers, held_out, about.get("held_out_tokens", 0))

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


def write_matrices(
    path: Path,
    kind: str,
    moments: Mapping[int, Moment],
    about: dict[str, Any],
    *,
    held_out: Mapping[int, Moment] | None = None,
) -> None:
    """Writes one moment per layer, those over held-out tokens, and metadata as a safetensors file, atomically."""
    held, mixtures = dict[str, Tensor](), dict[str, dict[str, float]]()
    named = {str(layer): moment for layer, moment in moments.items()}
    named |= {f"{_HELD_OUT}-{layer}": moment for layer, moment in (held_out or {}).items()}
    for name, moment in named.items():
        if isinstance(moment, BlockMoment):
            held |= {f"{name}.{part}": tensor.contiguous() for part, tensor in moment.tensors().items()}
            mixtures[name] = {"tokens": moment.tokens, "energy": moment.energy}
        else:
            held[name] = moment.contiguous()
    about = about | ({"mixtures": mixtures} if mixtures else {})
    write_tensors(path, kind, held, about=about, sums={name: digest(tensor) for name, tensor in held.items()})


def read_matrices(
    path: Path, kind: str, layers: Sequence[int] | None = None, *, earlier: str | None = None
) -> tuple[dict[int, Moment], dict[int, Moment], dict[str, Any]]:
    """Reads the moments of a file written by `write_matrices`, all or those of `layers`, and its metadata.

    Args:
        path: the file.
        kind: its type.
        layers: layers to read; None reads all.
        earlier: an earlier version of the type that is accepted as well.

    Returns:
        By layer the moments and those over held-out tokens, and the metadata.

    Raises:
        InputError: the file does not exist, is damaged, has another type, or lacks a layer.
    """
    with open_tensors(path, kind, _ADVICE, earlier=earlier) as found:
        parts = dict[str, list[str]]()
        for name in found.sums:
            parts.setdefault(name.partition(".")[0], []).append(name)
        present = [name for name in parts if not name.startswith(_HELD_OUT)]
        wanted = present if layers is None else [str(layer) for layer in layers]
        if lacking := [layer for layer in wanted if layer not in parts]:
            raise InputError(
                f"{str(path)!r} contains the layers {', '.join(present)} and lacks {', '.join(lacking)}; {_ADVICE}"
            )
        others = [name for layer in wanted if (name := f"{_HELD_OUT}-{layer}") in parts]
        names = [name for group in (*wanted, *others) for name in parts[group]]
        if missing := sorted({*names} - {*found.file.keys()}):
            raise damaged(path, f"layer {', '.join(missing)} is missing", _ADVICE)
        held = {name: found.file.get_tensor(name) for name in names}
    for name, tensor in held.items():
        if digest(tensor) != found.sums[name]:
            raise damaged(path, f"the checksum of layer {name} does not match", _ADVICE)
    mixtures = found.about.pop("mixtures", {})

    def moments(groups: Sequence[str]) -> dict[int, Moment]:
        return {
            int(group.rpartition("-")[2]): _mixture(held, group, mixtures[group]) if group in mixtures else held[group]
            for group in groups
        }

    return moments(wanted), moments(others), found.about


def _mixture(held: Mapping[str, Tensor], group: str, about: Mapping[str, Any]) -> BlockMoment:
    tensors = {name.partition(".")[2]: tensor for name, tensor in held.items() if name.startswith(f"{group}.")}
    return BlockMoment.of_tensors(tensors, tokens=int(about["tokens"]), energy=float(about["energy"]))
