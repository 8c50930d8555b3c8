"""The model's own text, token by token: sampled at temperature 1 from a seed of its own, or greedily."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_fast.errors import InputError
from rlsedit_fast.models.passes import cache_argument, cache_of, quiet
from rlsedit_fast.models.prefixes import pad_left, reading, runner
from rlsedit_fast.models.projections import Decoder, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Sample:
    """One sampled text.

    Attributes:
        ids: its tokens, the one that it was started from included and the one that ended it left out.
        log_probabilities: of every token but the first, under the model, in nats.
    """

    ids: list[int]
    log_probabilities: list[float]


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, texts: int, length: int, seed: int
) -> list[Sample]:
    """Samples texts at temperature 1, all in one batch; no other random number generator is touched.

    A text starts from the tokenizer's beginning-of-text token or, where there is none, from a random token of the
    vocabulary. It ends before an end-of-text token, which is never the first one drawn. Of the special tokens only
    these two occur.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: how many.
        length: most tokens of a text, the first included.
        seed: of the samples; the same ones again on the same machine.

    Raises:
        InputError: the model's probabilities are not finite.
    """
    device = input_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    width = model.config.get_text_config().vocab_size
    ends = end_tokens(model, tokenizer)
    ordinary = torch.ones(width, dtype=torch.bool, device=device)
    ordinary[len(tokenizer) :] = False  # rows of the embedding that are no tokens
    ordinary[sorted(token for token in _special_tokens(tokenizer) | ends if token < width)] = False
    ending = torch.zeros_like(ordinary)
    ending[sorted(token for token in ends if token < width)] = True

    start = tokenizer.bos_token_id
    if start is None:
        ids = torch.multinomial(ordinary.float().expand(texts, -1), 1, generator=generator)
    else:
        ids = torch.full((texts, 1), start, device=device)
    scores = torch.zeros(texts, 0, device=device)
    with quiet(model), torch.no_grad():
        cache, name = None, cache_argument(model)
        for _ in range(length - 1):
            # The mask covers the cached tokens too: one as long as the new ids alone would hide all but the first.
            mask = torch.ones_like(ids)
            earlier: dict[str, Any] = {name: cache}
            out = model(input_ids=ids[:, -1:], attention_mask=mask, use_cache=True, **earlier)
            cache = cache_of(out)
            known = out.logits[:, -1].to(device).float().log_softmax(-1)
            if bool(known.isnan().any()):
                raise InputError("the model's probabilities are not finite; check its weights and dtype")
            allowed = ordinary if ids.shape[1] == 1 else ordinary | ending
            odds = known.masked_fill(~allowed, -torch.inf).softmax(-1)
            drawn = torch.multinomial(odds, 1, generator=generator)
            ids = torch.cat([ids, drawn], dim=1)
            scores = torch.cat([scores, known.gather(1, drawn)], dim=1)
            if bool(ending[ids[:, 1:]].any(1).all()):
                break
    return [_cut(*row, ends) for row in zip(ids.tolist(), scores.tolist(), strict=True)]


def greedy(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    counts: Sequence[int],
    *,
    ends: Collection[int] = (),
    enough: Callable[[int, list[int]], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues each row by the likeliest token at every step, and nothing else.

    Not the model's `generate()`: that obeys the settings the model came with, such as a repetition penalty or a least
    length, and then says something else.

    Args:
        model: a causal language model.
        rows: token ids, at least one a row.
        counts: most new tokens of each row.
        ends: tokens before which a continuation ends.
        enough: called after each step with the index of a row and its new tokens; a batch ends when it is true of all
            of its rows, which may then have fewer tokens than `counts`.
        progress: called after each batch with the rows done so far, and their number.

    Returns:
        The new tokens of each row, in order.
    """
    said: dict[int, list[int]] = {}
    with quiet(model), torch.inference_mode():
        for decoder, part in batches(model, [len(row) for row in rows], _ROWS_AT_ONCE):
            for made in _continued(decoder, [rows[i] for i in part], max(counts[i] for i in part)):
                for i, new in zip(part, made, strict=True):
                    wanted = new[: counts[i]]
                    said[i] = wanted[: next((at for at, token in enumerate(wanted) if token in ends), None)]
                if all(
                    len(said[i]) < len(new) or (enough is not None and enough(i, said[i]))
                    for i, new in zip(part, made, strict=True)
                ):
                    break
            if progress is not None:
                progress(len(said), len(rows))
    return [said[i] for i in range(len(rows))]


def batches(model: PreTrainedModel, lengths: Sequence[int], most: int) -> list[tuple[Decoder, list[int]]]:
    """What is continued together, as indices into `lengths`, at most so many: rows of any length, to be padded on the
    left, or, where the model does not bear that, of one.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    decoder = runner(model, try_prefixes=len(set(lengths)) > 1)
    groups = [order] if decoder.prefixed else [list(same) for _, same in groupby(order, key=lambda i: lengths[i])]
    return [(decoder, group[at : at + most]) for group in groups for at in range(0, len(group), most)]


def _continued(decoder: Decoder, rows: Sequence[Sequence[int]], count: int) -> Iterator[list[list[int]]]:
    """After each of `count` steps, the likeliest tokens behind each row so far."""
    ids, mask = pad_left(rows, decoder.device)
    start = ids.shape[1]
    every = torch.arange(len(rows), device=decoder.device)
    name, fed, inputs = cache_argument(decoder.model), ids, dict[str, Any]()
    for _ in range(count):
        if decoder.prefixed:  # others count positions themselves, and right, as no row is padded
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -fed.shape[1] :]
        last = torch.full_like(every, fed.shape[1] - 1)
        with reading(decoder, every, last) as read_off:
            out = decoder.model(input_ids=fed, attention_mask=mask, use_cache=True, **inputs)
            fed = read_off(out).argmax(-1, keepdim=True).to(ids.device)
        inputs = {name: cache_of(out)}
        ids, mask = torch.cat([ids, fed], dim=1), torch.cat([mask, torch.ones_like(fed)], dim=1)
        yield ids[:, start:].tolist()


def _cut(ids: list[int], scores: list[float], ends: Iterable[int]) -> Sample:
    stop = next((at for at, token in enumerate(ids) if at and token in ends), len(ids))
    return Sample(ids[:stop], scores[: stop - 1])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All that are marked special, also those without a role: some tokenizers reserve hundreds."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return marked | set(tokenizer.all_special_ids)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's end-of-text token and those that the model's own generation settings name."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
