"""Replaces single quantized linear modules by ordinary ones, so that they can be edited; the others stay quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlsedit_fast.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = "bitsandbytes (4 and 8 bit), torchao, compressed-tensors, fp8"


class DequantizedLinear(nn.Linear):
    """An ordinary linear module with the dequantized weight of a quantized one.

    Attributes:
        quantized: the quantized module, in a tuple, so that it is no part of the model.

    Example:
        >>> import torch
        >>> from rlsedit_fast.models.quantized import DequantizedLinear
        >>> DequantizedLinear(torch.nn.Linear(3, 2), torch.zeros(2, 3)).weight.shape
        torch.Size([2, 3])
    """

    quantized: tuple[nn.Module]

    def __init__(self, module: Any, weight: Tensor) -> None:
        bias = getattr(module, "bias", None)
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        self.quantized = (module,)
        self.train(module.training)


def dequantize_module(model: PreTrainedModel, name: str) -> nn.Module:
    """Replaces a quantized linear module of a model by an ordinary one; other modules are not changed.

    The weight is the one that the quantized module multiplies with, in the dtype of the model.

    Args:
        model: the model.
        name: dotted name of the module.

    Returns:
        The module of this name.

    Raises:
        ModelError: the module is quantized in a way that is not supported.
    """
    decompress(model)
    module = model.get_submodule(name)
    weight = _dequantized(name, module, quantization_of(model.config))
    if weight is None:
        return module
    dtype = model.dtype if model.dtype.is_floating_point else torch.bfloat16
    new = DequantizedLinear(module, weight.to(dtype).contiguous())
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return new


def decompress(model: nn.Module) -> None:
    """Decompresses a model of compressed-tensors, which otherwise happens in its first forward pass.

    Its parameters have other names and values afterwards, and its fingerprint must not depend on what ran before.

    Args:
        model: any model; others are not changed.
    """
    if hasattr(model, "ct_decompress_hook"):
        cast(Any, model).hf_quantizer.compressor.decompress_model(model)


def quantization_of(config: Any) -> str | None:
    """Returns the name of the quantization method of a config, such as `bitsandbytes`, or None."""
    held: Any = getattr(config, "quantization_config", None)
    if held is None:
        return None
    found = held.get("quant_method") if isinstance(held, dict) else getattr(held, "quant_method", None)
    return str(getattr(found, "value", found)) if found else "an unknown method"


def dequantized_modules(model: nn.Module) -> dict[str, DequantizedLinear]:
    """Returns the modules that `dequantize_module` replaced, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DequantizedLinear)}


def _unscaled(weight: Tensor, scale: Tensor, block: Sequence[int] | None) -> Tensor:
    """Returns an FP8 weight `[d_out, d_in]` times its scale, which is one number, or one for each block."""
    if block is None or scale.numel() == 1:
        return weight.float() * scale.float()
    whole = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * whole[: weight.shape[0], : weight.shape[1]]


def _dequantized(name: str, module: Any, method: str | None) -> Tensor | None:
    """Returns the weight of a quantized module, `[d_out, d_in]`, or None for an ordinary module."""
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    with torch.no_grad():
        if kind == "Linear4bit":
            from bitsandbytes.functional import dequantize_4bit

            if module.weight.quant_state is None:
                raise ModelError(f"{name} is not quantized yet; move the model to its device first")
            found: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
            return found
        if kind == "Linear8bitLt":
            codes = module.weight.data if module.weight.CB is None else module.weight.CB
            scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            return codes.float() * (scales.float() / 127.0)[:, None]
        if isinstance(module, nn.Linear) and type(weight).__module__.startswith("torchao."):
            found = weight.dequantize()  # type: ignore[union-attr]
            return found.detach()
        if hasattr(module, "quantization_scheme"):  # compressed-tensors
            return cast(Tensor, weight).detach()
        if kind == "FP8Linear":
            scaled: Any = module
            return _unscaled(scaled.weight, scaled.weight_scale_inv, scaled.block_size)
    if method is not None and type(module) is not nn.Linear and hasattr(module, "out_features"):
        raise ModelError(
            f"{name} is a {kind}, quantized with {method}; such a projection cannot be dequantized here. Supported: "
            f"{SUPPORTED}",
            hint="load the model without quantization, such as the checkpoint that it was quantized from, and quantize "
            "the edited model",
        )
    return None
