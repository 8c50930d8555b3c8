"""The number of PyTorch calls and of synchronizations of a step, which bound the time of a small one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlsedit_fast as rf
from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import checks

VIEWS = {"alias", "detach", "diagonal", "permute", "slice", "split", "unsqueeze", "view"}


class Calls(TorchDispatchMode):
    """Counts calls that compute or allocate, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def batch(n, d_v=8, d_k=64):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, d_k, generator=generator) / 8, torch.randn(n, d_v, generator=generator)


@pytest.fixture
def reads(monkeypatch):
    """Records every read of numbers by the host."""
    found, numbers = [], checks.numbers
    monkeypatch.setattr(checks, "numbers", lambda *given: found.append(len(given)) or numbers(*given))
    return found


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 39), (torch.bfloat16, 43)])
def test_update_makes_few_calls_and_synchronizes_once(dtype, most, reads):
    """In place of 86 (102 for bfloat16) with two synchronizations."""
    state = rf.RLSState(torch.randn(8, 64).to(dtype), rf.Prior(lam=1.0), in_place=True, backend="cpu,reference")
    state.update(*batch(4))
    given = batch(5)
    reads.clear()
    with Calls() as calls:
        state.update(*given)
    assert len(calls.names) <= most, calls.names
    assert len(reads) == 1
    assert not {"_local_scalar_dense", "is_nonzero", "equal", "nonzero"} & set(calls.names)


@pytest.mark.parametrize("call", ["update", "remove", "update_projected"])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_step_synchronizes_once_after_its_panel(call, weighted, reads):
    state = rf.RLSState(torch.randn(8, 64), rf.Prior(lam=1.0))
    keys, values = batch(5)
    weights = torch.rand(5) + 0.5 if weighted else None
    state.update(keys, values, weights)
    reads.clear()
    if call == "update_projected":
        panel = state.project(keys, weights)
        assert len(reads) == 1
        reads.clear()
        state.update_projected(panel, values)
    else:
        getattr(state, call)(keys, values, weights)
    assert len(reads) == 1


def test_gram_and_realized_fractions_are_computed_when_they_are_read():
    state = rf.RLSState(torch.randn(8, 64), rf.Prior(lam=1.0))
    keys, values = batch(5)
    panel = state.project(keys)
    torch.testing.assert_close(panel.gram, keys @ panel.projected.T)
    assert torch.equal(panel.gram, panel.gram.T)
    assert panel.gram is panel.gram
    step = state.update(keys, values)
    expected = 1 - step.residual.norm(dim=1) / step.innovation.norm(dim=1)
    torch.testing.assert_close(step.realized, expected)


@pytest.mark.parametrize(
    ("bad", "text"), [(0.0, r"weights\[1\] is 0"), (-1.0, r"weights\[1\]"), (1e-39, r"weights\[1\]")]
)
def test_weights_are_checked_with_the_result(bad, text):
    state = rf.RLSState(torch.randn(8, 64), rf.Prior(lam=1.0))
    before = state.weight.clone()
    with pytest.raises(InputError, match=text):
        state.update(*batch(3), torch.tensor([1.0, bad, 1.0]))
    assert torch.equal(state.weight, before)
    assert state.edits == 0
