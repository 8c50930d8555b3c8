"""Writes edited projections into a copy of a quantized checkpoint: they are no longer quantized, all others stay so."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast.export.base_tensors import UnlikeBaseError, WrittenTensors, tensor_bytes
from rlsedit_fast.export.changes import WeightChange, same_bits
from rlsedit_fast.files import read_json, written_whole
from rlsedit_fast.models.checkpoint_files import Checkpoint, Shard
from rlsedit_fast.models.disk_names import module_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SKIPPED = {
    "bitsandbytes": "llm_int8_skip_modules",
    "torchao": "modules_to_not_convert",
    "fp8": "modules_to_not_convert",
    "compressed-tensors": "ignore",
}
"""Field of the quantization config that lists modules that are not quantized, by method."""

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_projections_like(
    model: PreTrainedModel, base: Checkpoint, folder: Path, changes: Sequence[WeightChange], method: str
) -> WrittenTensors:
    """Writes edited weights into copies of the files of a quantized base, and lists them in its config.

    Args:
        model: the model; its other tensors are compared with those of the base if they have the same name, shape and
            dtype.
        base: the base.
        folder: folder with copies of all files of the base.
        changes: changes of the edited weights.
        method: name of the quantization method.

    Raises:
        UnlikeBaseError: the method or the format of the files is not supported, a module is not found, or another
            weight differs from the base.
    """
    edited = [change for change in changes if not same_bits(change.original, change.stored)]
    if method not in SKIPPED or not base.is_safetensors:
        raise UnlikeBaseError(f"it is quantized with {method}; supported are {', '.join(SKIPPED)} in safetensors files")
    if any(change.stack for change in edited):
        raise UnlikeBaseError("experts of quantized checkpoints are not supported")
    _check_others(model, base, {f"{change.name}.weight" for change in changes})
    written, added, dropped = WrittenTensors(), dict[str, dict[str, Tensor]](), dict[str, set[str]]()
    for change in edited:
        place, keys = module_keys(model, base.file_of, change.name)
        if not keys:
            raise UnlikeBaseError(f"it has no tensors of {change.name}")
        stored = (change.stored.T if change.transposed else change.stored).cpu().contiguous()
        for key in keys:
            dropped.setdefault(base.file_of[key], set()).add(key)
        added.setdefault(base.file_of[keys[0]], {})[f"{place}.weight"] = stored
        written.keys.append(f"{place}.weight")
    for name, keys_of in dropped.items():
        rewrite_shard(base.folder / name, base.shards[name], folder / name, added.get(name, {}), keys_of)
    if edited:
        _update_index(base, folder, added, dropped)
        _list_as_ordinary(folder / "config.json", model, [change.name for change in edited], SKIPPED[method])
    return written


def rewrite_shard(
    source: Path, shard: Shard, target: Path, added: Mapping[str, Tensor], dropped: Collection[str]
) -> None:
    """Writes a safetensors file with other tensors instead of some; the data of all others is copied.

    Args:
        source: the file.
        shard: its header.
        target: the new file.
        added: new tensors, which come first.
        dropped: names of the tensors that are left out.
    """
    kept = sorted((one for one in shard.tensors.items() if one[0] not in dropped), key=lambda one: one[1].start)
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    at = 0
    for name, tensor in added.items():
        entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        header[name], at = entry, at + tensor.nbytes
    for name, held in kept:
        end = at + held.end - held.start
        header[name], at = {"dtype": held.dtype, "shape": list(held.shape), "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(target) as (temporary,), source.open("rb") as old, temporary.open("wb") as new:
        new.write(struct.pack("<Q", len(text)) + text)
        for tensor in added.values():
            new.write(tensor_bytes(tensor))
        for _, held in kept:
            old.seek(held.start)
            remaining = held.end - held.start
            while remaining and (part := old.read(min(remaining, shutil.COPY_BUFSIZE))):  # type: ignore[attr-defined]
                new.write(part)
                remaining -= len(part)


def _check_others(model: PreTrainedModel, base: Checkpoint, edited: Collection[str]) -> None:
    """Raises UnlikeBaseError if a tensor that no edit changed differs from the one of the same name on disk."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        plain = isinstance(tensor, Tensor) and not hasattr(tensor, "__tensor_flatten__") and not tensor.is_meta
        if name in edited or not plain or name not in base.file_of:
            continue
        held, present = base.read(name), tensor.detach()
        if (held.shape, held.dtype) != (present.shape, present.dtype):
            continue
        if not same_bits(held.to(present.device), present.as_subclass(Tensor)):
            raise UnlikeBaseError(f"{name} differs, although no edit changed it")


def _update_index(
    base: Checkpoint, folder: Path, added: Mapping[str, Mapping[str, Tensor]], dropped: Mapping[str, Collection[str]]
) -> None:
    for index in folder.glob("*.safetensors.index.json"):
        held = read_json(index, "the index of a checkpoint")
        places = held["weight_map"]
        size = 0
        for name, keys in dropped.items():
            for key in keys:
                places.pop(key, None)
                entry = base.shards[name].tensors[key]
                size -= entry.end - entry.start
        for name, tensors in added.items():
            places.update(dict.fromkeys(tensors, name))
            size += sum(tensor.nbytes for tensor in tensors.values())
        if isinstance(held.get("metadata"), dict) and "total_size" in held["metadata"]:
            held["metadata"]["total_size"] += size
        index.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _list_as_ordinary(config: Path, model: PreTrainedModel, names: list[str], field: str) -> None:
    """Adds modules to those that the config lists as not quantized."""
    held = read_json(config, "the config of a model")
    quantization = held["quantization_config"]
    known = quantization.get(field)
    if known is None:  # a list replaces the modules that transformers leaves out by itself
        head = model.get_output_embeddings()
        known = [name for name, module in model.named_modules() if module is head]
    quantization[field] = [*known, *(name for name in names if name not in known)]
    config.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
