"""Invalid inputs raise an error that names the argument, and do not modify the state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlsedit_fast.errors import BackendError, InputError, PriorError, UpdateError
from rlsedit_fast.rls import Prior, RLSState

D_K, D_V = 6, 4
GOOD = {"keys": torch.ones(2, D_K), "values": torch.ones(2, D_V), "weights": torch.ones(2)}


def with_row(shape: tuple[int, ...], value: float, row: int = 1) -> Tensor:
    tensor = torch.ones(shape)
    tensor[row] = value
    return tensor


BAD = [
    ("keys", torch.ones(2, D_K + 1), r"keys.*\[2, 7\]"),
    ("keys", torch.ones(D_K), r"keys.*\[6\]"),
    ("keys", torch.ones(0, D_K), "no rows"),
    ("keys", torch.ones(2, D_K, dtype=torch.int64), "keys.*int64"),
    ("keys", [[1.0] * D_K] * 2, "keys is a list"),
    ("keys", with_row((2, D_K), torch.nan), "keys contains NaN or Inf in row 1"),
    ("keys", with_row((2, D_K), torch.inf, row=0), "keys contains NaN or Inf in row 0"),
    ("keys", torch.full((2, D_K), 1e300, dtype=torch.float64), "keys contains NaN or Inf in row 0.*float32"),
    ("keys", torch.ones(2, D_K, device="meta"), "keys is on meta"),
    ("values", torch.ones(3, D_V), r"values.*\[3, 4\]"),
    ("values", torch.ones(2, D_V + 1), r"values.*\[2, 5\]"),
    ("values", torch.ones(2, D_V, dtype=torch.bool), "values.*bool"),
    ("values", with_row((2, D_V), -torch.inf), "values contains NaN or Inf in row 1"),
    ("values", torch.ones(2, D_V, device="meta"), "values is on meta"),
    ("weights", torch.ones(3), r"weights.*\[3\]"),
    ("weights", torch.ones(2, 1), r"weights.*\[2, 1\]"),
    ("weights", torch.ones(2, dtype=torch.int32), "weights.*int32"),
    ("weights", 2.0, "weights is a float"),
    ("weights", with_row((2,), 0.0), r"weights\[1\] is 0"),
    ("weights", with_row((2,), -1.0, row=0), r"weights\[0\] is -1"),
    ("weights", with_row((2,), torch.nan), "weights contains NaN or Inf in row 1"),
    ("weights", with_row((2,), 1e-45), r"weights\[1\] is 1.4.*inverses must be positive"),
    ("weights", torch.ones(2, device="meta"), "weights is on meta"),
]


@pytest.fixture
def state() -> RLSState:
    generator = torch.Generator().manual_seed(0)
    made = RLSState(torch.randn(D_V, D_K, generator=generator), Prior(lam=1.0), delay=3)
    made.update(torch.randn(4, D_K, generator=generator), torch.randn(4, D_V, generator=generator))
    made.update(torch.randn(2, D_K, generator=generator), torch.randn(2, D_V, generator=generator))
    return made


CASES = [
    (operation, *bad)
    for operation in ("update", "remove", "refresh", "replace", "project")
    for bad in BAD
    if (operation, bad[0]) != ("project", "values")  # project has no values
]


@pytest.mark.parametrize(("operation", "argument", "value", "message"), CASES)
def test_bad_argument_raises(
    state: RLSState, record: Callable, same: Callable, operation: str, argument: str, value: object, message: str
) -> None:
    given = {**GOOD, argument: value}
    if operation == "project":
        del given["values"]
    if operation == "replace":
        given["new_values"] = given.pop("values")
        given["old_values"] = GOOD["values"]
    if operation == "refresh" and message == "no rows":
        message = "values"  # refresh accepts no rows, but then the values do not match
    before = record(state)
    with pytest.raises(InputError, match=message):
        getattr(state, operation)(**given)
    assert same(before, record(state))


@pytest.mark.parametrize(
    ("innovation", "message"),
    [
        (torch.ones(3, D_V), "innovation"),
        (torch.ones(2, D_V, dtype=torch.int64), "innovation"),
        (with_row((2, D_V), torch.nan), "innovation contains NaN or Inf in row 1"),
        (torch.ones(2, D_V, device="meta"), "innovation is on meta"),
    ],
)
def test_bad_innovation_raises(
    state: RLSState, record: Callable, same: Callable, innovation: Tensor, message: str
) -> None:
    panel = state.project(GOOD["keys"])
    before = record(state)
    with pytest.raises(InputError, match=message):
        state.update_projected(panel, innovation)
    assert same(before, record(state))


@pytest.mark.parametrize("operation", ["remove", "replace"])
def test_more_rows_than_applied_raises(state: RLSState, record: Callable, same: Callable, operation: str) -> None:
    keys, values = torch.ones(7, D_K), torch.ones(7, D_V)
    before = record(state)
    with pytest.raises(InputError, match="has 6 edits"):
        getattr(state, operation)(keys, values, *([values] if operation == "replace" else []))
    assert same(before, record(state))


def test_overflow_raises(state: RLSState, record: Callable, same: Callable) -> None:
    before = record(state)
    with pytest.raises(UpdateError, match="overflows"):
        state.update(GOOD["keys"], torch.full((2, D_V), 3e38))
    with pytest.raises(UpdateError, match="overflows"):
        state.replace(GOOD["keys"], torch.full((2, D_V), -3e38), torch.full((2, D_V), 3e38))
    with pytest.raises(UpdateError):
        state.update(torch.full((2, D_K), 1e25), GOOD["values"])
    assert same(before, record(state))


def test_failed_factorization_raises(state: RLSState, record: Callable, same: Callable) -> None:
    state._base.neg_()  # cannot happen in a stream
    state.flush()
    before = record(state)
    with pytest.raises(UpdateError, match="could not be factored"):
        state.update(100 * GOOD["keys"], GOOD["values"])
    assert same(before, record(state))


def test_failed_refresh_raises(record: Callable, same: Callable) -> None:
    moment = torch.eye(3, dtype=torch.float64)
    state = RLSState(torch.ones(2, 3), Prior(lam=0.0, mu=1.0, anchor_moment=moment))
    state.update(torch.ones(1, 3), torch.ones(1, 2))
    before = record(state)
    moment[2, 2] = -1.0
    with pytest.raises(PriorError):
        state.refresh(torch.ones(1, 3), torch.ones(1, 2))
    assert same(before, record(state))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(3),), {}, "weight"),
        ((torch.ones(3, 0),), {}, "size"),
        ((torch.ones(3, 3, dtype=torch.int64),), {}, "int64"),
        ((with_row((3, 3), torch.nan),), {}, "weight contains NaN or Inf in row 1"),
        ((torch.full((2, 2), 1e300, dtype=torch.float64),), {"dtype": torch.float32}, "weight contains NaN or Inf"),
        ((torch.ones(3, 3),), {"dtype": torch.bfloat16}, "bfloat16"),
        ((torch.ones(3, 3),), {"delay": -1}, "delay"),
        ((torch.ones(3, 3),), {"delay": 1.5}, "delay"),
        ((torch.ones(3, 3),), {"backend": "abacus"}, "abacus"),
    ],
)
def test_bad_constructor_arguments_raise(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RLSState(*arguments, Prior(lam=1.0), **options)


def test_unsupported_backend_raises_in_the_constructor() -> None:
    with pytest.raises(BackendError):
        RLSState(torch.ones(3, 3, dtype=torch.float64), Prior(lam=1.0), backend="cpu")
