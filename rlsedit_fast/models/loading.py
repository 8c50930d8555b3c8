"""Loads the model and tokenizer of a checkpoint, and checks beforehand whether they can be loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.models.classes import from_config, whole_model_class
from rlsedit_fast.models.gguf_files import check_gguf, is_gguf
from rlsedit_fast.models.gguf_loading import load_gguf, load_gguf_config, load_gguf_tokenizer
from rlsedit_fast.models.repairs import repair_forward

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CONFIG_OPTIONS = ("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only")
"""Options of `from_pretrained` that also apply to the config and the tokenizer."""

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_OTHER_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
"""Names of dtypes in other tools."""

_TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "*.model", "tekken.json")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# torch without CUDA raises AssertionError, a damaged file SafetensorError.
_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, AssertionError, SafetensorError)


def load_model(
    path: str | Path,
    *,
    device: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode and its tokenizer.

    The class is the one that the config names in `architectures`, so a multimodal model is loaded with all of its
    parts; see `models.classes`. `model.name_or_path` is the given path, and `model.config._commit_hash` the revision of
    a model from the Hub.

    Args:
        path: folder or model name, as for `AutoModelForCausalLM.from_pretrained`; or a GGUF file, whose weights are
            dequantized.
        device: device of the model; `auto` uses all devices (requires accelerate), None that of `from_pretrained`.
        tokenizer: the tokenizer, if it is already loaded; see `load_tokenizer`.
        **options: options of `AutoModelForCausalLM.from_pretrained`, such as `dtype`. `revision`,
            `trust_remote_code`, `token`, `subfolder`, `cache_dir` and `local_files_only` are also passed to the
            tokenizer.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: the model cannot be loaded or moved to the device.
        ModelError: the model is no language model, or an encoder-decoder model.

    Example:
        >>> from rlsedit_fast.models import load_model
        >>> from rlsedit_fast.world import MODEL_DIR
        >>> model, tokenizer = load_model(str(MODEL_DIR), dtype="float32")
        >>> model.dtype
        torch.float32
    """
    for name in ("dtype", "torch_dtype"):
        check_dtype(options.get(name))
    check_device(device)
    shared = {option: options[option] for option in _CONFIG_OPTIONS if option in options}
    if "gguf_file" in options:
        path = _gguf_path(path, options.pop("gguf_file"), shared)
    config = options.get("config") or load_config(path, **shared)
    if device == "auto":
        options["device_map"] = device
    if tokenizer is None:
        tokenizer = load_tokenizer(path, **shared)  # first, because it is loaded faster
    try:
        if is_gguf(path):
            kept = {option: value for option, value in options.items() if option not in _CONFIG_OPTIONS}
            model: Any = load_gguf(path, kept)
        else:
            found = whole_model_class(config, trust_remote_code=bool(options.get("trust_remote_code")))
            model = found.from_pretrained(path, **options)
    except ModelError:
        raise
    except _FAILURES as error:
        raise _not_loaded(path, error, options) from error
    if device and device != "auto":
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r} cannot be used: {error}") from error
    repair_forward(model)
    return model.eval(), tokenizer


