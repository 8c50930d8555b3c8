"""Loads the model and tokenizer of a checkpoint, and checks beforehand whether they can be loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.models.gguf_files import SUFFIX, check_gguf, is_gguf

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CONFIG_OPTIONS = ("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only")
"""Options of `from_pretrained` that also apply to the config and the tokenizer."""

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_OTHER_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
"""Names of dtypes in other tools."""

_TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "*.model", "tekken.json")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_PADDING = 1024  # embeddings are padded to a multiple of at most this number
_MOST_RENAMED = 0.05  # fraction of tokens that differ between versions of one tokenizer, such as reserved ones

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
        ModelError: the model is an encoder-decoder model.

    Example:
        >>> from rlsedit_fast.models import load_model
        >>> from rlsedit_fast.world import MODEL_DIR
        >>> model, tokenizer = load_model(str(MODEL_DIR), dtype="float32")
        >>> model.dtype
        torch.float32
    """
    from transformers import AutoModelForCausalLM

    for name in ("dtype", "torch_dtype"):
        check_dtype(options.get(name))
    check_device(device)
    shared = {option: options[option] for option in _CONFIG_OPTIONS if option in options}
    if "gguf_file" in options:
        path = _gguf_path(path, options.pop("gguf_file"), shared)
    if "config" not in options:
        load_config(path, **shared)
    if device == "auto":
        options["device_map"] = device
    if tokenizer is None:
        tokenizer = load_tokenizer(path, **shared)  # first, because it is loaded faster
    try:
        model: Any = (
            _load_gguf(path, options) if is_gguf(path) else AutoModelForCausalLM.from_pretrained(path, **options)
        )
    except _FAILURES as error:
        raise _not_loaded(path, error, options) from error
    if device and device != "auto":
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r} cannot be used: {error}") from error
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
        if not is_gguf(path):
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
            return found
        with _alone(path) as (folder, name):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except _FAILURES as error:
        raise _not_loaded(path, error, options) from error
    tokenizer.name_or_path = str(path)
    return tokenizer


def _load_gguf(path: str | Path, options: dict[str, Any]) -> Any:
    """Loads a GGUF file as an ordinary model, which `save_pretrained` accepts."""
    from transformers import AutoModelForCausalLM

    kept = {option: value for option, value in options.items() if option not in _CONFIG_OPTIONS}
    kept = {"config": _gguf_config(path), **_dequantized(), **kept}
    with _alone(path) as (folder, name), _bars_as_set():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **kept)
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.name_or_path = model.config._name_or_path = str(path)
    return model


@contextmanager
def _alone(path: str | Path) -> Iterator[tuple[str, str]]:
    """Provides a folder that contains only this GGUF file: transformers also reads configs that lie beside it.

    The name in the folder is new, because transformers prefers a file of this name in the working directory.
    """
    with TemporaryDirectory(prefix="rlsedit-gguf-") as folder:
        link = Path(folder, f"{Path(folder).name}{SUFFIX}")
        link.symlink_to(Path(path).resolve())
        yield folder, link.name


@contextmanager
def _bars_as_set() -> Iterator[None]:
    """Hides the bar of dequantization while the bars of transformers are disabled, which it does not regard itself."""
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging

    held = getattr(reading, "tqdm", None)
    if held is None or logging.is_progress_bar_enabled():
        yield
        return
    reading.tqdm = partial(held, disable=True)
    try:
        yield
    finally:
        reading.tqdm = held


def _dequantized() -> dict[str, Any]:
    """Returns the option that unpacks the weights, for versions of transformers that may leave them in blocks."""
    from transformers.utils import quantization_config

    made = getattr(quantization_config, "GgufConfig", None)
    return {} if made is None else {"quantization_config": made(dequantize=True)}


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
    place = Path(path)
    if not place.exists():
        raise InputError(f"model {str(path)!r}: the file does not exist; pass a GGUF file or a checkpoint folder")
    check_gguf(path)
    try:
        about = place.stat()
        config = copy.deepcopy(_read_gguf_config(place.resolve(), about.st_mtime_ns, about.st_size))
    except _FAILURES as error:
        raise _not_loaded(path, error, {}) from error
    check_config(config)
    return config


@lru_cache(maxsize=4)
def _read_gguf_config(path: Path, _time: int, _size: int) -> PretrainedConfig:
    """Reads the config of a GGUF file once: transformers takes seconds to read the vocabulary."""
    from transformers import AutoConfig

    with _alone(path) as (folder, name):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=name)
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
    from transformers import AutoConfig, AutoModelForCausalLM

    check_dtype(dtype)
    try:
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        check_config(config)
        own = getattr(config, "dtype", None) or torch.float32
        wanted = getattr(torch, dtype) if dtype not in (None, "auto") else own
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
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


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks whether a tokenizer belongs to a model, without network access.

    Its size and its special tokens are compared with the model and, if the tokenizer of the checkpoint is on this
    machine, its tokens with those. Padded and resized embeddings, added tokens and another end-of-text token of a chat
    model are accepted.

    Args:
        model: causal language model.
        tokenizer: the tokenizer to check.

    Raises:
        InputError: the tokenizer is that of another model.

    Example:
        >>> from rlsedit_fast.models.loading import check_tokenizer
        >>> from rlsedit_fast.world import load_demo_model
        >>> check_tokenizer(*load_demo_model())
    """
    rows = int(model.get_input_embeddings().get_parameter("weight").shape[0])
    # vocab_size does not count tokens that a user added, which edits may not use.
    size = tokenizer.vocab_size
    if reason := _other_size(size, max(size, _length(tokenizer)), rows) or _other_ends(model, tokenizer):
        raise _other_tokenizer(model, reason)
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name or str(getattr(tokenizer, "name_or_path", "")) == name:
        return
    own = _own_tokenizer(name)
    if own is not None and (differing := _differing(own.get_vocab(), tokenizer.get_vocab())):
        raise _other_tokenizer(model, f"{differing} tokens have other ids than in the tokenizer of {name!r}")


def _length(tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else 0


def _other_size(size: int, length: int, rows: int) -> str:
    """Returns how the size of a tokenizer contradicts the number of embeddings, or an empty string."""
    if size > rows:
        return f"the tokenizer has {size} tokens and the model {rows} embeddings"
    if rows > 2 * length + _PADDING:
        return f"the tokenizer has only {length} tokens and the model {rows} embeddings"
    return ""


def _other_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns how the ids of the first and last token of a text contradict the config, or an empty string.

    One of them may differ, as the end of a text in chat models. Defaults of the class of the config do not count.
    """
    config, differing = model.config.get_text_config(), list[str]()
    try:
        default = type(config)()
    except Exception:  # a config of other code that requires arguments
        return ""
    for name in ("bos_token_id", "eos_token_id"):
        given, own = getattr(config, name, None), getattr(tokenizer, name, None)
        ids = given if isinstance(given, list) else [given]
        if None in (given, own) or given == getattr(default, name, None) or own in ids:
            return ""
        differing.append(f"{name} {own} in the tokenizer and {given} in the model")
    return ", ".join(differing)


def _own_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a checkpoint that is on this machine, or None."""
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # no tokenizer, or one that needs code of the checkpoint
        return None
    return found


def _differing(own: Mapping[str, int], given: Mapping[str, int]) -> int:
    """Returns the number of tokens with other ids, or without one, if there are too many for the same tokenizer."""
    both = [token for token in own if token in given]
    differing = sum(own[token] != given[token] for token in both)
    lacking = min(len(own), len(given)) - len(both)
    allowed = _MOST_RENAMED * min(len(own), len(given))
    return differing + lacking if differing + lacking > allowed else 0


def _other_tokenizer(model: PreTrainedModel, reason: str) -> InputError:
    named = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return InputError(
        f"the tokenizer is not that of the model {named!r}: {reason}; pass the tokenizer of the model, such as "
        "AutoTokenizer.from_pretrained with the same path"
    )


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
