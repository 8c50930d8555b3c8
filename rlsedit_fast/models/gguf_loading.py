"""Loads the model, the config and the tokenizer of a GGUF file with transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rlsedit_fast.models.gguf_files import SUFFIX

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(path: str | Path, options: Mapping[str, Any]) -> PreTrainedModel:
    """Loads a GGUF file as an ordinary model, with dequantized weights, which `save_pretrained` accepts.

    Args:
        path: the file.
        options: options of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model.
    """
    from transformers import AutoModelForCausalLM

    kept = {"config": load_gguf_config(path), **_dequantized(), **options}
    with _alone(path) as (folder, name), _bars_as_set():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **kept)
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.name_or_path = model.config._name_or_path = str(path)
    found: PreTrainedModel = model
    return found


def load_gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a GGUF file."""
    from transformers import AutoTokenizer

    with _alone(path) as (folder, name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.name_or_path = str(path)
    return tokenizer


def load_gguf_config(path: str | Path) -> PretrainedConfig:
    """Loads the config of a GGUF file."""
    place = Path(path)
    about = place.stat()
    return copy.deepcopy(_read_config(place.resolve(), about.st_mtime_ns, about.st_size))


@lru_cache(maxsize=4)
def _read_config(path: Path, _time: int, _size: int) -> PretrainedConfig:
    """Reads the config of a GGUF file once: transformers takes seconds to read the vocabulary."""
    from transformers import AutoConfig

    with _alone(path) as (folder, name):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file=name)
        return config


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
