"""Loads the model and tokenizer of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rlsedit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    path: str, *, dtype: str, device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode and its tokenizer; a folder is loaded from local files only.

    Args:
        path: folder or model name, see `from_pretrained` of transformers.
        dtype: dtype of the weights, or `auto` for that of the checkpoint.
        device: device of the model; `auto` uses all devices (requires accelerate), None the CPU.
        trust_remote_code: whether to run code from the checkpoint.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: the model cannot be loaded or moved to the device.

    Example:
        >>> from rlsedit_fast.models import load_model
        >>> from rlsedit_fast.world import MODEL_DIR
        >>> model, tokenizer = load_model(str(MODEL_DIR), dtype="float32")
        >>> model.dtype
        torch.float32
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    remote = {"trust_remote_code": True} if trust_remote_code else {}
    where = {"device_map": device} if device == "auto" else {}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **where, **remote)
        tokenizer = AutoTokenizer.from_pretrained(path, **remote)
        if device and device != "auto":
            model = model.to(device)
    # torch without CUDA raises AssertionError, a damaged file SafetensorError.
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError, SafetensorError) as error:
        raise InputError(f"model {path!r} cannot be loaded: {error}") from error
    return model.eval(), tokenizer
