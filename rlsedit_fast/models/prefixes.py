"""Batches of rows whose shared prefixes are run once and cached."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast.models.compiled import uncompiled
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.models.passes import cache_argument, cache_of, end_at
from rlsedit_fast.models.projections import Decoder
from rlsedit_fast.models.tokens import Row, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_ROUNDINGS, _MIN_ALLOWED = 8, 1e-4
"""Allowed relative difference of logits due to rounding, in eps of the dtype, and its minimum. A wrong mask or position
causes a difference of at least 0.1 in every tested architecture.
"""

_WORTH_SHARING = 0.25  # fraction of the tokens of a pass that shared prefixes must save to be run separately


@dataclass(frozen=True)
class Prefixed:
    """A batch of rows, each split into a prefix that was run once and a rest that is run repeatedly.

    Prefixes are padded on the left and the rest on the right, so that the rest of all rows starts at the same column.

    Attributes:
        ids: token ids of the rest, `[rows, s]`, int64.
        mask: attention mask of prefix and rest, `[rows, p + s]`, int64.
        positions: positions of the rest within their rows, `[rows, s]`, int64.
        before: number of prefix tokens per row, `[rows]`, int64.
        cache: KV cache of the prefixes (a transformers cache), or None without prefixes.
        cache_argument: name of the cache argument of the model's forward.

    Example:
        >>> from rlsedit_fast.models import Prefixed, encode_plain, find_decoder, with_prefixes
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> decoder = with_prefixes(find_decoder(model))
        >>> rows = [encode_plain(tokenizer, text) for text in ("Toze Lado Rekuno speaks", "Toze Lado Rekuno plays the")]
        >>> batch = Prefixed.of(decoder, rows, before=[4, 4])  # <s> and the name are run once
        >>> batch.ids.shape, batch.mask.shape, batch.lengths.tolist()
        (torch.Size([2, 2]), torch.Size([2, 6]), [1, 2])
        >>> model(**batch.arguments()).logits.shape[:2]
        torch.Size([2, 2])
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    before: Tensor
    cache: Any
    cache_argument: str = "past_key_values"

    @classmethod
    def of(
        cls, decoder: Decoder, rows: Sequence[Row], before: Sequence[int], *, deepest: int | None = None
    ) -> Prefixed:
        """Splits rows and runs each distinct prefix once; does not split if the model does not support it.

        Args:
            decoder: the model, in evaluation mode.
            rows: at least one row, each longer than its prefix.
            before: number of prefix tokens per row, at least 0.
            deepest: index of the last block that the rest is run through, or None for all.

        Returns:
            The batch, on the device of the model.
        """
        before = [cut if decoder.prefixed else 0 for cut in before]
        ids, mask = pad([Row(row.ids[cut:], 0, 0) for row, cut in zip(rows, before, strict=True)], decoder.device)
        start = torch.tensor(before, device=ids.device)
        positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
        name = cache_argument(decoder.model)
        if not any(before):
            return cls(ids, mask, positions, start, None, name)
        distinct: dict[tuple[int, ...], int] = {}
        of_row = [
            distinct.setdefault(tuple(row.ids[:cut]), len(distinct)) for row, cut in zip(rows, before, strict=True)
        ]
        lead = _left_padded(list(distinct), decoder.device)
        whole = None if deepest is None else end_at(decoder, deepest)
        unread = torch.zeros(1, dtype=torch.long, device=ids.device)
        with torch.no_grad(), reading(decoder, unread, unread), whole or nullcontext():
            cache = cache_of(decoder.model(**lead._arguments(), use_cache=True))
        chosen = torch.tensor(of_row, device=ids.device)
        mask = torch.cat([lead.mask[chosen], mask], dim=1)
        return cls(ids, mask, positions, start, _selected(cache, chosen), name)

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each row after its prefix, `[rows]`."""
        return self.mask[:, self.mask.shape[1] - self.ids.shape[1] :].sum(1)

    def arguments(self) -> dict[str, Any]:
        """Returns the forward arguments to run the rest; the cache is not modified."""
        if self.cache is None:
            return {"input_ids": self.ids, "attention_mask": self.mask, "use_cache": False}
        return self._arguments() | {self.cache_argument: _branch(self.cache), "use_cache": True}

    def taken(self, rows: Tensor) -> Prefixed:
        """Returns the rows with the given indices `[m]`, int64, without unused columns."""
        ids, mask, positions, before = self.ids[rows], self.mask[rows], self.positions[rows], self.before[rows]
        lead = mask.shape[1] - ids.shape[1]
        width = int(self.lengths[rows].max()) if len(rows) else 0
        return replace(
            self,
            ids=ids[:, :width],
            mask=mask[:, : lead + width],
            positions=positions[:, :width],
            before=before,
            cache=None if self.cache is None else _selected(self.cache, rows),
        )

    def _arguments(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}


def shared_prefixes(rows: Sequence[Sequence[Row]]) -> list[int]:
    """Returns how many leading tokens of each row can run once for all texts.

    Args:
        rows: for each text the rows of its contexts; all texts have the same contexts.

    Returns:
        For each row, text by text, the number of leading tokens that its context has in all texts, fewer than its
        tokens up to the lookup token; 0 for all rows if sharing saves little.

    Example:
        >>> from rlsedit_fast.models import Row, shared_prefixes
        >>> shared_prefixes([[Row([1, 2, 3, 4], 3, 4)], [Row([1, 2, 3, 5], 3, 4)]])
        [3, 3]
    """
    cuts, saved, total = [], 0, 0
    for context in zip(*rows, strict=True):
        most = min(row.lookup if row.lookup >= 0 else len(row.ids) - 1 for row in context)
        first = context[0].ids
        cuts.append(next((i for i in range(most) if any(row.ids[i] != first[i] for row in context)), most))
        saved += cuts[-1] * (len(context) - 1)
        total += sum(len(row.ids) for row in context)
    return (cuts if saved > _WORTH_SHARING * total else [0] * len(cuts)) * len(rows)


def runner(model: PreTrainedModel, *, try_prefixes: bool = False) -> Decoder:
    """Returns a decoder for whole forward passes, without access to blocks.

    Args:
        model: causal language model in evaluation mode.
        try_prefixes: whether to test prefix support, see `with_prefixes`; otherwise prefixes are not used.

    Returns:
        A decoder without blocks.
    """
    decoder = Decoder(model, (), "")
    if not try_prefixes:
        return decoder
    return with_prefixes(decoder, longest=max_tokens(model.config))


def with_prefixes(decoder: Decoder, *, longest: int | None = None) -> Decoder:
    """Returns the decoder with `prefixed` set to whether prefix and rest give the same logits as whole rows.

    This is tested with four forward passes over short rows, two of which share a prefix, that extend a cache twice and
    then some of its rows. It fails for models without `position_ids`, and for caches that cannot be shared by rows or
    are modified in place, such as the states of state space models.

    Args:
        decoder: the model, in evaluation mode.
        longest: maximum number of tokens of the model, or None without a limit.

    Returns:
        A copy of the decoder. The reason for `prefixed=False` is logged.

    Example:
        >>> from rlsedit_fast.models import find_decoder, with_prefixes
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, _ = load_demo_model()
        >>> with_prefixes(find_decoder(model)).prefixed
        True
    """
    reason = _unsupported_reason(replace(decoder, prefixed=True), longest)
    if reason:
        logger.info("prefix caching is not supported by this model (%s); every step runs whole rows", reason)
    return replace(decoder, prefixed=not reason)


def _unsupported_reason(decoder: Decoder, longest: int | None) -> str | None:
    """Returns why the model does not support prefixes, or None if it does."""
    if "position_ids" not in inspect.signature(decoder.model.forward).parameters or (longest or 8) < 8:
        return "it has no position_ids, or fewer than 8 positions"
    rows = [Row([1, 2, 3, 0, 1, 2], 4, 6), Row([2, 0, 1], 0, 3), Row([3, 1, 0, 2, 2, 1, 0], 2, 7), Row([3, 1, 2], 2, 3)]
    some = torch.tensor([3, 0])
    try:
        whole = _last_logits(decoder, Prefixed.of(decoder, rows, [0] * len(rows)))
        batch = Prefixed.of(decoder, rows, [row.lookup for row in rows])
        split = [_last_logits(decoder, batch) for _ in range(2)]
        part = _last_logits(decoder, batch.taken(some.to(batch.ids.device)))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    allowed = allowed_difference(decoder.model)
    pairs = [(whole, split[0]), (whole, split[1]), (whole[some.to(whole.device)], part)]
    difference = max(float((one - other).norm() / one.norm()) for one, other in pairs)
    return None if difference <= allowed else f"its logits differ by {difference:.1g}"


def allowed_difference(model: PreTrainedModel) -> float:
    """Returns the relative difference of logits that is explained by rounding in the dtype of the model."""
    return max(_ROUNDINGS * torch.finfo(next(model.parameters()).dtype).eps, _MIN_ALLOWED)


def _last_logits(decoder: Decoder, batch: Prefixed) -> Tensor:
    """Returns the logits at the last token of each row, `[rows, vocabulary]`, float64."""
    every = torch.arange(len(batch.ids), device=batch.ids.device)
    with torch.no_grad(), reading(decoder, every, batch.lengths - 1) as read:
        logits: Tensor = read(decoder.model(**batch.arguments())).double()
        return logits


@contextmanager
def reading(decoder: Decoder, row: Tensor, at: Tensor) -> Iterator[Any]:
    """Runs the model's head only at selected tokens in the context.

    Args:
        decoder: the model.
        row: indices of rows, `[m]`, int64.
        at: index of a token in each of these rows, `[m]`, int64.

    Yields:
        A function from the model's output to the logits at those tokens, `[m, vocabulary]`.
    """
    head = decoder.model.get_output_embeddings()
    if head is None:
        with uncompiled(decoder.model):
            yield lambda output: output.logits[row.to(output.logits.device), at.to(output.logits.device)]
        return

    def choose(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        return (hidden[row.to(hidden.device), at.to(hidden.device)][None], *inputs[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        with uncompiled(decoder.model):
            yield lambda output: output.logits[0]
    finally:
        handle.remove()


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask `[rows, longest]`, int64, padded on the left with the id 0."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _left_padded(prefixes: Sequence[tuple[int, ...]], device: torch.device) -> Prefixed:
    """Returns left-padded rows without a cached prefix."""
    ids, mask = pad_left(prefixes, device)
    return Prefixed(ids, mask, (mask.cumsum(1) - 1).clamp_min(0), torch.zeros_like(ids[:, 0]), None)


def _selected(cache: Any, rows: Tensor) -> Any:
    """Returns a cache with the given rows of another cache."""
    chosen = _branch(cache)
    for layer in chosen.layers:
        if layer.keys is not None:  # None for a block that was not run
            layer.batch_select_indices(rows.to(layer.keys.device))
    return chosen


def _branch(cache: Any) -> Any:
    """Returns a shallow copy of a cache, so that it can be extended without changing the original."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch
