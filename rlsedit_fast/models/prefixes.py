"""Rows of tokens whose beginnings are run once, however many rows begin with them and however often the rest is run."""

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

from rlsedit_fast.models.passes import cache_argument, cache_of, end_at
from rlsedit_fast.models.projections import Decoder
from rlsedit_fast.models.tokens import Row, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_ROUNDINGS, _LEAST_ALLOWED = 8, 1e-4
"""What the order of sums may do to logits, relative to their norm: in the dtype's roundings, and at least. A wrong mask
or position puts them tenths apart in every architecture of the tests.
"""


@dataclass(frozen=True)
class Prefixed:
    """A batch of rows, each cut into what was run (its prefix) and what is run again and again.

    Prefixes are padded on the left and the rest on the right, so that all rows go on at the same column.

    Attributes:
        ids: of the tokens that are run again, `[rows, s]`.
        mask: of the prefix and these, `[rows, p + s]`.
        positions: of the tokens that are run again within their row, `[rows, s]`.
        before: tokens of each row in its prefix, `[rows]`.
        cache: keys and values of the prefix in every layer, transformers' own; None where there is none.
        cache_argument: what the model's forward calls it.
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
        """Cuts rows and runs each distinct prefix once; cuts and runs nothing where the model does not bear it.

        Args:
            decoder: the model, in evaluation mode.
            rows: at least one, each longer than its prefix.
            before: tokens of each row in its prefix, from 0 on.
            deepest: the last block that the rest will be run through; None is all.
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
        """Tokens of each row behind its prefix, `[rows]`."""
        return self.mask[:, self.mask.shape[1] - self.ids.shape[1] :].sum(1)

    def arguments(self) -> dict[str, Any]:
        """What the model's forward takes to run the tokens behind the prefix; the cache stays as it is."""
        if self.cache is None:
            return {"input_ids": self.ids, "attention_mask": self.mask, "use_cache": False}
        return self._arguments() | {self.cache_argument: _branch(self.cache), "use_cache": True}

    def taken(self, rows: Tensor) -> Prefixed:
        """The rows of the given indices only, no wider than these need."""
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


def runner(model: PreTrainedModel, *, try_prefixes: bool = False) -> Decoder:
    """A model for whole passes, of whose blocks none is asked for.

    Args:
        model: a causal language model, in evaluation mode.
        try_prefixes: find out whether it bears prefixes, see `with_prefixes`; otherwise it is taken to bear none.
    """
    decoder = Decoder(model, (), "")
    if not try_prefixes:
        return decoder
    return with_prefixes(decoder, longest=getattr(model.config.get_text_config(), "max_position_embeddings", None))


def with_prefixes(decoder: Decoder, *, longest: int | None = None) -> Decoder:
    """The decoder, told whether a model run on prefixes and then on the rest says what it says on whole rows.

    It is found out by trying: a model whose cache is of another kind, or that places tokens otherwise than by
    `position_ids`, may not. Costs a forward over three short rows, twice.

    Args:
        decoder: the model, in evaluation mode.
        longest: most tokens that the model takes; None where it sets no limit.
    """
    why = _unfit(replace(decoder, prefixed=True), longest)
    if why:
        logger.info("this model's rows cannot be cut into prefix and rest: %s; every step runs them whole", why)
    return replace(decoder, prefixed=not why)


def _unfit(decoder: Decoder, longest: int | None) -> str | None:
    """Why the model does not bear prefixes, if so."""
    if "position_ids" not in inspect.signature(decoder.model.forward).parameters or (longest or 8) < 8:
        return "it takes no position_ids, or fewer than 8 tokens"
    rows = [Row([1, 2, 3, 0, 1, 2], 4, 6), Row([2, 0, 1], 0, 3), Row([3, 1, 0, 2, 2, 1, 0], 2, 7)]
    said = []
    try:
        for cuts in ([0, 0, 0], [row.lookup for row in rows]):
            batch = Prefixed.of(decoder, rows, cuts)
            at = torch.tensor([len(row.ids) - 1 for row in rows], device=batch.ids.device) - batch.before
            every = torch.arange(len(rows), device=at.device)
            with torch.no_grad(), reading(decoder, every, at) as read:
                said.append(read(decoder.model(**batch.arguments())).double())
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    whole, cut = said
    allowed = max(_ROUNDINGS * torch.finfo(next(decoder.model.parameters()).dtype).eps, _LEAST_ALLOWED)
    apart = float((whole - cut).norm() / whole.norm())
    return None if apart <= allowed else f"its logits come out {apart:.1g} apart"


@contextmanager
def reading(decoder: Decoder, row: Tensor, at: Tensor) -> Iterator[Any]:
    """Within it the model's head is run at some tokens alone: those at `at [m]` in the rows `row [m]`.

    Yields:
        A function from the model's output to its logits at those tokens, `[m, vocabulary]`.
    """
    head = decoder.model.get_output_embeddings()
    if head is None:
        yield lambda output: output.logits[row.to(output.logits.device), at.to(output.logits.device)]
        return

    def choose(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        return (hidden[row.to(hidden.device), at.to(hidden.device)][None], *inputs[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield lambda output: output.logits[0]
    finally:
        handle.remove()


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[rows, longest]` of rows that end at the same column."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _left_padded(prefixes: Sequence[tuple[int, ...]], device: torch.device) -> Prefixed:
    """Rows that end at the same column, to be run from their beginning."""
    ids, mask = pad_left(prefixes, device)
    return Prefixed(ids, mask, (mask.cumsum(1) - 1).clamp_min(0), torch.zeros_like(ids[:, 0]), None)


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache of some of another one's rows, in the order given."""
    chosen = _branch(cache)
    for layer in chosen.layers:
        if layer.keys is not None:  # a block that was not run has none
            layer.batch_select_indices(rows.to(layer.keys.device))
    return chosen


def _branch(cache: Any) -> Any:
    """A cache that goes on from another one without changing it; keys and values are shared."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch
