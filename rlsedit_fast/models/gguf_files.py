"""Reads the header of a GGUF file: metadata, and the position, shape and type of every tensor."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, ModelError, did_you_mean, listed

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_ALIGNMENT = 32  # without general.alignment
_MOST_DIMENSIONS = 8  # ggml has 4; more means that the file is damaged

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_LAYER = "blk.{}.ffn_down.weight"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: its name, such as `blk.0.ffn_down.weight`.
        shape: its shape, in the order of torch.
        type: name of its type, such as `Q4_1`.
        start: position of its data in the file.
        size: bytes of its data.
        entry: position of its type in the header; the offset of the data follows.

    Example:
        >>> from rlsedit_fast.models.gguf_files import GgufTensor
        >>> GgufTensor("blk.0.ffn_down.weight", (64, 96), "Q8_0", start=4096, size=6528, entry=512).type
        'Q8_0'
    """

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    size: int
    entry: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file, see `read_header`.

    Attributes:
        path: the file.
        metadata: scalars and strings by name; arrays as their length.
        tensors: the tensors by name, in the order of the file.
        alignment: positions of tensors are multiples of it.
        data: position of the data section.
        size: size of the file.
        modified: time of its last modification, in nanoseconds.

    Example:
        >>> from pathlib import Path
        >>> from rlsedit_fast.models.gguf_files import GgufHeader
        >>> header = GgufHeader(Path("m.gguf"), {"general.architecture": "llama"}, {}, alignment=32, data=96, size=96)
        >>> header.architecture
        'llama'
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    alignment: int
    data: int
    size: int
    modified: int = 0

    @property
    def architecture(self) -> str:
        """Name of the architecture in GGUF, such as `llama`."""
        return str(self.metadata["general.architecture"])

    def read(self, name: str) -> Tensor:
        """Returns a tensor, dequantized, float32.

        Raises:
            InputError: the package gguf cannot dequantize its type.
        """
        from gguf import quants

        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.size, offset=tensor.start)
        kind = quant_type(tensor.type)
        try:
            values = quants.dequantize(raw.reshape(_rows(tensor)), kind)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: the package gguf cannot dequantize {name}, which is of type {tensor.type}; pass a file "
                "with other types, such as Q4_K or Q8_0"
            ) from error
        return torch.from_numpy(np.array(values, np.float32).reshape(tensor.shape))


def is_gguf(path: str | Path) -> bool:
    """Returns whether a path is named like a GGUF file, or is one by its first bytes."""
    place = Path(path)
    if place.suffix == SUFFIX and not place.is_dir():
        return True
    try:
        with place.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def check_gguf(path: str | Path) -> GgufHeader:
    """Checks, before the weights are read, that a model can be loaded from a GGUF file and be edited.

    Returns:
        The header of the file.

    Raises:
        InputError: a package is missing, or the file cannot be read, is damaged or is one part of a model.
        ModelError: transformers cannot load the architecture, or the file has no dense MLP.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"model {str(path)!r} is a GGUF file, and {' and '.join(missing)} is not installed",
            hint='run `pip install "rlsedit-fast[gguf]"`',
        )
    header = read_header(path)
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise InputError(
            f"model {str(path)!r} is one of {parts} parts of a model, and edits are written into a single file",
            hint=f"join the parts with `llama-gguf-split --merge {Path(path).name} model.gguf` of llama.cpp",
        )
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = sorted({*GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"})
    # Names differ in spelling: qwen2moe in GGUF, qwen2_moe in transformers.
    if header.architecture.translate({45: None}) not in {name.replace("_", "") for name in known}:
        raise ModelError(
            f"model {str(path)!r}: transformers cannot load the architecture {header.architecture!r} from a GGUF file"
            f"{did_you_mean(header.architecture, known)}",
            hint=f"pass a file of one of {', '.join(known)}, or the checkpoint that it was converted from",
        )
    if not any(name.startswith("blk.") and name.endswith(".ffn_down.weight") for name in header.tensors):
        raise ModelError(
            f"model {str(path)!r}: no block of the architecture {header.architecture!r} has an MLP whose output "
            f"projection can be edited (there is no tensor {_LAYER.format(0)})",
            hint="pass a file of a model with dense MLPs; mixtures of experts are not supported",
        )
    return header


def read_header(path: str | Path) -> GgufHeader:
    """Reads the header of a GGUF file; `gguf.GGUFReader` takes seconds and does not keep all positions.

    Args:
        path: the file, version 2 or 3, little-endian.

    Raises:
        InputError: the file does not exist, cannot be read, is not a GGUF file, or is damaged.
    """
    place = Path(path)
    if place.is_dir():
        raise InputError(f"{str(path)!r} is a folder; pass a GGUF file")
    try:
        about = place.stat()
        if not about.st_size:
            raise InputError(f"{str(path)!r} is empty; download it again")
        reader = _Reader(np.memmap(place, np.uint8, "r"))
        return _parsed(place, reader, about.st_size, about.st_mtime_ns)
    except FileNotFoundError as error:
        raise InputError(f"{str(path)!r} does not exist; pass a GGUF file") from error
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror or error}); pass a readable file") from error
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} is damaged: its header cannot be read ({error}); download it again") from error


def quant_type(name: str) -> Any:
    """Returns the `gguf.GGMLQuantizationType` of a name."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name]


