"""A weight that is edited in place equals the exact weight, rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlsedit_fast import Prior, RLSState, ops
from rlsedit_fast.errors import BackendError, InputError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(dtype: torch.dtype, *, transposed: bool = False) -> torch.Tensor:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return weight.T.contiguous().T if transposed else weight


def stream(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 64, generator=generator), torch.randn(3, 40, generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_matches_a_copied_state(dtype, transposed) -> None:
    weight = layer(dtype, transposed=transposed)
    copied, kept = (RLSState(weight.clone(), Prior(lam=2.0)), RLSState(weight, Prior(lam=2.0), in_place=True))
    batches = stream(6)
    for state in (copied, kept):
        for batch in batches:
            state.update(*batch)
        state.remove(*batches[1])
        state.replace(*batches[2], batches[2][1] + 1)
    # K W^T rounds differently for a transposed weight; a removal divides that by its pivot, about
    # lam^2 / (lam^2 + |k|^2).
    ulp = torch.finfo(torch.float32).eps * float(copied.weight.abs().max())
    torch.testing.assert_close(kept.weight, copied.weight, rtol=0, atol=ulp * (4 + 64) / 4)
    rounded = ops.split(kept.weight)[0] if dtype == torch.bfloat16 else kept.weight.to(dtype)
    assert torch.equal(weight, rounded)
    torch.testing.assert_close(kept.outputs(batches[0][0]), batches[0][0] @ kept.weight.T)
    for state in (copied, kept):
        state.refresh(batches[0][0][:0], batches[0][1][:0])
    assert torch.equal(weight, layer(dtype))
    assert torch.equal(kept.weight, copied.weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_failed_transaction_restores_the_weight(dtype, transaction: Callable) -> None:
    weight = layer(dtype)
    state = RLSState(weight, Prior(lam=2.0), in_place=True)
    first, second = stream(2)
    state.update(*first)
    rounded, exact = weight.clone(), state.weight.clone()

    def fail() -> None:
        with transaction(state):
            state.update(*second)
            assert not torch.equal(weight, rounded)
            raise InputError("expected failure")

    with pytest.raises(InputError, match="expected failure"):
        fail()
    assert torch.equal(weight, rounded)
    assert torch.equal(state.weight, exact)


def test_memory_of_the_master(state_bytes: Callable) -> None:
    sizes = {}
    for dtype in DTYPES:
        weight = layer(dtype)
        sizes[dtype] = state_bytes(RLSState(weight, Prior(lam=1.0), in_place=True), weight)
    originals = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}  # W0, for refresh
    master = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 4}
    for dtype in (torch.bfloat16, torch.float16):
        difference = originals[dtype] + master[dtype] - originals[torch.float32] - master[torch.float32]
        assert sizes[dtype] - sizes[torch.float32] == 40 * 64 * difference


def test_both_halves_keep_small_updates_that_bfloat16_loses(problem: Callable) -> None:
    """2,000 updates of relative size 1e-4."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(48, 64, generator=generator).bfloat16()
    exact = weight.double()
    single, plain, (high, low) = weight.float(), weight.clone(), ops.split(weight.float())
    for _ in range(2000):
        whitened, rows = torch.randn(1, 48, generator=generator), torch.randn(1, 64, generator=generator)
        whitened *= 1e-4 * weight.float().norm() / (whitened.norm() * rows.norm())
        exact += whitened.double().T @ rows.double()
        ops.correct_(single, whitened, rows, 1)
        ops.correct_split_(high, low, whitened, rows, 1)
        plain += (whitened.T @ rows).bfloat16()

    def error(value: torch.Tensor) -> float:
        return float((value.double() - exact).norm() / exact.norm())

    assert float((ops.join(high, low) - single).norm() / single.norm()) <= 1e-6
    assert error(ops.join(high, low)) <= 2 * error(single) + 1e-12
    assert error(plain) > 100 * error(single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsupported_backend_does_not_modify_the_weight(dtype) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, keys = weight.clone(), torch.eye(6)
    prior = Prior(lam=1.0, mu=1.0, anchor_keys=keys, anchor_values=torch.ones(6, 4))
    with pytest.raises(BackendError):
        RLSState(weight, prior, in_place=True, backend="cuda")
    assert torch.equal(weight, before)
    RLSState(weight, prior, in_place=True)
    assert not torch.equal(weight, before), "these anchors change the initial weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_device_has_no_effect(dtype) -> None:
    """The default device can differ from the device of the weight."""
    stream_of = stream(4)
    plain, other = (RLSState(layer(dtype), Prior(lam=2.0), delay=2, in_place=True) for _ in range(2))
    for keys, values in stream_of:
        plain.update(keys, values)
    with torch.device("meta"):
        other.refresh(*stream_of[0])
        other.remove(*stream_of[0])
        for keys, values in stream_of:
            other.update(keys, values)
        assert other.monitor().residual < 1e-4
    torch.testing.assert_close(other.weight, plain.weight, rtol=1e-5, atol=1e-5)
