"""Perplexity of a model on text, and the divergence of its predictions from those before editing."""

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

_LOGITS_AT_ONCE = 2**24  # per pass, 64 MiB in float32; on a CPU larger passes take longer per token
TOKENS = 2000
"""Default maximum number of tokens of a `TextProbe`."""


@dataclass(frozen=True)
class Stability:
    """Measurements on running text.

    Attributes:
        perplexity: `exp` of the mean NLL of all tokens except the first of each text.
        kl: mean `KL(base || edited)` of the next-token distributions at these tokens, in nats.
        top: fraction of these tokens whose most likely prediction is that of the base model.
        tokens: number of these tokens.
        perplexity_error: standard error of the perplexity over the texts; NaN for one text.
        kl_error: standard error of the KL over the texts; NaN for one text.

    Example:
        >>> from rlsedit_fast.evaluation import Stability
        >>> Stability(perplexity=8.0, kl=0.01, top=0.99, tokens=2000, perplexity_error=0.2, kl_error=0.001).top
        0.99
    """

    perplexity: float
    kl: float
    top: float
    tokens: int
    perplexity_error: float
    kl_error: float


class TextProbe:
    """Compares the predictions of edited models on texts with those of the base model.

    Args:
        model: the model before editing.
        tokenizer: tokenizer of the model.
        texts: running text; each text is truncated to `length` tokens.
        tokens: maximum number of tokens in total. The base model's log probabilities over the vocabulary are stored for
            each token in float16.
        length: maximum number of tokens per text.
        progress: called after each text with the number of finished tokens and the number of tokens.

    Attributes:
        texts: the given texts.
        unedited: measurements of the model before editing.

    Raises:
        InputError: no text has two tokens.

    Example:
        >>> from rlsedit_fast.evaluation import TextProbe
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> probe = TextProbe(model, tokenizer, ["Toze Lado Rekuno plays the clarinet ."])
        >>> probe(model).top, probe(model).tokens  # the model is not edited
        (1.0, 7)
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
        self.texts = list(texts)
        self._rows: list[list[int]] = []
        left = tokens
        for text in texts:
            ids = encode_plain(tokenizer, text).ids[: min(length, left + 1)]
            if len(ids) > 1 and left > 0:
                self._rows.append(ids)
                left -= len(ids) - 1
        if not self._rows:
            raise InputError("texts: expected at least one text of two tokens or more")
        self._rows.sort(key=len)  # rows of similar length share a pass
        width = model.get_input_embeddings().get_parameter("weight").shape[0]
        self._at_once = max(1, _LOGITS_AT_ONCE // (width * len(self._rows[-1])))
        self._base: list[Tensor] = []

        def keep(found: Tensor) -> Tensor:
            self._base.append(found.half().cpu())
            return self._base[-1]

        self.unedited = self._compare(model, keep, progress)

    def __call__(self, model: PreTrainedModel, *, progress: Progress | None = None) -> Stability:
        """Measures the model in its present state.

        Args:
            model: the edited model.
            progress: called after each text with the number of finished tokens and the number of tokens.
        """
        base = iter(self._base)
        return self._compare(model, lambda _found: next(base), progress)

    def _compare(
        self, model: PreTrainedModel, base: Callable[[Tensor], Tensor], progress: Progress | None
    ) -> Stability:
        """Compares the model's predictions with those that `base` returns for them."""
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
        """Yields for each text the log probabilities `[t - 1, vocabulary]` and the tokens that follow `[t - 1]`."""
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
    """Computes the mean over tokens and its standard error over texts.

    Args:
        sums: sum over the tokens of each text.
        counts: number of tokens of each text.

    Returns:
        The mean, and the standard error of this ratio estimator (NaN for one text).
    """
    total, texts = sum(counts), len(counts)
    mean = sum(sums) / total
    if texts < 2:
        return mean, math.nan
    squares = sum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(squares * texts / (texts - 1)) / total
