"""Generates text token by token: sampled at temperature 1 with a seed, or greedily."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_fast.activity import report_activity
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
        ids: token ids, including the start token and excluding the end token.
        log_probabilities: log probabilities of all tokens except the first, in nats.

    Example:
        >>> from rlsedit_fast.models import Sample
        >>> Sample(ids=[1, 20, 3], log_probabilities=[-0.5, -1.25]).ids
        [1, 20, 3]
    """

    ids: list[int]
    log_probabilities: list[float]


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, texts: int, length: int, seed: int
) -> list[Sample]:
    """Samples texts at temperature 1 in one batch, without using any global random number generator.

    A text starts with the beginning-of-text token of the tokenizer, or with a random token of the vocabulary if there
    is none. It ends before an end-of-text token, which cannot be the first sampled token. No other special tokens
    occur.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        texts: number of texts.
        length: maximum number of tokens per text, including the first.
        seed: random seed; the samples are reproducible on the same machine.

    Returns:
        The samples.

    Raises:
        InputError: the probabilities of the model are not finite.

    Example:
        >>> from rlsedit_fast.models import sample
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> one, other = sample(model, tokenizer, texts=2, length=5, seed=0)
        >>> tokenizer.convert_ids_to_tokens(one.ids[0])
        '<s>'
        >>> len(one.ids) - len(one.log_probabilities)
        1
    """
    device = input_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    width = model.config.get_text_config().vocab_size
    ends = end_tokens(model, tokenizer)
    ordinary = torch.ones(width, dtype=torch.bool, device=device)
    ordinary[len(tokenizer) :] = False  # embedding rows without a token
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
            report_activity(f"generating {texts} texts, token {ids.shape[1]} of {length}")
            # The mask also covers the cached tokens.
            mask = torch.ones_like(ids)
            earlier: dict[str, Any] = {} if cache is None else {name: cache}
            fed = ids if cache is None else ids[:, -1:]  # all tokens, if the model does not return a cache
            out = model(input_ids=fed, attention_mask=mask, use_cache=cache is not None or fed.shape[1] == 1, **earlier)
            cache = cache_of(out)
            known = out.logits[:, -1].to(device).float().log_softmax(-1)
            if bool(known.isnan().any()):
                raise InputError("the probabilities of the model are not finite; check its weights and dtype")
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
    """Continues each row with the most likely token at every step.

    `generate()` of the model is not used, because it applies the generation config of the model, such as a repetition
    penalty or a minimum length.

    Args:
        model: causal language model.
        rows: token ids, at least one per row.
        counts: maximum number of new tokens per row.
        ends: tokens before which a continuation ends.
        enough: called after each step with the index of a row and its new tokens; a batch ends when it returns True for
            all of its rows, which may then have fewer tokens than `counts`.
        progress: called after each batch with the number of finished rows and the number of rows.

    Returns:
        The new tokens of each row, in order.

    Example:
        >>> from rlsedit_fast.models import greedy
        >>> from rlsedit_fast.world import World, load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> person = World.generate().people[0]
        >>> person.name, person.facts["instrument"]
        ('Toze Lado Rekuno', 'clarinet')
        >>> (new,) = greedy(model, [tokenizer(f"{person.name} plays the")["input_ids"]], [1])
        >>> tokenizer.decode(new)
        'clarinet'
    """
    generated: dict[int, list[int]] = {}
    with quiet(model), torch.inference_mode():
        for decoder, part in batches(model, [len(row) for row in rows], _ROWS_AT_ONCE):
            generated |= {i: [] for i in part}
            for made in _continued(decoder, [rows[i] for i in part], max(counts[i] for i in part)):
                for i, new in zip(part, made, strict=True):
                    wanted = new[: counts[i]]
                    generated[i] = wanted[: next((at for at, token in enumerate(wanted) if token in ends), None)]
                if all(
                    len(generated[i]) < len(new) or (enough is not None and enough(i, generated[i]))
                    for i, new in zip(part, made, strict=True)
                ):
                    break
            if progress is not None:
                progress(len(generated), len(rows))
    return [generated[i] for i in range(len(rows))]


def batches(model: PreTrainedModel, lengths: Sequence[int], most: int) -> list[tuple[Decoder, list[int]]]:
    """Groups rows into batches of at most `most` rows, given as indices into `lengths`.

    A batch has rows of any length, which are padded on the left, or rows of one length if the model does not support
    left padding.

    Args:
        model: causal language model in evaluation mode.
        lengths: number of tokens of each row.
        most: maximum number of rows per batch.

    Returns:
        For each batch the decoder that runs it and the indices of its rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    decoder = runner(model, try_prefixes=len(set(lengths)) > 1)
    groups = [order] if decoder.prefixed else [list(same) for _, same in groupby(order, key=lambda i: lengths[i])]
    return [(decoder, group[at : at + most]) for group in groups for at in range(0, len(group), most)]


def _continued(decoder: Decoder, rows: Sequence[Sequence[int]], count: int) -> Iterator[list[list[int]]]:
    """Yields, after each of `count` steps, the most likely new tokens of each row so far."""
    ids, mask = pad_left(rows, decoder.device)
    start = ids.shape[1]
    every = torch.arange(len(rows), device=decoder.device)
    name, fed, inputs = cache_argument(decoder.model), ids, dict[str, Any](use_cache=True)
    for _ in range(count):
        if decoder.prefixed:  # otherwise rows are not padded and the model computes correct positions
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -fed.shape[1] :]
        last = torch.full_like(every, fed.shape[1] - 1)
        with reading(decoder, every, last) as read_off:
            out = decoder.model(input_ids=fed, attention_mask=mask, **inputs)
            fed = read_off(out).argmax(-1, keepdim=True).to(ids.device)
        ids, mask = torch.cat([ids, fed], dim=1), torch.cat([mask, torch.ones_like(fed)], dim=1)
        if (cache := cache_of(out)) is not None:
            inputs = {name: cache, "use_cache": True}
        else:  # the model does not return a cache, so all tokens are run again
            fed, inputs = ids, {"use_cache": False}
        yield ids[:, start:].tolist()


def _cut(ids: list[int], scores: list[float], ends: Iterable[int]) -> Sample:
    stop = next((at for at, token in enumerate(ids) if at and token in ends), len(ids))
    return Sample(ids[:stop], scores[: stop - 1])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns all tokens marked as special, including reserved ones."""
    marked = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return marked | set(tokenizer.all_special_ids)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of the end-of-text tokens of the tokenizer and of the model's generation config."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
