"""What a model says of itself: greedy answers, in as few tokens as the targets have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import input_device
from rlsedit_fast.models.tokens import alike, encode_plain, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS_AT_ONCE = 64


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]]) -> list[str]:
    """Continues the prompt of each (prompt, target) greedily, by as many tokens as the target has.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        asked: in any number.
    """
    rows = [encode_plain(tokenizer, prompt, target) for prompt, target in asked]
    said = [replace(row, ids=row.ids[: row.prompt_length]) for row in rows]
    wanted = [len(row.target) for row in rows]
    with quiet(model), torch.inference_mode():
        for step in range(max(wanted, default=0)):
            going = [i for i, count in enumerate(wanted) if count > step]
            for group in alike([len(said[i].ids) for i in going]):
                for at in range(0, len(group), _ROWS_AT_ONCE):
                    part = [going[g] for g in group[at : at + _ROWS_AT_ONCE]]
                    ids, mask = pad([said[i] for i in part], input_device(model))
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                    for i, found in zip(part, logits, strict=True):
                        next_token = int(found[len(said[i].ids) - 1].argmax())
                        said[i] = replace(said[i], ids=[*said[i].ids, next_token])
    return [str(tokenizer.decode(row.ids[row.prompt_length :], skip_special_tokens=True)).strip() for row in said]
