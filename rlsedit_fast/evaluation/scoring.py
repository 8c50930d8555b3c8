"""Teacher-forced scores: how likely a model finds an answer, and what it would have said instead."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlsedit_fast.models.projections import input_device
from rlsedit_fast.models.tokens import Row, encode_plain, pad

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
        right: share of the answer's tokens that are ranked first.
    """

    nll: float
    predicted: tuple[int, ...]
    exact: bool
    right: float


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]]) -> list[Score]:
    """Scores each (prompt, answer) of `asked`, in order.

    An answer's own tokens are scored and no special one: a tokenizer that begins every text with one would otherwise
    have it graded as the answer's first token. Of tokens that tie, the one with the lowest id is ranked first.
    """
    return score_rows(model, [encode_plain(tokenizer, prompt, answer) for prompt, answer in asked])


def score_rows(model: PreTrainedModel, rows: Sequence[Row]) -> list[Score]:
    """Scores the target of each row, in order.

    An answer's last token is asked for and never read, so answers of one token share their prompt's pass; rows of like
    length share a batch.
    """
    askers: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        askers[tuple(row.ids[:-1])].append(i)
    read = sorted(askers, key=len)
    scores: dict[int, Score] = {}
    device = input_device(model)
    for at in range(0, len(read), _ROWS_AT_ONCE):
        chosen = read[at : at + _ROWS_AT_ONCE]
        ids, mask = pad([Row(list(tokens), -1, len(tokens)) for tokens in chosen], device)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for tokens, found in zip(chosen, logits, strict=True):
            for i in askers[tokens]:
                places = slice(rows[i].prompt_length - 1, len(tokens))
                scores[i] = _score_one(found[places], rows[i].target)
    return [scores[i] for i in range(len(rows))]


def _score_one(logits: torch.Tensor, answer: list[int]) -> Score:
    log_probability = logits.float().log_softmax(-1)
    nll = -log_probability.gather(1, torch.tensor(answer, device=logits.device)[:, None]).mean()
    predicted = tuple(log_probability.argmax(-1).tolist())
    right = sum(said == wanted for said, wanted in zip(predicted, answer, strict=True)) / len(answer)
    return Score(float(nll), predicted, predicted == tuple(answer), right)
