"""Maps characters to tokens, for tokenizers with and without character offsets."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlsedit_fast.errors import RequestError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Span = tuple[int, int]

_BYTES = re.compile("(?:<0x[0-9A-F]{2}>)+")
_BLANK = "▁"  # as sentencepiece writes it
_ORDINARY = "a"  # ordinary text, to find the special tokens around it


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Returns the ids of a text to continue: with special tokens before it, without those after it such as EOS.

    Args:
        tokenizer: tokenizer of the model.
        text: the text.
        special: whether special tokens are added. They are never added to a text that starts with a special token, such
            as a rendered chat template, which contains all that the model expects.
    """
    if not special or starts_with_special(tokenizer, text):
        return _ids(tokenizer, text, special=False)
    if getattr(tokenizer, "is_fast", False) and (stop := _own_end(encoded := tokenizer(text))):
        return list(encoded["input_ids"][:stop])
    whole = _ids(tokenizer, text, special=True)
    plain = _ids(tokenizer, text, special=False)
    return whole[: _start(tokenizer, whole, plain) + len(plain)]


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the special tokens of a tokenizer as texts."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marked = (str(token) for token in added if getattr(token, "special", False))
    return [text for text in dict.fromkeys((*tokenizer.all_special_tokens, *marked)) if text]


def starts_with_special(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Returns whether a text starts with a special token, as a rendered chat template does."""
    # Most texts start with a letter; listing the special tokens takes longer than tokenizing a prompt.
    return not text[:1].isalnum() and text.startswith(tuple(special_texts(tokenizer)))


def locate(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int, *, special: bool = True
) -> tuple[list[int], list[int]]:
    """Finds the tokens of a span of characters.

    For a tokenizer without offsets, growing prefixes of the ids are decoded.

    Args:
        tokenizer: tokenizer of the model.
        text: the text.
        start: first character of the span.
        stop: end of the span, exclusive.
        special: see `token_ids`.

    Returns:
        The ids of `text` (see `token_ids`), and the indices of the tokens that overlap the span.

    Raises:
        RequestError: no token overlaps the span, or the ids do not decode to the text.
    """
    if getattr(tokenizer, "is_fast", False):
        special = special and not starts_with_special(tokenizer, text)
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        end = _own_end(encoded)
        ids = list(encoded["input_ids"][:end]) if end else token_ids(tokenizer, text, special=special)
        spans = list(encoded["offset_mapping"][: len(ids)])
    else:
        ids = token_ids(tokenizer, text, special=special)
        plain = _ids(tokenizer, text, special=False)
        spans = [(0, 0)] * (len(ids) - len(plain)) + _decoded_spans(tokenizer, plain, text, stop)
    inside = [i for i, (a, b) in enumerate(spans) if a < stop and b > start and b > a]
    if not inside:
        raise RequestError(f"the tokenizer has no token for {text[start:stop]!r} in {text!r}; use other words")
    # sentencepiece can add a token for a leading space, whose offsets cover the first character.
    while len(inside) > 1 and not str(tokenizer.convert_ids_to_tokens(ids[inside[0]])).strip(_BLANK):
        del inside[0]
    return ids, inside


def _own_end(encoded: BatchEncoding) -> int:
    """Returns the number of tokens up to the last token of the text, without special tokens after it; 0 if none."""
    own = [at for at, part in enumerate(encoded.sequence_ids()) if part is not None]
    return own[-1] + 1 if own else 0


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _start(tokenizer: PreTrainedTokenizerBase, whole: list[int], plain: list[int]) -> int:
    """Returns the number of special tokens before the tokens of the text."""
    places = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
    if len(places) != 1:  # an empty text or one with special tokens: use an ordinary text
        whole, plain = _ids(tokenizer, _ORDINARY, special=True), _ids(tokenizer, _ORDINARY, special=False)
        places = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
    return places[0]


def _decoded_spans(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, stop: int) -> list[Span]:
    """Returns the span of characters of `text` for each id.

    Raises:
        RequestError: the decoded ids differ from the text before `stop`.
    """
    decoded = _decode(tokenizer, ids)
    # Tokenizers add and remove spaces at the ends.
    shift = _leading_blanks(text) - _leading_blanks(decoded)
    same = _leading_blanks(text) + _agreement(text.lstrip(), decoded.lstrip())
    if same < stop:
        raise RequestError(
            f"{type(tokenizer).__name__} gives no character offsets, and its tokens of {text!r} decode to {decoded!r}, "
            f"which differs at character {same}, before the end of the span; use a fast tokenizer or other words"
        )
    spans = []
    end = 0
    for count in range(1, len(ids) + 1):
        so_far = _decode(tokenizer, ids[:count])
        begin, end = end, max(end, _agreement(so_far, decoded))
        # Incomplete bytes of a character decode to something else or to nothing.
        begun = end == begin or len(so_far) > end
        spans.append((begin + shift, end + begun + shift))
    return spans


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False))
    # Some slow tokenizers of transformers 5 do not decode the byte tokens of sentencepiece.
    return _BYTES.sub(
        lambda run: bytes.fromhex(run[0].replace("<0x", "").replace(">", "")).decode(errors="replace"), text
    )


def _agreement(one: str, other: str) -> int:
    """Returns the length of the common prefix of two texts."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def _leading_blanks(text: str) -> int:
    return len(text) - len(text.lstrip())
