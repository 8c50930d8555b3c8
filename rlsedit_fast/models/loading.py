"""Loads the model and tokenizer of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from rlsedit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_OPTIONS = ("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only")
"""Options of `from_pretrained` that also apply to the tokenizer."""


def load_model(
    path: str | Path, *, device: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode and its tokenizer.

    Args:
        path: folder or model name, as for `AutoModelForCausalLM.from_pretrained`.
        device: device of the model; `auto` uses all devices (requires accelerate), None that of `from_pretrained`.
        **options: options of `AutoModelForCausalLM.from_pretrained`, such as `dtype`. `revision`,
            `trust_remote_code`, `token`, `subfolder`, `cache_dir` and `local_files_only` are also passed to the
            tokenizer.

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

    name = str(path)
    # A name on the Hub has at most one slash, and starts with a letter or a digit.
    if (name.count("/") > 1 or name.startswith(("/", ".", "~"))) and not Path(name).exists():
        raise InputError(f"model {name!r}: the folder does not exist; pass a checkpoint folder or a name on the Hub")
    if device == "auto":
        options["device_map"] = device
    shared = {option: options[option] for option in _TOKENIZER_OPTIONS if option in options}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **shared)
    # torch without CUDA raises AssertionError, a damaged file SafetensorError.
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError, SafetensorError) as error:
        raise InputError(f"model {name!r} cannot be loaded: {error}") from error
    if device and device != "auto":
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r} cannot be used: {error}") from error
    return model.eval(), tokenizer
