"""The value search: the hidden state at the lookup token that makes the model say the target.

All requests of a batch are searched at once, each with its own change, clamp and stop. The blocks up to the
edited layer are run once; every step resumes above it, and requests that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.editing.config import DEFAULT_RATE, EditConfig
from rlsedit_fast.editing.descent import AdamDescent, Descent, NormalizedDescent
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.models.passes import block_output, hidden_of, resume_above, with_hidden
from rlsedit_fast.models.projections import Decoder
from rlsedit_fast.models.tokens import Row, pad


@dataclass(frozen=True)
class Values:
    """What the search found.

    Attributes:
        delta: wanted change of the hidden state after the last edited layer, `[n, d]`, float32.
        nll: mean NLL of each target under it, the worst context's, `[n]`, nats.
        converged: whether each reached the stopping rule, `[n]`, bool.
        steps: optimiser steps that each took, `[n]`.
    """

    delta: Tensor
    nll: Tensor
    converged: Tensor
    steps: Tensor


@dataclass(frozen=True)
class _Rows:
    """The rows of a batch that the search looks at, padded, and run once up to the edited layer."""

    ids: Tensor  # [rows, t]
    mask: Tensor  # [rows, t]
    owner: Tensor  # [rows] the request that a row belongs to
    lookup: Tensor  # [rows] the token that is changed
    target: Tensor  # [rows, t] ids of target tokens at the positions that predict them, else -1
    kl_row: Tensor  # [rows] row of `before` that a KL row is compared with, else -1
    kl_at: Tensor  # [rows] the position at which it is compared
    before: Tensor  # [kl rows, vocabulary] log-probabilities before the edit
    output: Any  # the block's output as it came; hidden state [rows, t, d]

    def of(self, requests: Tensor) -> _Rows:
        """The rows of `requests [n]`, a mask, only."""
        rows = requests[self.owner].nonzero()[:, 0]
        return replace(
            self,
            output=with_hidden(self.output, hidden_of(self.output)[rows]),
            **{
                name: getattr(self, name)[rows]
                for name in ("ids", "mask", "owner", "lookup", "target", "kl_row", "kl_at")
            },
        )


def search_values(decoder: Decoder, requests: Sequence[Request], config: EditConfig, *, block: int) -> Values:
    """Finds each request's value by descent on the loss of MEMIT (Meng et al. 2023, eq. 16 and its released terms).

    The loss of a request is its target's NLL, averaged over tokens, then contexts; plus `kl_factor` times
    KL(before || after) at the end of its KL prompts, averaged over them; plus `weight_decay * ||delta|| / ||h||^2`.

    Args:
        decoder: the model, in evaluation mode and without parameter gradients.
        requests: at least one.
        config: settings of the search.
        block: the change is made to the output of this block, the last one edited.
    """
    rows, start = _gather(decoder, requests, block)
    norm = start.norm(dim=1)
    delta = torch.zeros_like(start, requires_grad=True)
    descent = _descent(config, delta, norm)
    found = torch.zeros_like(start)
    nll = torch.full_like(norm, torch.inf)
    steps = torch.zeros_like(norm, dtype=torch.long)
    active = torch.ones_like(norm, dtype=torch.bool)
    with resume_above(decoder, block) as state:
        for step in range(config.search_steps + 1):
            fit, kl, worst, first = _losses(decoder, rows, delta, state)
            with torch.no_grad():
                found = torch.where(active[:, None], delta, found)
                nll = torch.where(active, worst, nll)
                steps[active] = step
                done = active & first & (worst <= config.search_stop_nll)
            if step == config.search_steps or bool((done == active).all()):
                active = active & ~done
                break
            decay = config.weight_decay * delta.norm(dim=1) / norm.square()
            (gradient,) = torch.autograd.grad((fit + config.kl_factor * kl + decay)[active].sum(), delta)
            with torch.no_grad():
                descent.step(delta, gradient)
                allowed = config.clamp * norm / delta.norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
                delta.mul_(allowed.clamp_max(1)[:, None])
            if bool(done.any()):
                active = active & ~done
                rows = rows.of(active)
    return Values(found, nll, ~active, steps)


def _descent(config: EditConfig, delta: Tensor, norm: Tensor) -> Descent:
    rate = config.search_rate or DEFAULT_RATE[config.search_descent]
    return NormalizedDescent(rate, norm) if config.search_descent == "normalized" else AdamDescent(rate, delta)


def _gather(decoder: Decoder, requests: Sequence[Request], block: int) -> tuple[_Rows, Tensor]:
    """All rows of a batch, and the hidden state `[n, d]`, float32, at each bare prompt's lookup token."""
    listed: list[tuple[int, Row, bool]] = []
    for i, request in enumerate(requests):
        listed += [(i, row, False) for row in request.contexts]
        listed += [(i, row, True) for row in request.kl]
    device = decoder.device
    ids, mask = pad([row for _, row, _ in listed], device)
    output, logits = block_output(decoder, block, ids, mask)
    owner = torch.tensor([i for i, _, _ in listed], device=device)
    lookup = torch.tensor([row.lookup for _, row, _ in listed], device=device)
    last = torch.tensor([row.prompt_length - 1 for _, row, _ in listed], device=device)
    is_kl = torch.tensor([kl for _, _, kl in listed], device=device)
    target = torch.full_like(ids, -1)
    for at, (_, row, _) in enumerate(listed):
        stop = row.prompt_length - 1 + len(row.target)
        target[at, row.prompt_length - 1 : stop] = torch.tensor(row.target, device=device)
    every = torch.arange(len(listed), device=device)
    bare = torch.tensor([at for at, (i, row, _) in enumerate(listed) if row is requests[i].contexts[0]], device=device)
    answers = logits[every, last].argmax(-1)
    # A KL prompt whose answer is the one being edited away would hold what is to change.
    is_kl &= answers != answers[bare][owner]
    keep = (is_kl | (target >= 0).any(1)).nonzero()[:, 0]
    before = logits[every[is_kl], last[is_kl]].float().log_softmax(-1)
    kl_row = torch.where(is_kl, is_kl.cumsum(0) - 1, -1)
    hidden = hidden_of(output)
    rows = _Rows(
        ids[keep],
        mask[keep],
        owner[keep],
        lookup[keep],
        target[keep],
        kl_row[keep],
        last[keep],
        before,
        with_hidden(output, hidden[keep]),
    )
    return rows, hidden[bare, lookup[bare]].float()


