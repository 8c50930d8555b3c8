"""What editing did to a model as a whole: its perplexity on text, and how far its predictions moved there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import input_device
from rlsedit_fast.models.tokens import Row, encode_plain, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_AT_ONCE = 16


@dataclass(frozen=True)
class Stability:
    """On running text.

    Attributes:
        perplexity: `exp` of the mean NLL of every token but each text's first.
        kl: mean `KL(base || now)` of the next-token distributions at these tokens, nats.
        top: share of them at which the likeliest next token is the base model's.
        tokens: how many there are.
    """

    perplexity: float
    kl: float
    top: float
    tokens: int


class TextProbe:
    """The base model's predictions on some texts, kept, and later ones compared with them.

    Args:
        model: before any edit.
        tokenizer: its tokenizer.
        texts: running text; each is cut to `length` tokens.
        tokens: most tokens in all, as the predictions of each, over the whole vocabulary, are kept in float16.
        length: most tokens of one text.

    Raises:
        InputError: no text has two tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        tokens: int = 2000,
        length: int = 128,
    ) -> None:
        self._rows: list[list[int]] = []
        left = tokens
        for text in texts:
            ids = encode_plain(tokenizer, text).ids[: min(length, left + 1)]
            if len(ids) > 1 and left > 0:
                self._rows.append(ids)
                left -= len(ids) - 1
        if not self._rows:
            raise InputError("texts: expected at least one of two tokens or more")
        self._base = [found.half().cpu() for found, _ in self._passes(model)]

    def __call__(self, model: PreTrainedModel) -> Stability:
        """The model as it is now."""
        nll = kl = 0.0
        same = count = 0
        for base, (found, following) in zip(self._base, self._passes(model), strict=True):
            before = base.to(found.device).float()
            nll -= float(found.gather(1, following[:, None]).double().sum())
            kl += float((before.exp() * (before - found)).double().sum())
            same += int((before.argmax(1) == found.argmax(1)).sum())
            count += len(following)
        mean = nll / count
        return Stability(math.exp(mean) if mean < 700 else math.inf, max(kl / count, 0.0), same / count, count)

    def _passes(self, model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each text in turn: log-probabilities `[t - 1, vocabulary]`, and the tokens that follow."""
        device = input_device(model)
        with quiet(model), torch.inference_mode():
            for at in range(0, len(self._rows), _AT_ONCE):
                part = self._rows[at : at + _AT_ONCE]
                ids, mask = pad([Row(row, -1, len(row)) for row in part], device)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                for row, found in zip(part, logits, strict=True):
                    following = torch.tensor(row[1:], device=found.device)
                    yield found[: len(row) - 1].float().log_softmax(-1), following
