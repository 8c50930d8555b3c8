"""Teacher-forced scores: how likely a model finds an answer, and what it would have said instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlsedit_fast.models.tokens import encode_plain, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Score:
    """One answer under a model.

    Attributes:
        nll: mean negative log-likelihood of the answer's tokens, nats.
        predicted: the token ranked first at each of the answer's places, given the answer's tokens before it.
        exact: whether these are the answer's own tokens.
    """

    nll: float
    predicted: tuple[int, ...]
    exact: bool


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]]) -> list[Score]:
    """Scores each (prompt, answer) of `asked`, in order; rows of like length share a batch."""
    rows = [encode_plain(tokenizer, prompt, answer) for prompt, answer in asked]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    scores: dict[int, Score] = {}
    device = model.get_input_embeddings().get_parameter("weight").device
    for at in range(0, len(order), _ROWS_AT_ONCE):
        chosen = order[at : at + _ROWS_AT_ONCE]
        ids, mask = pad([rows[i] for i in chosen], device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for i, found in zip(chosen, logits, strict=True):
            row = rows[i]
            places = slice(row.prompt_length - 1, len(row.ids) - 1)
            answer = torch.tensor(row.target, device=found.device)
            log_probability = found[places].float().log_softmax(-1)
            nll = -log_probability.gather(1, answer[:, None]).mean()
            predicted = tuple(log_probability.argmax(-1).tolist())
            scores[i] = Score(float(nll), predicted, predicted == tuple(row.target))
    return [scores[i] for i in range(len(rows))]
