"""A state restored from saved contents continues bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import RLSState


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_place", [False, True])
def test_restored_state_continues_bit_for_bit(problem: Callable, dtype: torch.dtype, in_place: bool) -> None:
    case = problem(sizes=[3, 5, 4, 2, 6], dtype=dtype)
    state = case.state(delay=7)
    batches = case.batches()
    for batch in batches[:3]:
        state.update(*batch)
    state.remove(*batches[1])
    saved = state.saved()
    assert len(saved.pending) > 0, "there are pending rows"
    original = state.original.clone()
    other = RLSState(original, state.prior, delay=7, dtype=dtype, saved=saved, in_place=in_place)
    assert torch.equal(other.original, state.original)
    assert other.weight.data_ptr() != state.weight.data_ptr()
    assert (other.weight.data_ptr() == original.data_ptr()) == in_place
    for one in (state, other):
        one.update(*batches[3])
        one.remove(*batches[0])
        one.update(*batches[4])
        one.flush()
    assert torch.equal(other.weight, state.weight)
    assert torch.equal(other.precision_inverse(), state.precision_inverse())
    assert (other.objective, other.edits, other.monitor()) == (state.objective, state.edits, state.monitor())


def test_saved_state_of_other_sizes_raises(problem: Callable) -> None:
    case, wider = problem(), problem(d_k=40)
    weight = case.state().original
    with pytest.raises(InputError, match="the saved state of layer has shapes"):
        RLSState(weight, case.state().prior, saved=wider.state().saved())
