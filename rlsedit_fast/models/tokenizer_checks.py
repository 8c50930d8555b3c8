"""Checks whether a tokenizer belongs to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlsedit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PADDING = 1024  # embeddings are padded to a multiple of at most this number
_MOST_RENAMED = 0.05  # fraction of tokens that differ between versions of one tokenizer, such as reserved ones


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
        >>> from rlsedit_fast.models.tokenizer_checks import check_tokenizer
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