def load_tokenizer(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Args:
        path: folder or model name, as for `AutoTokenizer.from_pretrained`; or a GGUF file.
        **options: options of `AutoTokenizer.from_pretrained`.

    Returns:
        The tokenizer.

    Raises:
        InputError: the tokenizer cannot be loaded.

    Example:
        >>> from rlsedit_fast.models.loading import load_tokenizer
        >>> from rlsedit_fast.world import MODEL_DIR
        >>> load_tokenizer(MODEL_DIR).bos_token
        '<s>'
    """
    from transformers import AutoTokenizer

    try:
        if is_gguf(path):
            return load_gguf_tokenizer(path)
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
        return found
    except _FAILURES as error:
        if not is_gguf(path) and (inner := _tokenizer_of_processor(path, options)) is not None:
            return inner
        raise _not_loaded(path, error, options) from error


def _tokenizer_of_processor(path: str | Path, options: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a multimodal processor, or None; some checkpoints have no other."""
    from transformers import AutoProcessor

    with suppress(*_FAILURES, AttributeError, TypeError):
        inner: PreTrainedTokenizerBase | None = AutoProcessor.from_pretrained(path, **options).tokenizer
        return inner
    return None


def _gguf_path(path: str | Path, name: str, shared: dict[str, Any]) -> Path:
    """Returns the path of a GGUF file of a folder or of a repository on the Hub, which is downloaded if necessary."""
    from transformers.utils.hub import cached_file

    if Path(path).is_dir():
        return Path(path, shared.get("subfolder", ""), name)
    try:
        return Path(str(cached_file(str(path), name, **{k: v for k, v in shared.items() if k != "trust_remote_code"})))
    except _FAILURES as error:
        raise _not_loaded(path, error, shared) from error


def load_config(path: str | Path, **options: Any) -> PretrainedConfig:
    """Loads the config of a model, to check it before the weights are loaded.

    Args:
        path: folder or model name, as for `AutoConfig.from_pretrained`; or a GGUF file.
        **options: options of `AutoConfig.from_pretrained`.

    Returns:
        The config.

    Raises:
        InputError: the folder does not exist, lacks `config.json` or tokenizer files, or the config cannot be loaded;
            or see `gguf_files.check_gguf`.
        ModelError: the model is an encoder-decoder model, or see `gguf_files.check_gguf`.

    Example:
        >>> from rlsedit_fast.models.loading import load_config
        >>> from rlsedit_fast.world import MODEL_DIR
        >>> load_config(MODEL_DIR).num_hidden_layers
        4
    """
    from transformers import AutoConfig

    name, folder = str(path), Path(path)
    if is_gguf(path):
        return _gguf_config(path)
    if not _HUB_NAME.fullmatch(name) and not folder.exists():
        advice = _similar(folder) or "; pass a checkpoint folder or a name on the Hub"
        raise InputError(f"model {name!r}: the folder does not exist{advice}")
    if folder.is_file():
        raise InputError(
            f"model {name!r} is a file; pass the folder of the checkpoint, which contains config.json, or a GGUF file"
        )
    if folder.is_dir() and not options.get("subfolder"):
        _check_folder(folder)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, **options)
    except _FAILURES as error:
        raise _not_loaded(path, error, options) from error
    check_config(config)
    return config


def _gguf_config(path: str | Path) -> PretrainedConfig:
    if not Path(path).exists():
        raise InputError(f"model {str(path)!r}: the file does not exist; pass a GGUF file or a checkpoint folder")
    check_gguf(path)
    try:
        config = load_gguf_config(path)
    except _FAILURES as error:
        raise _not_loaded(path, error, {}) from error
    check_config(config)
    return config


def empty_model(path: str | Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Creates a model from its config on the meta device: it has shapes and no values, and takes no memory.

    Args:
        path: folder with `config.json`.
        dtype: dtype of the weights; None or `auto`: that of the config, otherwise float32.
        trust_remote_code: as for `AutoModelForCausalLM.from_config`.

    Returns:
        The model.

    Raises:
        InputError: the config cannot be loaded.
        ModelError: the model is an encoder-decoder model.

    Example:
        >>> from rlsedit_fast.models.loading import empty_model
        >>> from rlsedit_fast.world import MODEL_DIR
        >>> empty_model(MODEL_DIR).device
        device(type='meta')
    """
    from transformers import AutoConfig

    check_dtype(dtype)
    try:
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        check_config(config)
        own = getattr(config, "dtype", None) or torch.float32
        wanted = getattr(torch, dtype) if dtype not in (None, "auto") else own
        found = whole_model_class(config, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: Any = from_config(found, config, dtype=wanted, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except _FAILURES as error:
        raise _not_loaded(path, error, {}) from error
    return model


def check_config(config: object) -> None:
    """Raises ModelError for the config of an encoder-decoder model."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{getattr(config, 'model_type', 'the model')}: encoder-decoder models are not supported; pass a "
            "decoder-only model, such as those that AutoModelForCausalLM loads"
        )


def max_tokens(config: PretrainedConfig) -> int | None:
    """Returns the maximum number of tokens of a model, or None if there is no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_dtype(dtype: object) -> None:
    """Raises InputError unless a dtype is None, a dtype of torch, or a name of one of the supported dtypes."""
    if dtype is None or isinstance(dtype, torch.dtype | Mapping) or dtype in _DTYPES:
        return
    if isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype) and dtype not in _OTHER_DTYPES:
        return
    known = ", ".join(_DTYPES)
    near = [_OTHER_DTYPES.get(str(dtype).lower(), ""), *get_close_matches(str(dtype).lower(), _DTYPES, n=1)]
    meant = next((f"; did you mean {one}?" for one in near if one), "")
    raise InputError(f"dtype {dtype!r}: expected one of {known}{meant}")


def check_device(device: object) -> None:
    """Raises InputError for a device that this machine does not have; `auto` and None are accepted."""
    if device is None:
        return
    if device == "auto":
        if find_spec("accelerate") is None:
            raise InputError("device 'auto' requires accelerate; run `pip install accelerate`, or pass one device")
        return
    try:
        found = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r} is unknown; expected cpu, cuda, cuda:1, mps or auto") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise InputError(
                f"device {str(device)!r}: PyTorch finds no CUDA device on this machine; use cpu, or install a build of "
                "PyTorch with CUDA. `rlsedit doctor` shows what was found"
            )
        if found.index is not None and found.index >= count:
            raise InputError(f"device {str(device)!r} does not exist; the devices are cuda:0 to cuda:{count - 1}")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not available on this machine; use cpu")


def _check_folder(folder: Path) -> None:
    """Raises InputError for a folder that does not contain a model and a tokenizer."""
    present = {path.name for path in folder.iterdir()}
    what = f"model {str(folder)!r}"
    if "config.json" not in present:
        if "adapter_config.json" in present:
            raise InputError(
                f"{what}: the folder contains an adapter, not a model; merge it into its base model "
                "(merge_and_unload of peft) and save that"
            )
        inner = sorted(one.parent.name for one in folder.glob("*/config.json"))
        raise InputError(
            f"{what}: the folder has no config.json, so it is not a checkpoint; pass the folder that "
            f"save_pretrained wrote{f', such as {str(folder / inner[0])!r}' if inner else ''}"
        )
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise InputError(
            f"{what}: the folder has no tokenizer files, such as tokenizer.json; save the tokenizer there with "
            "tokenizer.save_pretrained(folder)"
        )


def _similar(folder: Path) -> str:
    """Returns the suggestion of a folder with a similar name beside `folder`."""
    names: list[str] = []
    with suppress(OSError):
        names = [one.name for one in folder.absolute().parent.iterdir() if (one / "config.json").exists()]
    near = get_close_matches(folder.name, names, n=1, cutoff=0.75)
    return f"; did you mean {str(folder.with_name(near[0]))!r}?" if near else ""


def _not_loaded(path: str | Path, error: BaseException, options: Mapping[str, Any]) -> InputError:
    """Returns the error for a model that transformers cannot load, with its reason last."""
    reason = str(error) if not isinstance(error, KeyError) else f"unknown name {error}"
    if Path(path).exists():
        return InputError(f"model {str(path)!r} cannot be loaded: {reason}")
    advice = "check the name and the network connection, or pass the folder of a checkpoint"
    if options.get("local_files_only"):
        advice = "it is not in the local cache; omit local_files_only, or pass the folder of a checkpoint"
    return InputError(
        f"model {str(path)!r}: there is no such folder, and no model of this name could be downloaded from the Hugging "
        f"Face Hub{_similar(Path(path))}; {advice}. Reason: {reason}"
    )
