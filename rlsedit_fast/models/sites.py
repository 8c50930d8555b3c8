"""Where a change of the hidden state is searched, and forward passes that begin there.

In most architectures a block adds the output of its last projection to the residual stream as it is: a change of the
block's output is a change of that output. Some (Gemma 2 and 3, OLMo 2) put a normalisation between the two, and some
scale it. What the solver writes is the projection's output, so there the change is searched at that output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlsedit_fast.models.passes import Enough, hidden_of, resume_above, with_hidden
from rlsedit_fast.models.prefixes import Prefixed, reading
from rlsedit_fast.models.projections import Decoder, Projection
from rlsedit_fast.models.tokens import Row

_SLACK = 0.05
"""Rounding of a bfloat16 residual stream that a probe as long as the stream itself may show: 2^-8, a few times over."""


@dataclass(frozen=True)
class Seen:
    """One forward of a batch of rows, up to a site.

    Attributes:
        below: the output of the last block that need not be run again, as it came; None if there is none.
        state: what a change is added to, `[rows, s, d]`.
    """

    below: Any
    state: Tensor


@dataclass(frozen=True)
class Site:
    """The output of a block, or of its projection, as the place where a change is added.

    Attributes:
        decoder: the model.
        projection: of the block.
        direct: whether the block adds the projection's output to the residual stream as it is.
    """

    decoder: Decoder
    projection: Projection
    direct: bool

    @property
    def module(self) -> nn.Module:
        """Whose output it is."""
        return self.decoder.blocks[self.projection.layer] if self.direct else self.projection.module

    def batch(self, rows: Sequence[Row]) -> Prefixed:
        """Rows cut before their lookup token, since nothing before it depends on a change made there."""
        return Prefixed.of(self.decoder, rows, [row.lookup for row in rows])

    def look(self, batch: Prefixed) -> Seen:
        """One forward without gradients that goes no further than the site."""
        below: list[Any] = []
        state: list[Tensor] = []
        block = self.projection.layer
        shape = batch.ids.shape

        def keep(output: Any) -> None:
            state.append(hidden_of(output).reshape(*shape, -1))  # OPT's blocks flatten rows and tokens
            if self.direct:
                below.append(output)
            raise Enough

        handles = [_on_output(self.module, keep)]
        if not self.direct and block:
            handles.append(_on_output(self.decoder.blocks[block - 1], below.append))
        try:
            with torch.no_grad():
                self.decoder.model(**batch.arguments())
        except Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return Seen(below[0] if below else None, state[0])

    @contextmanager
    def resumed(self) -> Iterator[Callable[..., Tensor]]:
        """Within it, a function runs what lies above the site with a change added.

        Yields:
            `forward(batch, below, lookup [rows], change [rows, d], row [m], at [m]) -> logits [m, vocabulary]`;
            `below` is `Seen.below` of those rows, and row r is changed at token `lookup[r]`.
        """
        last_skipped = self.projection.layer if self.direct else self.projection.layer - 1
        with resume_above(self.decoder, last_skipped) as state:

            def forward(batch: Prefixed, below: Any, lookup: Tensor, change: Tensor, row: Tensor, at: Tensor) -> Tensor:
                handle = None
                if self.direct:
                    state["output"] = with_hidden(below, _added(hidden_of(below), lookup, change))
                else:
                    state["output"] = below
                    handle = self.module.register_forward_hook(lambda _m, _i, out: _added(out, lookup, change))
                try:
                    with reading(self.decoder, row, at) as read:
                        logits: Tensor = read(self.decoder.model(**batch.arguments()))
                finally:
                    if handle is not None:
                        handle.remove()
                return logits

            yield forward


def find_site(decoder: Decoder, projections: Sequence[Projection]) -> Site:
    """The site of the last of `projections`, found out by changing each one's output and looking at its block's.

    `direct` is whether all of them reach the residual stream as they are. Costs a forward over two tokens for each,
    up to its block.

    Args:
        decoder: the model.
        projections: the edited ones, ascending.
    """
    direct = all(_adds_directly(decoder, projection) for projection in projections)
    return Site(decoder, projections[-1], direct)


def _adds_directly(decoder: Decoder, projection: Projection) -> bool:
    plain = _block_output(decoder, projection, None)
    probe = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = (probe / probe.norm()).to(plain.device) * plain[0, -1].double().norm().clamp_min(1)
    moved = (_block_output(decoder, projection, probe) - plain).double()[0, -1]
    return bool((moved - probe).norm() <= _SLACK * probe.norm())


def _block_output(decoder: Decoder, projection: Projection, change: Tensor | None) -> Tensor:
    """The block's output `[1, 2, d]` on two tokens, with `change [d]` added to its projection's at the last one."""
    seen: list[Tensor] = []

    def keep(output: Any) -> None:
        seen.append(hidden_of(output).double())
        raise Enough

    handles = [_on_output(decoder.blocks[projection.layer], keep)]
    if change is not None:
        at = torch.ones(1, dtype=torch.long, device=change.device)
        handles.append(
            projection.module.register_forward_hook(lambda _m, _i, out: _added(out, at.to(out.device), change[None]))
        )
    ids = torch.tensor([[0, 1]], device=decoder.device)
    try:
        with torch.no_grad():
            decoder.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen[0]


def _on_output(module: nn.Module, do: Callable[[Any], None]) -> Any:
    """Calls `do` with what the module returns; the handle removes it."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        do(output)

    return module.register_forward_hook(hook)


def _added(state: Tensor, at: Tensor, change: Tensor) -> Tensor:
    """`state [rows, t, d]` with `change [rows, d]` added at token `at [rows]` of each row.

    OPT's blocks flatten it to `[rows * t, d]`; what comes back has the form that came in.
    """
    rows = torch.arange(len(change), device=state.device)
    whole = state.reshape(len(change), -1, state.shape[-1])
    return whole.index_put((rows, at.to(state.device)), change.to(state), accumulate=True).reshape(state.shape)
