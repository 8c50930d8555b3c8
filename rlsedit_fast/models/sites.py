"""The site at which a change of the hidden state is optimized, and forward passes that start there.

In most architectures a block adds the output of its MLP projection to the residual stream unchanged, so a change of the
block's output is a change of the projection's output. Some architectures (Gemma 2 and 3, OLMo 2) normalize it first,
and some scale it. The solver writes the projection, so in those the change is optimized at the projection's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlsedit_fast.models.experts import ExpertProjection, check_mixture
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.models.passes import StopForward, hidden_of, resume_above, taken_rows, with_hidden
from rlsedit_fast.models.prefixes import Prefixed, allowed_difference, reading
from rlsedit_fast.models.projections import Decoder
from rlsedit_fast.models.tokens import Row

_SLACK = 0.05
"""Allowed relative error of a probe with the norm of a bfloat16 residual stream, a few times 2^-8."""


@dataclass(frozen=True)
class SiteState:
    """Result of a forward pass up to a site, see `Site.capture`.

    Attributes:
        below: output of the last block that need not be run again, or None.
        state: hidden state to which a change is added, `[rows, s, d]`.

    Example:
        >>> import torch
        >>> from rlsedit_fast.models import SiteState
        >>> SiteState(below=None, state=torch.zeros(1, 2, 3)).state.shape
        torch.Size([1, 2, 3])
    """

    below: Any
    state: Tensor


@dataclass(frozen=True)
class Site:
    """The output of a block or of its projection, to which a change is added.

    Attributes:
        decoder: the model.
        projection: projection of the block.
        direct: whether the block adds the projection's output to the residual stream unchanged.
        resumable: whether a forward pass can start inside the block. Models in which later blocks read more than the
            output of the block before (values of earlier layers, several streams) run all blocks.

    Example:
        >>> import torch
        >>> from rlsedit_fast.models import encode, find_decoder, find_site
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> decoder = find_decoder(model)
        >>> site = find_site(decoder, decoder.select([0]))
        >>> row = encode(tokenizer, "{} plays the", "Toze Lado Rekuno")
        >>> batch = site.batch([row])
        >>> captured = site.capture(batch)
        >>> lookup, last = torch.tensor([row.lookup]), torch.tensor([len(row.ids) - 1])
        >>> change, first = torch.zeros(1, 128), torch.tensor([0])
        >>> with site.resumed() as forward:  # logits of the last token
        ...     logits = forward(batch, captured.below, lookup, change, first, last)
        >>> tokenizer.decode(logits.argmax(-1))
        'clarinet'
    """

    decoder: Decoder
    projection: Projection
    direct: bool
    resumable: bool = True

    @property
    def module(self) -> nn.Module:
        """Module whose output is changed."""
        return self.decoder.blocks[self.projection.layer] if self.direct else self.projection.module

    def batch(self, rows: Sequence[Row]) -> Prefixed:
        """Splits rows before their lookup token; earlier tokens do not depend on the change.

        Args:
            rows: at least one row with a lookup token.

        Returns:
            The batch for `capture` and for the function of `resumed`.
        """
        return Prefixed.of(self.decoder, rows, [row.lookup for row in rows])

    def capture(self, batch: Prefixed) -> SiteState:
        """Runs a forward pass without gradients up to the site.

        Args:
            batch: batch of `Site.batch`.

        Returns:
            The hidden state at the site, and the output below it for `resumed`.
        """
        below: list[Any] = []
        state: list[Tensor] = []
        block = self.projection.layer
        shape = batch.ids.shape

        def keep(output: Any) -> None:
            state.append(hidden_of(output).reshape(*shape, -1))  # OPT's blocks flatten rows and tokens
            if self.direct and self.resumable:
                below.append(output)
            raise StopForward

        handles = [_on_output(self.module, keep)]
        if not self.direct and self.resumable and block:
            handles.append(_on_output(self.decoder.blocks[block - 1], below.append))
        try:
            with torch.no_grad():
                self.decoder.model(**batch.arguments())
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return SiteState(below[0] if below else None, state[0])

    @contextmanager
    def resumed(self) -> Iterator[Callable[..., Tensor]]:
        """Provides a forward function that starts at the site, inside the block.

        Yields:
            `forward(batch, below, lookup [rows], change [rows, d], row [m], at [m]) -> logits [m, vocabulary]`, where
            `below` is `SiteState.below` of the rows, the change of row r is added at token `lookup[r]`, and the logits
            are those of tokens `at` of rows `row`. Tokens are counted from the end of the prefix.
        """
        last_skipped = self.projection.layer if self.direct else self.projection.layer - 1
        with resume_above(self.decoder, last_skipped if self.resumable else -1) as state:

            def forward(batch: Prefixed, below: Any, lookup: Tensor, change: Tensor, row: Tensor, at: Tensor) -> Tensor:
                handle = None
                if self.direct and self.resumable:
                    state["output"] = with_hidden(below, _added(hidden_of(below), lookup, change))
                else:
                    state["output"] = below
                    handle = self.module.register_forward_hook(lambda _m, _i, out: _changed(out, lookup, change))
                try:
                    with reading(self.decoder, row, at) as read:
                        logits: Tensor = read(self.decoder.model(**batch.arguments()))
                finally:
                    if handle is not None:
                        handle.remove()
                return logits

            yield forward


def find_site(decoder: Decoder, projections: Sequence[Projection]) -> Site:
    """Returns the site of the last projection.

    Each projection is probed with a forward pass over two tokens, up to its block, to test whether its output is added
    to the residual stream unchanged. The output of a mixture of experts is compared with the one that its keys give.

    Args:
        decoder: the model.
        projections: edited projections, in ascending order.

    Returns:
        The site; `direct` is True if all projections are added unchanged.

    Raises:
        ModelError: see `experts.check_mixture`.

    Example:
        >>> from rlsedit_fast.models import find_decoder, find_site
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, _ = load_demo_model()
        >>> decoder = find_decoder(model)
        >>> site = find_site(decoder, decoder.select([0, 1]))
        >>> site.projection.layer, site.direct
        (1, True)
    """
    for projection in projections:
        if isinstance(projection, ExpertProjection):
            check_mixture(projection, lambda: _run(decoder))
    direct = all(_adds_directly(decoder, projection) for projection in projections)
    site = Site(decoder, projections[-1], direct)
    whole = replace(site, resumable=False)
    return site if _resumes(site, whole) else whole


def _resumes(site: Site, whole: Site) -> bool:
    """Returns whether a forward pass that starts at the site gives the logits of one that runs all blocks.

    This is tested with a change of two rows, and of one of them taken from the batch.
    """
    batch = site.batch([Row([0, 1, 0], 1, 3), Row([1, 0, 1], 1, 3)])
    try:
        below = site.capture(batch).below
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    found = list[Tensor]()
    for one, taken in ((whole, [0, 1]), (site, [0, 1]), (site, [1])):
        rows = torch.tensor(taken, device=batch.ids.device)
        part = batch.taken(rows)
        change = torch.ones(len(rows), one.projection.value_width, device=rows.device)
        seen = None if below is None or one is whole else taken_rows(below, rows, part.ids.shape[1])
        every, last = torch.arange(len(rows), device=rows.device), part.lengths - 1
        try:
            with torch.no_grad(), one.resumed() as forward:
                found.append(forward(part, seen, torch.zeros_like(rows), change, every, last).double())
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False
    pairs = [(found[0], found[1]), (found[0][1:], found[2])]
    allowed = allowed_difference(site.decoder.model)
    return all(bool((first - other).norm() <= allowed * first.norm()) for first, other in pairs)


def _adds_directly(decoder: Decoder, projection: Projection) -> bool:
    plain = _block_output(decoder, projection, None)
    probe = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = (probe / probe.norm()).to(plain.device) * plain[0, -1].double().norm().clamp_min(1)
    moved = (_block_output(decoder, projection, probe) - plain).double()[0, -1]
    return bool((moved - probe).norm() <= _SLACK * probe.norm())


def _block_output(decoder: Decoder, projection: Projection, change: Tensor | None) -> Tensor:
    """Returns the block's output `[1, 2, d]` on two tokens, with `change [d]` added to the projection's last token."""
    outputs: list[Tensor] = []

    def keep(output: Any) -> None:
        outputs.append(hidden_of(output).double())
        raise StopForward

    handles = [_on_output(decoder.blocks[projection.layer], keep)]
    if change is not None:
        at = torch.ones(1, dtype=torch.long, device=change.device)
        handles.append(projection.module.register_forward_hook(lambda _m, _i, out: _changed(out, at, change[None])))
    try:
        with torch.no_grad():
            _run(decoder)
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return outputs[0]


def _run(decoder: Decoder) -> None:
    """Runs a forward pass over two tokens."""
    ids = torch.tensor([[0, 1]], device=decoder.device)
    decoder.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def _on_output(module: nn.Module, do: Callable[[Any], None]) -> Any:
    """Registers a hook that calls `do` with the output of the module; returns its handle."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        do(output)

    return module.register_forward_hook(hook)


def _changed(output: Any, at: Tensor, change: Tensor) -> Any:
    """Returns the output of a module with `change [rows, d]` added to its hidden state, see `_added`."""
    return with_hidden(output, _added(hidden_of(output), at, change))


def _added(state: Tensor, at: Tensor, change: Tensor) -> Tensor:
    """Returns `state [rows, t, d]` with `change [rows, d]` added at token `at [rows]` of each row.

    The blocks of OPT flatten the state to `[rows * t, d]`; the result has the shape of the input.
    """
    rows = torch.arange(len(change), device=state.device)
    whole = state.reshape(len(change), -1, state.shape[-1])
    return whole.index_put((rows, at.to(state.device)), change.to(state), accumulate=True).reshape(state.shape)
