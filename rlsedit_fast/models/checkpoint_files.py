"""The files of a checkpoint on disk: its folder, the files of its weights, and its tensors by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError, listed
from rlsedit_fast.files import read_json
from rlsedit_fast.models.gguf_files import is_gguf

SAFETENSORS = ".safetensors"
_NAMES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
_INDEX = ".index.json"
_LARGEST_HEADER = 100_000_000  # bytes; the limit of safetensors
_SKIPPED = frozenset({".git", ".cache", "__pycache__"})


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file.

    Attributes:
        dtype: name of its dtype in the header, such as `BF16`.
        shape: its shape.
        start: position of its first byte in the file.
        end: position after its last byte.

    Example:
        >>> from rlsedit_fast.models.checkpoint_files import StoredTensor
        >>> StoredTensor("BF16", (2, 3), start=128, end=140).shape
        (2, 3)
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """The header of a safetensors file, see `read_shard`.

    Attributes:
        tensors: its tensors, in the order of the header.
        metadata: its metadata.
        header: the bytes before the data of the tensors.
        size: size of the file.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    header: bytes
    size: int


def read_shard(path: Path) -> Shard:
    """Reads the header of a safetensors file.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0]
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            text = file.read(length)
        held = json.loads(text)
        metadata = held.pop("__metadata__", None) or {}
        data, size = 8 + length, path.stat().st_size
        tensors = {
            name: StoredTensor(
                entry["dtype"], tuple(entry["shape"]), *(data + position for position in entry["data_offsets"])
            )
            for name, entry in held.items()
        }
        if any(not data <= one.start <= one.end <= size for one in tensors.values()):
            raise ValueError("a tensor lies outside the file")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{str(path)!r} cannot be read as a safetensors file ({error}); download it again") from error
    return Shard(tensors, metadata, start + text, size)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a folder.

    Attributes:
        folder: the folder.
        weights: names of the files with the weights that transformers loads.

    Example:
        >>> from rlsedit_fast.models.checkpoint_files import find_checkpoint
        >>> from rlsedit_fast.world import MODEL_DIR
        >>> checkpoint = find_checkpoint(MODEL_DIR)
        >>> checkpoint.weights
        ('model.safetensors',)
        >>> checkpoint.read("model.norm.weight").shape
        torch.Size([128])
    """

    folder: Path
    weights: tuple[str, ...]
    _open: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_safetensors(self) -> bool:
        """Whether the weights are in safetensors files; otherwise they are in files of torch."""
        return self.weights[0].endswith(SAFETENSORS)

    @cached_property
    def shards(self) -> dict[str, Shard]:
        """The headers of the safetensors files, by name of the file."""
        return {name: read_shard(self.folder / name) for name in self.weights} if self.is_safetensors else {}

    @cached_property
    def file_of(self) -> dict[str, str]:
        """The name of the file of each tensor."""
        if self.is_safetensors:
            return {tensor: name for name, shard in self.shards.items() for tensor in shard.tensors}
        found = {name: load_torch_file(self.folder / name) for name in self.weights}
        return {key: name for name, held in found.items() for key, value in held.items() if isinstance(value, Tensor)}

    def read(self, tensor: str) -> Tensor:
        """Returns a tensor, from memory-mapped data where the format allows it."""
        name = self.file_of[tensor]
        if name not in self._open:
            self._open[name] = _opened(self.folder / name)
        held = self._open[name]
        found: Tensor = held[tensor] if isinstance(held, Mapping) else held.get_tensor(tensor)
        return found

    def files(self) -> Iterator[str]:
        """Yields the paths of all files, relative to the folder, without those of Git and of download tools."""
        yield from _files_in(self.folder, self.folder, frozenset())


def find_checkpoint(
    name: str | Path, *, subfolder: str = "", revision: str | None = None, cache_dir: str | Path | None = None
) -> Checkpoint:
    """Finds the folder of a checkpoint, without network access.

    Args:
        name: folder, or name of a model on the Hub, which is looked up in the local cache.
        subfolder: folder within it.
        revision: branch, tag or commit of a model on the Hub.
        cache_dir: folder of the cache, if not the one of huggingface_hub.

    Returns:
        The checkpoint. In the cache of the Hub it consists of the files that were downloaded.

    Raises:
        InputError: there is no such folder or snapshot, or it has no complete weights in a format that transformers
            loads.
    """
    place = Path(name)
    if place.is_dir():
        folder = place / subfolder
    elif is_gguf(name):
        raise InputError(f"{str(name)!r} is a GGUF file")
    else:
        folder = _snapshot(str(name), subfolder, revision, cache_dir)
    return Checkpoint(folder, _weights_of(folder))


def load_torch_file(path: Path) -> dict[str, Any]:
    """Loads a file that `torch.save` wrote, memory-mapped where the format allows it, without running code.

    Raises:
        InputError: the file cannot be read, or does not contain tensors by name.
    """
    import pickle

    failures = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)
    try:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # a file in the format before version 1.6
            held = torch.load(path, map_location="cpu", weights_only=True)
    except failures as error:
        raise InputError(f"{str(path)!r} cannot be read as a file of torch ({error}); download it again") from error
    if not isinstance(held, Mapping):
        raise InputError(f"{str(path)!r} contains a {type(held).__name__}; expected tensors by name")
    return held  # type: ignore[return-value]


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    if path.suffix != SAFETENSORS:
        return load_torch_file(path)
    return safe_open(path, framework="pt").__enter__()


def _snapshot(name: str, subfolder: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    wanted = f"{subfolder}/config.json" if subfolder else "config.json"
    try:
        found = try_to_load_from_cache(name, wanted, revision=revision, cache_dir=cache_dir)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise InputError(f"{name!r} is neither a folder nor a model in the cache of the Hugging Face Hub")
    return Path(found).parent


def _weights_of(folder: Path) -> tuple[str, ...]:
    named = _named_weights(folder)
    for name in (named,) if named else _NAMES:
        if (folder / name).is_file() and not name.endswith(_INDEX):
            return (name,)
        index = folder / (name if name.endswith(_INDEX) else f"{name}{_INDEX}")
        if index.is_file():
            return _indexed(index)
    raise InputError(f"the folder {str(folder)!r} has none of {', '.join(_NAMES)}, or their index")


def _named_weights(folder: Path) -> str | None:
    """Returns the name of the weights in the config, which transformers prefers."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    held = read_json(config, "the config of a model")
    named = held.get("transformers_weights") if isinstance(held, dict) else None
    return named if isinstance(named, str) else None


def _indexed(index: Path) -> tuple[str, ...]:
    held = read_json(index, "the index of a checkpoint")
    places = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(one, str) for one in places.values()):
        raise InputError(f"{str(index)!r} has no weight_map; download it again")
    names = sorted({*places.values()})
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(
            f"the folder {str(index.parent)!r} lacks {', '.join(listed(missing, 3))}; download the checkpoint again"
        )
    return tuple(names)


def _files_in(root: Path, folder: Path, seen: frozenset[Path]) -> Iterator[str]:
    real = folder.resolve()
    if real in seen:  # a link to a folder above
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in _SKIPPED:
                yield from _files_in(root, path, seen | {real})
        else:
            yield path.relative_to(root).as_posix()
