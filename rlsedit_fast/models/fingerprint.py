"""Which model this is: a digest of its weights and of the settings its forward pass reads, never of a name or path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 1 << 16
"""Words of 32 bits to a pair of sums; part of the digest's definition."""
_BLOCKS_AT_ONCE = 8
"""Blocks to a kernel call, 4 MiB as int64; no part of the definition."""

_BOOKKEEPING = frozenset(
    """architectures auto_map chunk_size_feed_forward classifier_dropout dtype finetuning_task id2label
    initializer_range label2id num_labels prefix problem_type return_dict tokenizer_class torch_dtype torchscript
    task_specific_params transformers_version head_dim num_experts num_local_experts""".split()
)
"""What no forward pass reads; the last three are told by the weights' shapes, and named variously by versions."""


def fingerprint(model: PreTrainedModel, *, instead: Mapping[str, Tensor] | None = None) -> str:
    """Identifies a model by its weights and settings, on whatever device it lies and from wherever it was loaded.

    SHA-256 over its settings and over name, shape, dtype and checksum of every parameter and persistent buffer. Any
    single bit, and any exchange of two entries, changes it. It costs one read of the weights, on their own devices.

    Args:
        model: with all of its weights in memory.
        instead: parameters to put in the place of the model's own, by name: what an edited model was before.

    Returns:
        64 hexadecimal digits.

    Raises:
        ModelError: a weight is on the meta device, that is offloaded or not loaded yet; or `instead` names a parameter
            that the model does not have.
    """
    digest = hashlib.sha256(json.dumps(settings(model.config.to_dict()), sort_keys=True, default=str).encode())
    weights = _weights(model)
    if unknown := sorted(set(instead or {}) - weights.keys()):
        raise ModelError(f"instead names {unknown}, which the model does not have; give its parameters' names")
    for name, tensor in sorted((weights | dict(instead or {})).items()):
        if tensor.is_meta:
            raise ModelError(f"{name} is on the meta device: its values are not in memory; load the model whole")
        digest.update(f"\n{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(checksum(tensor))
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and the buffers that checkpoints hold; tied ones once. The head's name is no part of the model."""
    head = model.get_output_embeddings()
    own = {id(parameter): f"head.{name}" for name, parameter in head.named_parameters()} if head is not None else {}
    passing = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    parameters = {own.get(id(parameter), name): parameter.detach() for name, parameter in model.named_parameters()}
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name not in passing}


def checksum(tensor: Tensor) -> bytes:
    """Two int64 per block of the tensor's bits, in row-major order: the sum of its words, and a weighted sum.

    Integers wrap alike everywhere, so the sums are the same in whatever order a device adds. Words count at most 2^31
    and the weights of a block are distinct numbers below 2^32: two entries exchanged cannot leave it as it was.
    """
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone()  # words must start at a multiple of their size
    held = flat.view(torch.uint8)
    whole = held.numel() // (4 * _BLOCK) * (4 * _BLOCK)
    blocks = held[:whole].view(torch.int32).view(-1, _BLOCK)
    weights = _block_weights(held.device)
    sums = [_sums(part, weights) for part in blocks.split(_BLOCKS_AT_ONCE)] if whole else []
    if rest := held.numel() - whole:
        last = held.new_zeros(4 * _BLOCK)
        last[:rest] = held[whole:]
        sums.append(_sums(last.view(torch.int32)[None], weights))
    return torch.cat(sums).cpu().numpy().astype("<i8").tobytes() if sums else b""


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's `checksum`, in hexadecimal."""
    return hashlib.sha256(checksum(tensor)).hexdigest()


def _sums(blocks: Tensor, weights: Tensor) -> Tensor:
    words = blocks.long()
    plain = words.sum(1)
    return torch.stack([plain, words.mul_(weights).sum(1)], dim=1)


@cache
def _block_weights(device: torch.device) -> Tensor:
    """The numbers below 2^16 scattered over those below 2^32, one to one: rows of a pattern do not cancel."""
    places = torch.arange(_BLOCK, device=device)
    for odd in (0x7FEB352D, 0x846CA68B):  # multiplying by an odd number and folding are both invertible in 32 bits
        places = places.mul_(odd).bitwise_and_(0xFFFFFFFF)
        places ^= places >> 15
    return places


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration's `to_dict()` a forward pass reads, written alike by transformers 4.56 to 5.24.

    Left out are names and paths, generation and training settings, and whatever is off (None, false, 0, empty), for
    versions differ in what they list. Rotary settings are brought into the form of version 5.
    """
    return _rotary_as_in_5(_read_by_forward(config))


def _read_by_forward(config: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in config.items():
        if name in _BOOKKEEPING or name in _generation_settings() or name.startswith(("_", "summary_")):
            continue
        if "dropout" in name or name.endswith("pdrop") or (name == "layer_types" and set(value) == {"full_attention"}):
            continue
        if isinstance(value, dict):
            value = settings(value) if name.endswith("_config") else _read_by_forward(value)
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        elif isinstance(value, torch.dtype):
            value = str(value)
        if value:
            kept[name] = value
    return kept


def _rotary_as_in_5(kept: dict[str, Any]) -> dict[str, Any]:
    theta = [kept.pop(name, None) for name in ("rope_theta", "rotary_emb_base")]
    share = [kept.pop(name, None) for name in ("partial_rotary_factor", "rotary_pct")]
    local = kept.pop("rope_local_base_freq", None)
    named = [kept.pop(name, None) for name in ("rope_parameters", "rope_scaling")]
    given = {"rope_theta": theta[0] or theta[1], "partial_rotary_factor": share[0] or share[1]}
    rope = {name: value for name, value in given.items() if value} | (named[0] or named[1] or {})
    if not rope:
        return kept
    if not any(isinstance(value, dict) for value in rope.values()):
        rope = {"rope_type": "default"} | rope
        if "type" in rope:  # the older name of the same
            older = rope.pop("type")
            rope["rope_type"] = older if rope["rope_type"] == "default" else rope["rope_type"]
    if local:
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return kept | {"rope": rope}


@cache
def _generation_settings() -> frozenset[str]:
    from transformers import GenerationConfig

    return frozenset(vars(GenerationConfig()))
