"""Works around errors of transformers in the forward of models."""

from __future__ import annotations

from typing import Any

from torch import nn


def repair_forward(model: nn.Module) -> None:
    """Lets a forward pass of Llama 4 with its vision model finish.

    In transformers 5.24 the forward of `Llama4ForConditionalGeneration` reads `image_outputs` from the output of its
    language model, whose class does not have it. The model is not modified in other versions.

    Args:
        model: any model.
    """
    inner = getattr(model, "language_model", None)
    if type(model).__name__ != "Llama4ForConditionalGeneration" or not isinstance(inner, nn.Module):
        return
    if _add_image_outputs not in inner._forward_hooks.values():
        inner.register_forward_hook(_add_image_outputs)


def _add_image_outputs(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    if not isinstance(output, tuple) and not hasattr(output, "image_outputs"):
        output.image_outputs = None
    return output