def _losses(
    decoder: Decoder, rows: _Rows, delta: Tensor, state: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per request `[n]`: mean NLL, mean KL, the worst context's NLL, whether all its targets are ranked first.

    Requests without rows get 0, 0, 0 and True.
    """
    hidden = hidden_of(rows.output)
    every = torch.arange(len(hidden), device=hidden.device)
    changed = hidden.index_put((every, rows.lookup), delta[rows.owner].to(hidden.dtype), accumulate=True)
    state["output"] = with_hidden(rows.output, changed)
    logits = decoder.model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).logits

    row, at = (rows.target >= 0).nonzero(as_tuple=True)
    wanted = rows.target[row, at]
    scores = logits[row, at].float().log_softmax(-1)
    token_nll = -scores.gather(1, wanted[:, None])[:, 0]
    row_nll = _mean_by(row, token_nll, len(hidden))
    fact = (rows.target >= 0).any(1)
    count = len(delta)
    worst = torch.zeros(count, device=delta.device).scatter_reduce(0, rows.owner[fact], row_nll[fact].detach(), "amax")
    missed = torch.zeros(count, device=delta.device)
    missed.index_add_(0, rows.owner[row], (scores.argmax(-1) != wanted).float())

    is_kl = rows.kl_row >= 0
    after = logits[every[is_kl], rows.kl_at[is_kl]].float().log_softmax(-1)
    before = rows.before[rows.kl_row[is_kl]]
    divergence = (before.exp() * (before - after)).sum(-1)
    fit = _mean_by(rows.owner[fact], row_nll[fact], count)
    return fit, _mean_by(rows.owner[is_kl], divergence, count), worst, missed == 0


def _mean_by(group: Tensor, values: Tensor, count: int) -> Tensor:
    """Mean of `values [m]` over each of `count` groups `[count]`; 0 for a group without members."""
    total = torch.zeros(count, device=values.device).index_add(0, group, values)
    return total / torch.bincount(group, minlength=count).clamp_min(1)
