"""What editing did to a model as a whole: its perplexity on text, and how far its predictions moved there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.scoring import Progress
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import input_device
from rlsedit_fast.models.tokens import Row, encode_plain, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGITS_AT_ONCE = 2**24  # numbers of a pass, 64 MiB in float32: on a CPU larger passes take longer a token
TOKENS = 2000
"""Of text that are probed, unless said otherwise."""


@dataclass(frozen=True)
class Stability:
    """On running text.

    Attributes:
        perplexity: `exp` of the mean NLL of every token but each text's first.
        kl: mean `KL(base || now)` of the next-token distributions at these tokens, nats.
        top: share of them at which the likeliest next token is the base model's.
        tokens: how many there are.
        perplexity_error: standard error of the perplexity, from the differences between the texts; NaN for one text.
        kl_error: standard error of the KL, likewise.
    """

    perplexity: float
    kl: float
    top: float
    tokens: int
    perplexity_error: float
    kl_error: float


class TextProbe:
    """The base model's predictions on some texts, kept, and later ones compared with them.

    Args:
        model: before any edit.
        tokenizer: its tokenizer.
        texts: running text; each is cut to `length` tokens.
        tokens: most tokens in all, as the predictions of each, over the whole vocabulary, are kept in float16.
        length: most tokens of one text.
        progress: called after each text with the tokens done so far.

    Attributes:
        unedited: what comes of the model before any edit.

    Raises:
        InputError: no text has two tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        *,
        tokens: int = TOKENS,
        length: int = 128,
        progress: Progress | None = None,
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
        self._rows.sort(key=len)  # those of like length share a pass
        width = model.get_input_embeddings().get_parameter("weight").shape[0]
        self._at_once = max(1, _LOGITS_AT_ONCE // (width * len(self._rows[-1])))
        self._base: list[Tensor] = []

        def keep(found: Tensor) -> Tensor:
            self._base.append(found.half().cpu())
            return self._base[-1]

        self.unedited = self._compare(model, keep, progress)

    def __call__(self, model: PreTrainedModel, *, progress: Progress | None = None) -> Stability:
        """The model as it is now."""
        base = iter(self._base)
        return self._compare(model, lambda _found: next(base), progress)

    def _compare(
        self, model: PreTrainedModel, base: Callable[[Tensor], Tensor], progress: Progress | None
    ) -> Stability:
        """The model's predictions, and those that `base` gives beside them."""
        nll, kl, counts = list[float](), list[float](), list[int]()
        same = 0
        for found, following in self._passes(model):
            before = base(found).to(found.device).float()
            nll.append(-float(found.gather(1, following[:, None]).sum(dtype=torch.float64)))
            same += int((before.argmax(1) == found.argmax(1)).sum())
            kl.append(float(before.exp().mul_(before.sub_(found)).sum(dtype=torch.float64)))
            counts.append(len(following))
            if progress is not None:
                progress(sum(counts), sum(len(row) - 1 for row in self._rows))
        mean, error = _mean(nll, counts)
        perplexity = math.exp(mean) if mean < 700 else math.inf
        mean_kl, kl_error = _mean(kl, counts)
        count = sum(counts)
        return Stability(perplexity, max(mean_kl, 0.0), same / count, count, perplexity * error, kl_error)

    def _passes(self, model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each text in turn: log-probabilities `[t - 1, vocabulary]`, and the tokens that follow."""
        device = input_device(model)
        with quiet(model), torch.inference_mode():
            for at in range(0, len(self._rows), self._at_once):
                part = self._rows[at : at + self._at_once]
                ids, mask = pad([Row(row, -1, len(row)) for row in part], device)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                for row, found in zip(part, logits, strict=True):
                    following = torch.tensor(row[1:], device=found.device)
                    yield found[: len(row) - 1].float().log_softmax(-1), following


def _mean(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """The mean over tokens, by each text's sum and number of tokens, and its standard error over texts (the ratio
    estimator's; NaN for one text).
    """
    total, texts = sum(counts), len(counts)
    mean = sum(sums) / total
    if texts < 2:
        return mean, math.nan
    squares = sum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(squares * texts / (texts - 1)) / total
