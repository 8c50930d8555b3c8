"""Rows of tokens whose beginnings are run once: what stands before the changed token never changes."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.models.projections import Decoder
from rlsedit_fast.models.tokens import Row, pad

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
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    before: Tensor
    cache: Any

    @classmethod
    def of(cls, decoder: Decoder, rows: Sequence[Row], *, cached: bool) -> Prefixed:
        """Cuts rows before their lookup token and runs the prefixes; or, not `cached`, runs nothing and cuts nothing.

        Args:
            decoder: the model, in evaluation mode.
            rows: at least one, each with a lookup token.
            cached: whether the model bears it, see `bears_prefixes`.
        """
        before = [row.lookup if cached else 0 for row in rows]
        ids, mask = pad([Row(row.ids[cut:], 0, 0) for row, cut in zip(rows, before, strict=True)], decoder.device)
        start = torch.tensor(before, device=ids.device)
        positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
        width = max(before)
        if not width:
            return cls(ids, mask, positions, start, None)
        lead = torch.zeros(len(rows), width, dtype=torch.long)
        for i, (row, cut) in enumerate(zip(rows, before, strict=True)):
            lead[i, width - cut :] = torch.tensor(row.ids[:cut], dtype=torch.long)
        columns = torch.arange(width, device=ids.device) - (width - start)[:, None]
        first = cls(lead.to(ids.device), (columns >= 0).long(), columns.clamp_min(0), start, None)
        with torch.no_grad(), reading(decoder, start[:1] * 0, start[:1] * 0):
            cache = decoder.model(**first._arguments(), use_cache=True).past_key_values
        return cls(ids, torch.cat([first.mask, mask], dim=1), positions, start, cache)

    def arguments(self) -> dict[str, Any]:
        """What the model's forward takes to run the tokens behind the prefix; the cache stays as it is."""
        if self.cache is None:
            return {"input_ids": self.ids, "attention_mask": self.mask, "use_cache": False}
        return self._arguments() | {"past_key_values": _branch(self.cache), "use_cache": True}

    def taken(self, rows: Tensor) -> Prefixed:
        """The rows of the given indices only."""
        cache = self.cache
        if cache is not None:
            cache = _branch(cache)
            for layer in cache.layers:
                layer.batch_select_indices(rows.to(layer.keys.device))
        chosen = {name: getattr(self, name)[rows] for name in ("ids", "mask", "positions", "before")}
        return replace(self, cache=cache, **chosen)

    def _arguments(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}


def bears_prefixes(decoder: Decoder, *, longest: int | None) -> bool:
    """Whether a model run on prefixes, and then on the rest, says what it says on whole rows; found out by trying.

    A model whose cache is of another kind, or that places tokens otherwise than by `position_ids`, may not. Costs a
    forward over three short rows, twice.
    """
    if "position_ids" not in inspect.signature(decoder.model.forward).parameters or (longest or 8) < 8:
        return _told("it takes no position_ids, or fewer than 8 tokens")
    rows = [Row([1, 2, 3, 0, 1, 2], 4, 6), Row([2, 0, 1], 0, 3), Row([3, 1, 0, 2, 2, 1, 0], 2, 7)]
    said = []
    try:
        for cached in (False, True):
            batch = Prefixed.of(decoder, rows, cached=cached)
            at = torch.tensor([len(row.ids) - 1 for row in rows], device=batch.ids.device) - batch.before
            every = torch.arange(len(rows), device=at.device)
            with torch.no_grad(), reading(decoder, every, at) as read:
                said.append(read(decoder.model(**batch.arguments())).double())
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return _told(f"{type(error).__name__}: {error}")
    whole, cut = said
    allowed = max(_ROUNDINGS * torch.finfo(next(decoder.model.parameters()).dtype).eps, _LEAST_ALLOWED)
    apart = float((whole - cut).norm() / whole.norm())
    if not apart <= allowed:
        return _told(f"its logits come out {apart:.1g} apart")
    return True


def _told(why: str) -> bool:
    logger.info("this model's rows cannot be cut into prefix and rest: %s; every step runs them whole", why)
    return False


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


def _branch(cache: Any) -> Any:
    """A cache that goes on from another one without changing it; keys and values are shared."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch
