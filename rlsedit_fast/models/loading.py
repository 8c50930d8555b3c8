"""A checkpoint's model and tokenizer, or in words why they cannot be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rlsedit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    path: str, *, dtype: str, device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, from local files alone where `path` is a folder.

    Args:
        path: a folder or a name, as transformers' `from_pretrained` takes it.
        dtype: to load it in, or `auto` for the checkpoint's own.
        device: to load it onto; `auto` spreads it over all there are (accelerate); None leaves it on the CPU.
        trust_remote_code: whether code that comes with the checkpoint is run.

    Raises:
        InputError: it cannot be loaded, or put there; with the reason.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    remote = {"trust_remote_code": True} if trust_remote_code else {}
    where = {"device_map": device} if device == "auto" else {}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **where, **remote)
        tokenizer = AutoTokenizer.from_pretrained(path, **remote)
        if device and device != "auto":
            model = model.to(device)
    # A torch without CUDA asserts that it has it; a file that is not what its name says is safetensors' own error.
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError, SafetensorError) as error:
        raise InputError(f"model {path!r} cannot be loaded: {error}") from error
    return model.eval(), tokenizer
