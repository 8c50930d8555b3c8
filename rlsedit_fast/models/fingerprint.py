"""Fingerprints a model by its weights and the config values that its forward pass reads, not by name or path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.compiled import unwrapped
from rlsedit_fast.models.quantized import decompress, dequantized_modules
from rlsedit_fast.models.shards import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 1 << 16
"""32-bit words per pair of sums; part of the definition of the digest."""
_BLOCKS_AT_ONCE = 8
"""Blocks per kernel call (4 MiB as int64); not part of the definition."""

_BOOKKEEPING = frozenset(
    """architectures auto_map chunk_size_feed_forward classifier_dropout distributed_config dtype finetuning_task
    id2label initializer_range label2id num_labels prefix problem_type return_dict tokenizer_class torch_dtype
    torchscript task_specific_params transformers_version head_dim num_experts num_local_experts""".split()
)
"""Config values that no forward pass reads. The last three follow from the shapes of the weights, and their names
differ between versions."""


def fingerprint(model: PreTrainedModel, *, instead: Mapping[str, Tensor] | None = None) -> str:
    """Identifies a model by its weights and config, independent of its device and path.

    The fingerprint is the SHA-256 of the config and of the name, shape, dtype and checksum of every parameter and
    persistent buffer. It changes if a single bit changes or two entries are swapped. The weights are read once, on
    their own devices. Processes that divide a model compute it together, and it is that of the whole model.

    Args:
        model: model with all weights in memory.
        instead: parameters that replace those of the model, by name, such as the original weights of an edited model.

    Returns:
        64 hexadecimal digits.

    Raises:
        ModelError: a weight is on the meta device (offloaded or not loaded), or `instead` has an unknown parameter.

    Example:
        >>> import torch
        >>> from rlsedit_fast.models import fingerprint
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, _ = load_demo_model()
        >>> base = fingerprint(model)
        >>> len(base)
        64
        >>> with torch.no_grad():
        ...     _ = model.model.layers[0].mlp.down_proj.weight[0, 0].add_(1e-3)
        >>> fingerprint(model) == base
        False
    """
    model = unwrapped(model)
    decompress(model)
    digest = hashlib.sha256(json.dumps(settings(model.config.to_dict()), sort_keys=True, default=str).encode())
    weights, given = _weights(model), dict(instead or {})
    for name, module in dequantized_modules(model).items():  # count as the quantized module
        given.pop(f"{name}.weight", None)
        for own in [one for one in weights if one.rpartition(".")[0] == name]:
            del weights[own]
        weights |= {f"{name}.{own}": tensor.detach() for own, tensor in module.quantized[0].named_parameters()}
    if unknown := sorted(given.keys() - weights.keys()):
        raise ModelError(f"instead has unknown parameters {unknown}; expected names of parameters of the model")
    for name, tensor in sorted((weights | given).items()):
        if tensor.is_meta:
            raise ModelError(f"{name} is on the meta device, so its values are not in memory; load the whole model")
        digest.update(f"\n{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        for part in _parts(whole(tensor)):
            digest.update(checksum(part))
    return digest.hexdigest()


def _parts(tensor: Any) -> Iterator[Tensor]:
    """Yields a tensor, or the plain tensors that a quantized one consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def identify(model: PreTrainedModel, found: str) -> str:
    """Describes a model in a message, by its path or class and the first digits of its fingerprint `found`."""
    path = str(getattr(model.config, "_name_or_path", "") or "")
    return f"{path!r} (fingerprint {found[:12]})" if path else f"{type(model).__name__} (fingerprint {found[:12]})"


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers, tied ones once. The name of the head is normalized."""
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
    """Returns two int64 per block of the tensor's bits in row-major order: the sum of its words and a weighted sum.

    Integer overflow wraps, so the sums do not depend on the order of summation. The words are int32 and the weights of
    a block are distinct numbers below 2^32, so swapping two entries changes the checksum.

    Args:
        tensor: tensor of any shape, dtype and device.

    Returns:
        16 bytes per block of 256 KiB, little-endian; empty for an empty tensor.
    """
    flat = tensor.detach().contiguous().flatten()
    if flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone()  # words must be aligned
    data = flat.view(torch.uint8)
    whole = data.numel() // (4 * _BLOCK) * (4 * _BLOCK)
    blocks = data[:whole].view(torch.int32).view(-1, _BLOCK)
    weights = _block_weights(data.device)
    sums = [_sums(part, weights) for part in blocks.split(_BLOCKS_AT_ONCE)] if whole else []
    if rest := data.numel() - whole:
        last = data.new_zeros(4 * _BLOCK)
        last[:rest] = data[whole:]
        sums.append(_sums(last.view(torch.int32)[None], weights))
    return torch.cat(sums).cpu().numpy().astype("<i8").tobytes() if sums else b""


def digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's `checksum`, in hexadecimal."""
    return hashlib.sha256(checksum(tensor)).hexdigest()


def _sums(blocks: Tensor, weights: Tensor) -> Tensor:
    words = blocks.long()
    plain = words.sum(1)
    return torch.stack([plain, words.mul_(weights).sum(1)], dim=1)


@cache
def _block_weights(device: torch.device) -> Tensor:
    """Returns 2^16 distinct pseudo-random 32-bit weights, so that regular patterns do not cancel."""
    places = torch.arange(_BLOCK, device=device)
    for odd in (0x7FEB352D, 0x846CA68B):  # both steps are invertible in 32 bits
        places = places.mul_(odd).bitwise_and_(0xFFFFFFFF)
        places ^= places >> 15
    return places


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a config's `to_dict()` that a forward pass reads, equal for transformers 4.56 to 5.24.

    Names, paths, generation and training values, and values that are off (None, false, 0, empty) are omitted, because
    versions differ in what they list. Rotary values are converted to the format of version 5.
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
        if "type" in rope:  # older name
            older = rope.pop("type")
            rope["rope_type"] = older if rope["rope_type"] == "default" else rope["rope_type"]
    if local:
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return kept | {"rope": rope}


@cache
def _generation_settings() -> frozenset[str]:
    from transformers import GenerationConfig

    return frozenset(vars(GenerationConfig()))
