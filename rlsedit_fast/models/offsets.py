"""Which tokens stand for which characters, for tokenizers that say so and for those that do not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlsedit_fast.errors import RequestError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Span = tuple[int, int]

_BYTES = re.compile("(?:<0x[0-9A-F]{2}>)+")
_BLANK = "▁"  # as sentencepiece writes it
_ORDINARY = "a"  # tells what a tokenizer puts around any text


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that goes on: special tokens before it stay, those behind it, such as an EOS, are left out."""
    if getattr(tokenizer, "is_fast", False) and (stop := _own_end(encoded := tokenizer(text))):
        return list(encoded["input_ids"][:stop])
    whole = _ids(tokenizer, text, special=True)
    plain = _ids(tokenizer, text, special=False)
    return whole[: _start(tokenizer, whole, plain) + len(plain)]


def locate(tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int) -> tuple[list[int], list[int]]:
    """The ids of `text` (see `token_ids`), and the indices of those tokens that cover any of `text[start:stop]`.

    A tokenizer without offsets is asked what its ids decode to, one more at a time.

    Raises:
        RequestError: no token covers them, or the ids do not decode to the text, so that the place cannot be known.
    """
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True)
        end = _own_end(encoded)
        ids = list(encoded["input_ids"][:end]) if end else token_ids(tokenizer, text)
        spans = list(encoded["offset_mapping"][: len(ids)])
    else:
        ids = token_ids(tokenizer, text)
        plain = _ids(tokenizer, text, special=False)
        spans = [(0, 0)] * (len(ids) - len(plain)) + _decoded_spans(tokenizer, plain, text, stop)
    inside = [i for i, (a, b) in enumerate(spans) if a < stop and b > start and b > a]
    if not inside:
        raise RequestError(f"the tokenizer gives no token for {text[start:stop]!r} in {text!r}; choose other words")
    # The blank that sentencepiece puts before a text may be a token of its own, said to cover the first character.
    while len(inside) > 1 and not str(tokenizer.convert_ids_to_tokens(ids[inside[0]])).strip(_BLANK):
        del inside[0]
    return ids, inside


def _own_end(encoded: BatchEncoding) -> int:
    """Behind which token a text that a fast tokenizer has encoded ends, special tokens after it left out; 0 without."""
    own = [at for at, part in enumerate(encoded.sequence_ids()) if part is not None]
    return own[-1] + 1 if own else 0


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _start(tokenizer: PreTrainedTokenizerBase, whole: list[int], plain: list[int]) -> int:
    """How many special tokens stand before a text's own."""
    places = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
    if len(places) != 1:  # no tokens of its own, or special ones: ask an ordinary text
        whole, plain = _ids(tokenizer, _ORDINARY, special=True), _ids(tokenizer, _ORDINARY, special=False)
        places = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
    return places[0]


def _decoded_spans(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, stop: int) -> list[Span]:
    """Characters of `text` that each id stands for, as far as the ids decode to it.

    Raises:
        RequestError: they do so only up to some character before `stop`.
    """
    decoded = _spelled(tokenizer, ids)
    # Tokenizers add and drop blanks at the ends.
    shift = _leading_blanks(text) - _leading_blanks(decoded)
    same = _leading_blanks(text) + _agreement(text.lstrip(), decoded.lstrip())
    if same < stop:
        raise RequestError(
            f"{type(tokenizer).__name__} gives no character offsets, and its tokens of {text!r} decode to {decoded!r}, "
            f"which differs at character {same}, before the place looked for ends: use a fast tokenizer, or other words"
        )
    spans = []
    end = 0
    for count in range(1, len(ids) + 1):
        so_far = _spelled(tokenizer, ids[:count])
        begin, end = end, max(end, _agreement(so_far, decoded))
        # The bytes of a character decode to something else, or to nothing, until all are there.
        begun = end == begin or len(so_far) > end
        spans.append((begin + shift, end + begun + shift))
    return spans


def _spelled(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False))
    # Some slow tokenizers of transformers 5 leave sentencepiece's bytes as they are named.
    return _BYTES.sub(
        lambda run: bytes.fromhex(run[0].replace("<0x", "").replace(">", "")).decode(errors="replace"), text
    )


def _agreement(one: str, other: str) -> int:
    """Up to which character two texts are the same."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def _leading_blanks(text: str) -> int:
    return len(text) - len(text.lstrip())
