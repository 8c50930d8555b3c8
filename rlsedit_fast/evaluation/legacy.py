"""Figures as published tables have them, where those are known to measure something else than they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.scoring import score_rows
from rlsedit_fast.models.tokens import Row, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def token_accuracy_with_bos(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]]
) -> list[float]:
    """Share of an answer's tokens that are ranked first, the beginning-of-text token counted as the first of them.

    Evaluations of zsRE that descend from MEMIT's tokenise the answer on its own, and so, with tokenizers that begin
    every text with a special token (Llama's), grade that token as the answer's first: no model says it, and every
    figure is depressed, zsRE's specificity to about 32 on Llama whatever the method. Only to stand beside such tables;
    `Metric.tokens` is the right number.

    Raises:
        InputError: the tokenizer has no such token, so the figure does not differ from the right one.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        raise InputError("the tokenizer has no beginning-of-text token, so no evaluation grades one; see Metric.tokens")
    rows = [encode_plain(tokenizer, prompt, answer) for prompt, answer in asked]
    graded = [Row([*r.ids[: r.prompt_length], bos, *r.target], -1, r.prompt_length) for r in rows]
    return [found.right for found in score_rows(model, graded)]