class _Reader:
    """Reads little-endian values one after another."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = memoryview(data), 0  # type: ignore[arg-type]

    def take(self, form: str) -> Any:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values[0] if len(values) == 1 else values

    def text(self) -> str:
        return bytes(self._bytes(self.take("Q"))).decode("utf-8")

    def _bytes(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def value(self, kind: int) -> Any:
        """Reads a value; of an array, only its length is returned."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        inner, count = self.take("IQ")
        if inner in _SCALARS:
            self._bytes(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _STRING:
            for _ in range(count):
                self._bytes(self.take("Q"))
        else:
            for _ in range(count):
                self.value(inner)
        return count


def _parsed(path: Path, reader: _Reader, size: int, modified: int) -> GgufHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if bytes(reader.data[:4]) != _MAGIC:
        raise InputError(f"{str(path)!r} is not a GGUF file (it does not start with GGUF); pass a GGUF file")
    reader.at = 4
    version, count, fields = reader.take("IQQ")
    if version not in (2, 3):
        order = " or is big-endian" if version & 0xFFFF == 0 else ""
        raise InputError(
            f"{str(path)!r} has version {version}{order}; expected a little-endian GGUF file of version 2 or 3"
        )
    metadata: dict[str, Any] = {}
    for _ in range(fields):
        key = reader.text()
        metadata[key] = reader.value(reader.take("I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("it does not name its architecture")
    found = []
    for _ in range(count):
        name, dimensions = reader.text(), reader.take("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(reader.take("Q") for _ in range(dimensions))[::-1]
        entry = reader.at
        found.append((name, shape, entry, *reader.take("IQ")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment}")
    data = -(-reader.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, entry, number, offset in found:
        kind = GGMLQuantizationType(number)
        block, width = GGML_QUANT_SIZES[kind]
        if name in tensors or math.prod(shape) % block:
            raise ValueError(f"the entry of the tensor {name} is invalid")
        tensors[name] = GgufTensor(name, shape, kind.name, data + offset, math.prod(shape) // block * width, entry)
    _check_places(path, [*tensors.values()], size)
    return GgufHeader(path, metadata, tensors, alignment, data, size, modified)


def _check_places(path: Path, tensors: list[GgufTensor], size: int) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.start)
    ends = [*(tensor.start for tensor in ordered[1:]), size]
    wrong = [one.name for one, end in zip(ordered, ends, strict=True) if one.start + one.size > end]
    if wrong:
        raise InputError(
            f"{str(path)!r} is damaged: it has {size} bytes, and the data of {', '.join(listed(wrong, 3))} is "
            "incomplete or overlaps another tensor; download it again"
        )


def _rows(tensor: GgufTensor) -> tuple[int, ...]:
    """Returns the shape of a tensor's bytes: its rows, and the bytes of a row."""
    rows = math.prod(tensor.shape[:-1])
    return rows, tensor.size // max(1, rows)
