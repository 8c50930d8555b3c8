"""How the change of a layer continues to grow with further edits, from the keys of those that it has."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlsedit_fast.rls.forecast import ChangeStatistics, DrawnKeys
from rlsedit_fast.rls.state import RLSState

_DIMENSIONS = 32
_BATCH = 50  # edits
_LAST = 64  # given edits that show how much of a key is new
_BATCHES = 100  # at most, and at least two; then growth continues at the last rate
_OPERATIONS = 2e11  # at most, about ten seconds on a CPU
_MOST = 1_000_000


@torch.no_grad()
def edits_until(state: RLSState, keys: Tensor, weights: Tensor, *, growth: float) -> int:
    """Returns the number of further edits until the squared change has grown by a multiple of its present growth.

    The squared change is that of the outputs on the anchors, or of the weights without anchors. The recursion continues
    from the C of the state with drawn keys, see `DrawnKeys`, and independent changes. A copy of C is needed.

    Args:
        state: the layer.
        keys: keys of applied edits, `[n, rows, d_k]`, in the order in which they were applied; the bare prompt is the
            first row.
        weights: weights of the rows of an edit, `[rows]`.
        growth: growth to reach, relative to the present growth per edit; above 0.

    Returns:
        The number, at most a million.

    Example:
        >>> import torch
        >>> from rlsedit_fast.rls import Prior, RLSState
        >>> from rlsedit_fast.rls.continuation import edits_until
        >>> state, keys = RLSState(torch.zeros(1, 500), Prior(lam=1.0)), torch.randn(100, 1, 500)
        >>> _ = state.update(keys[:, 0], torch.randn(100, 1))
        >>> 80 < edits_until(state, keys, torch.ones(1), growth=100) < 100  # each edit adds more than the one before
        True
    """
    d_k, rows = keys.shape[2], keys.shape[1]
    zeros = torch.zeros(_DIMENSIONS, state.key_width, dtype=state.dtype, device=state.device)
    saved = replace(state.saved(), weight=zeros, objective=0.0)
    copy = RLSState(zeros, state.prior, dtype=state.dtype, name=state.name, saved=saved, columns=state.columns)
    drawn = DrawnKeys([keys], [copy], [_before_written(copy, keys[-_LAST:], weights)])
    most = max(2, min(_BATCHES, int(_OPERATIONS / (4 * _BATCH * rows * d_k**2)))) * _BATCH
    changes = ChangeStatistics(torch.ones(1), 0.0)
    done, reached, rate = 0, 0.0, 0.0
    noise = weights.to(state.device, state.dtype).repeat(_BATCH)
    first = 0.0
    while done < most:
        (these,) = drawn.take(_BATCH)
        panel = copy.project(these.flatten(0, 1).to(state.device, state.dtype), noise)
        asked = changes.draw(_BATCH, dimensions=_DIMENSIONS, seed=done).repeat_interleave(rows, dim=0)
        copy.update_projected(panel, asked.to(state.device))
        now = _square(copy)
        first = first or now / _BATCH
        if not first:
            break
        done, rate, before, reached = done + _BATCH, (now / first - reached) / _BATCH, reached, now / first
        if reached >= growth:
            return int(done - _BATCH + (growth - before) / rate)
    return int(min(done + (growth - reached) / max(rate, 1e-12), _MOST))


def _square(state: RLSState) -> float:
    prior = state.prior
    return state.columns.measure(prior.anchor_change, state.weight) if prior.mu else state.deviation() ** 2


def _before_written(state: RLSState, keys: Tensor, weights: Tensor) -> float:
    """Returns the mean of `k C k^T` at the bare prompts of edits, with the C that does not include the edit itself.

    For the rows K of an edit and `E = K C K^T`, the C without it gives `(E^-1 - diag(w))^-1 = E (I - diag(w) E)^-1`.
    """
    found = []
    eye, scale = torch.eye(keys.shape[1], dtype=torch.float64), weights.double()
    for one in keys:
        rows = one.to(state.device, state.dtype)
        energies = state.project(rows).cross(rows).T.cpu()
        found.append(float(torch.linalg.solve(eye - scale[:, None] * energies, energies, left=False)[0, 0]))
    return max(sum(found) / len(found), 0.0)
