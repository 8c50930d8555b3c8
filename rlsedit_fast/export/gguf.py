"""Writes edited weights into a copy of a GGUF file: all other bytes stay as they are."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.export.changes import WeightChange, check_distinct, same_bits
from rlsedit_fast.files import written_whole
from rlsedit_fast.models.gguf_files import GgufHeader, GgufTensor, quant_type, read_header

AUTO, OWN = "auto", "own"
LARGER = ("Q8_0", "F16", "F32")
"""Types that `auto` tries, in this order, if an edit does not hold at the tensor's own type."""
TYPES = (AUTO, OWN, "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types of edited tensors that a user can choose."""


@dataclass(frozen=True, eq=False)
class GgufTarget:
    """An edited weight and its tensor in a GGUF file.

    Attributes:
        module: dotted name of the linear module in the model.
        tensor: the tensor in the file.
        original: weight in the file, dequantized, `[d_v, d_k]`, float32.
        edited: weight to be written, `[d_v, d_k]`, float32.

    Example:
        >>> import torch
        >>> from rlsedit_fast.export.gguf import GgufTarget
        >>> from rlsedit_fast.models.gguf_files import GgufTensor
        >>> tensor = GgufTensor("blk.0.ffn_down.weight", (1, 32), "Q4_0", start=96, size=18, entry=64)
        >>> target = GgufTarget("model.layers.0.mlp.down_proj", tensor, torch.zeros(1, 32), torch.ones(1, 32))
        >>> target.choose("own"), target.choose("Q8_0")
        ('Q4_0', 'Q8_0')
    """

    module: str
    tensor: GgufTensor
    original: Tensor
    edited: Tensor

    def can_be(self, name: str) -> bool:
        """Whether the package gguf can write the weight with this type."""
        from gguf import GGML_QUANT_SIZES, quants

        kind = quant_type(name)
        block, _ = GGML_QUANT_SIZES[kind]
        if self.edited.shape[1] % block:
            return False
        try:
            quants.quantize(np.zeros((1, block), np.float32), kind)
        except NotImplementedError:
            return False
        return True

    def choose(self, name: str) -> str:
        """Returns the type to write for `own` or a type of GGUF.

        Raises:
            InputError: the package gguf cannot write the weight with this type.
        """
        kind = self.tensor.type if name == OWN else name
        if not self.can_be(kind):
            raise InputError(
                f"{self.tensor.name}, with rows of {self.edited.shape[1]} weights, cannot be written as {kind} by the "
                "package gguf",
                hint=f"pass --gguf-type {AUTO} or F16 (Python: tensor_type={AUTO!r})",
            )
        return kind

    def ladder(self) -> list[str]:
        """Returns the types that `auto` tries: the own one if it can be written, then larger ones."""
        larger = [name for name in LARGER if _bits(name) > _bits(self.tensor.type)]
        fitting = [name for name in (self.tensor.type, *larger) if self.can_be(name)]
        if float(self.edited.abs().max()) > float(np.finfo(np.float16).max):
            fitting = [name for name in fitting if name != "F16"]
        return fitting or ["F32"]

    def pack(self, name: str) -> bytes:
        """Returns the edited weight as the data of a tensor of this type.

        Raises:
            InputError: the type does not represent a weight, because it is too large.
        """
        from gguf import quants

        with np.errstate(over="ignore", invalid="ignore"):
            data = quants.quantize(np.ascontiguousarray(self.edited.numpy()), quant_type(name)).tobytes()
            finite = bool(torch.isfinite(self.unpack(name, data)).all())
        if not finite:
            raise InputError(
                f"{self.tensor.name}: a weight is too large for {name}",
                hint=f"pass --gguf-type F32 or {AUTO} (Python: tensor_type={AUTO!r})",
            )
        return data

    def unpack(self, name: str, data: bytes) -> Tensor:
        """Returns the weight `[d_v, d_k]`, float32, that a program reads from the data of a tensor of this type."""
        from gguf import quants

        raw = np.frombuffer(data, np.uint8).reshape(self.edited.shape[0], -1)
        return torch.from_numpy(np.array(quants.dequantize(raw, quant_type(name)), np.float32))


def find_targets(header: GgufHeader, changes: Sequence[WeightChange], *, layers: int) -> list[GgufTarget]:
    """Finds the tensors of edited weights in the GGUF file that the model was loaded from.

    Args:
        header: the file.
        changes: the edited weights; those that are equal to the original ones are included.
        layers: number of layers of the model.

    Returns:
        One target per change.

    Raises:
        ModelError: the file has no tensor for a module.
        InputError: the original weight of a module is not the one in the file.
    """
    check_distinct(changes)
    targets = []
    for change in changes:
        name = _tensor_name(header, change.name, layers)
        tensor = header.tensors[name]
        held = header.read(name)
        original = change.original.detach().cpu()
        if tensor.shape != tuple(original.shape) or not same_bits(held.to(original.dtype), original.contiguous()):
            raise InputError(
                f"{str(header.path)!r}: the tensor {name} differs from the weight of {change.name} before the edits",
                hint="pass the GGUF file that the model was loaded from",
            )
        current = change.current.detach().cpu()
        if original.dtype == torch.float32:
            edited = current.float()
        else:  # the weights of the model are rounded, those of the file are not
            edited = held + (current.double() - original.double()).float()
        targets.append(GgufTarget(change.name, tensor, held, edited.contiguous()))
    return targets


def write_gguf(
    header: GgufHeader, path: str | Path, packed: Mapping[str, tuple[str, bytes]], *, overwrite: bool = False
) -> None:
    """Writes a copy of a GGUF file in which the data of some tensors is replaced.

    Metadata, other tensors, their order, alignment and gaps are copied bit for bit. Only the types of replaced tensors
    and, if a size differs, the positions of the data change in the header.

    Args:
        header: the file to copy.
        path: output file, which gets its name once it is complete.
        packed: type and data of the replaced tensors, by name.
        overwrite: replace an existing file.

    Raises:
        InputError: the output is the file itself, exists, is a folder or cannot be written, or the file changed while
            it was read.
    """
    place = Path(path)
    if place.exists() and place.samefile(header.path):
        raise InputError(f"{str(path)!r} is the GGUF file of the model; choose another path")
    if place.exists() and not place.is_dir() and not overwrite:
        raise InputError(
            f"{str(path)!r} already exists; nothing was written",
            hint="choose another path, or pass --overwrite (Python: overwrite=True)",
        )
    with written_whole(place) as (temporary,):
        with header.path.open("rb") as source, temporary.open("wb") as out:
            out.write(_new_header(source.read(header.data), header, packed))
            for piece in _pieces(header, packed):
                if isinstance(piece, bytes):
                    out.write(piece)
                else:
                    _copy(source, out, *piece)
            _check_unchanged(header, os.fstat(source.fileno()))
        _check_written(header, temporary, packed)


def _check_unchanged(header: GgufHeader, now: os.stat_result) -> None:
    """Raises InputError if the file is not the one whose header was read."""
    if (now.st_size, now.st_mtime_ns) != (header.size, header.modified):
        raise InputError(
            f"{str(header.path)!r} changed while it was read; nothing was written. Load the model again and repeat this"
        )


def _check_written(header: GgufHeader, path: Path, packed: Mapping[str, tuple[str, bytes]]) -> None:
    """Raises InputError unless the written file has the same metadata and tensors, and the replaced data."""
    written = read_header(path)
    same = written.metadata == header.metadata and list(written.tensors) == list(header.tensors)
    with path.open("rb") as file:
        for name, (kind, data) in packed.items():
            tensor = written.tensors.get(name)
            if tensor is None or tensor.type != kind or tensor.size != len(data):
                same = False
                break
            file.seek(tensor.start)
            same = same and file.read(tensor.size) == data
    if not same:
        raise InputError(f"{str(path)!r} does not contain what was written; nothing was saved. Check the disk")


def _tensor_name(header: GgufHeader, module: str, layers: int) -> str:
    """Returns the name of the weight of a module in the file, by the table of gguf for the architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture), None)
    if arch is None:
        raise ModelError(
            f"{str(header.path)!r}: the package gguf does not know the architecture {header.architecture!r}",
            hint="run `pip install --upgrade gguf`",
        )
    table = get_tensor_name_map(arch, layers)
    parts = module.split(".")
    for first in range(len(parts)):  # without a prefix such as `transformer.`, as in files of older converters
        found = table.get_name(".".join(parts[first:]))
        if found is not None and f"{found}.weight" in header.tensors:
            return f"{found}.weight"
    raise ModelError(
        f"{str(header.path)!r}, architecture {header.architecture!r}, has no tensor for {module}",
        hint="write a checkpoint (--out DIR) and convert it with convert_hf_to_gguf.py of llama.cpp",
    )


def _bits(name: str) -> float:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[quant_type(name)]
    return 8 * size / block


def _segments(header: GgufHeader) -> list[tuple[GgufTensor, int]]:
    """Returns the tensors by position, each with the end of its segment, which includes padding."""
    ordered = sorted(header.tensors.values(), key=lambda tensor: tensor.start)
    ends = [*(tensor.start for tensor in ordered[1:]), header.size]
    return list(zip(ordered, ends, strict=True))


def _tail(header: GgufHeader, tensor: GgufTensor, end: int, data: bytes) -> tuple[int, int] | bytes:
    """Returns what follows replaced data: the bytes of the file, or zeros if the size differs."""
    if len(data) == tensor.size:
        return tensor.start + tensor.size, end
    return bytes(-len(data) % header.alignment)


def _pieces(header: GgufHeader, packed: Mapping[str, tuple[str, bytes]]) -> Iterator[bytes | tuple[int, int]]:
    """Yields what follows the header: new data, and ranges of the file that are copied."""
    segments = _segments(header)
    if segments:
        yield header.data, segments[0][0].start
    for tensor, end in segments:
        if tensor.name in packed:
            data = packed[tensor.name][1]
            yield data
            yield _tail(header, tensor, end, data)
        else:
            yield tensor.start, end


def _new_header(old: bytes, header: GgufHeader, packed: Mapping[str, tuple[str, bytes]]) -> bytes:
    new = bytearray(old)
    moved = 0
    for tensor, end in _segments(header):
        kind = packed[tensor.name][0] if tensor.name in packed else tensor.type
        offset = tensor.start - header.data + moved
        struct.pack_into("<IQ", new, tensor.entry, int(quant_type(kind)), offset)
        if tensor.name in packed:
            data = packed[tensor.name][1]
            tail = _tail(header, tensor, end, data)
            length = len(data) + (len(tail) if isinstance(tail, bytes) else tail[1] - tail[0])
            moved += length - (end - tensor.start)
    return bytes(new)


def _copy(source: BinaryIO, out: BinaryIO, start: int, end: int) -> None:
    source.seek(start)
    remaining = end - start
    while remaining and (block := source.read(min(remaining, 1 << 24))):
        out.write(block)
        remaining -= len(block)
    if remaining:
        raise InputError(f"{source.name!r} became shorter while it was read; download it again")
