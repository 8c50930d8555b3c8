"""Checks the results of a backend against float64, and times backends against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from rlsedit_fast.ops import reference
from rlsedit_fast.ops.sizes import Problem, SizeClass, copies, problem
from rlsedit_fast.ops.split import join

Run = Callable[..., Any]
"""An operation of one backend; takes the tensors and scalars of a problem."""

ROUNDS = 7
FEWEST_ROUNDS = 3
SECONDS = 0.15
"""A timing ends after `ROUNDS` rounds, or after `FEWEST_ROUNDS` once it took this long."""

GROUP = 1e-3  # seconds of the calls that are timed together
LONG = 0.01  # seconds of a first call on a CPU from which calls are timed one by one
CAPS = {"cpu": (2896, 3 << 30), "cuda": (8192, 1 << 36)}
"""By device type: the largest width of a timed problem, and the most multiply-adds."""

_U = 2.0**-24
_EXACT = cast(Mapping[str, Run], reference.OPS)
_RAGGED = (133, 41)  # widths of the problems of a check
_CHECKED_ROWS = 1024


def wrong(op: str, got: tuple[Tensor, ...], given: Problem) -> str | None:
    """Returns why results are not those of the operation in float64, or None.

    The error of each entry must be below `(16 + k / 4) u` times the sum of the magnitudes of its k products, with
    u = 2^-24. Sums in float32 and in tf32x3 stay far below, sums of tf32 products are above. The results of `factor`
    are compared with their largest entry, since its problem is well conditioned.

    Args:
        op: name of the operation.
        got: the results, or the tensors that the operation modified.
        given: the problem.
    """
    tensors, scalars = given
    if op == "correct_split_":
        op, tensors, got = "correct_", (join(*tensors[:2]), *tensors[2:]), (join(*got[:2]),)
    exact = [tensor.double() for tensor in tensors]
    returned = _EXACT[op](*exact, *scalars)
    if op == "factor":
        *expected, _ = returned
        if int(got[3].item()):
            return f"it reports the failed pivot {int(got[3].item())} of a positive definite matrix"
        magnitudes = [each.abs().max().expand_as(each) for each in expected]
        terms = tensors[0].shape[1]
    else:
        expected = [exact[0] if returned is None else returned]
        absolute = [tensor.double().abs() for tensor in tensors]
        if op in ("panel", "downdate_"):
            absolute[-1].neg_()
        returned = _EXACT[op](*absolute, *scalars)
        magnitudes = [absolute[0] if returned is None else returned]
        terms = tensors[0].shape[-1] + tensors[2].shape[-2] if op == "panel" else tensors[1].shape[-2]
    for one, other, magnitude in zip(got, expected, magnitudes, strict=False):
        if one.shape != other.shape:
            return f"its result has shape {list(one.shape)}, expected {list(other.shape)}"
        if not bool(torch.isfinite(one).all()):
            return "its result is not finite"
        error = ((one.double() - other).abs() / magnitude.clamp_min(1e-30)).max().item()
        if not error <= (16 + terms / 4) * _U:
            return f"its relative error is {error:.1e}, expected at most {(16 + terms / 4) * _U:.1e}"
    return None


def check(size: SizeClass, run: Run, device: torch.device) -> str | None:
    """Runs an operation on small problems of odd widths, with the numbers of rows of a class.

    Returns:
        Why the backend must not be used: it fails, or its results are wrong or not finite. None if it can be used.

    Raises:
        torch.OutOfMemoryError: there is not enough memory; this says nothing about the backend.
    """
    rows = min(size.rows, _CHECKED_ROWS)
    for count in {rows, rows // 2 + 1}:
        small = replace(size, widths=_RAGGED[: len(size.widths)], rows=count)
        given = problem(small, device, pending=7, symmetric=True)
        try:
            arguments = copies(given)
            returned = run(*arguments)
            modified = arguments if returned is None else returned
            results = modified if isinstance(modified, tuple) else (modified,)
            reason = wrong(size.op, results, given)
            if reason is None and size.op == "factor":
                reason = _wrong_on_a_failure(run, given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a kernel that does not compile or run can raise anything
            return _failure(error)
        if reason:
            return reason
    return None


def _failure(error: Exception) -> str:
    return f"it fails ({type(error).__name__}: {' '.join(str(error).split())[:300]})"


def _wrong_on_a_failure(run: Run, given: Problem) -> str | None:
    """Returns why a matrix that is not positive definite is not reported, or None."""
    (projected, keys, innovation, noise), _ = given
    *_, info = run(projected.clone(), keys.clone(), innovation.clone(), noise * -10, 1)
    return None if int(info.item()) == 1 else "it does not report a matrix that is not positive definite"


def times(
    size: SizeClass, runs: Mapping[str, Run], device: torch.device, *, seconds: float = SECONDS
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times backends on the same problem, in turn, so that other load affects all of them.

    Args:
        size: the class; the problem has at most the sizes of `CAPS`.
        runs: the operation by backend.
        device: where to run.
        seconds: time after which the timing ends.

    Returns:
        The milliseconds of a call in each round, by backend, and why a backend failed, by backend.

    Raises:
        torch.OutOfMemoryError: there is not enough memory.
    """
    tensors, scalars = problem(size.within(*CAPS[device.type]), device)
    arguments = (*tensors, *scalars)
    found, failed = {name: list[float]() for name in runs}, dict[str, str]()
    calls, began = dict.fromkeys(runs, 1), time.perf_counter()
    for done in range(-1, ROUNDS):  # the first round compiles, starts threads and determines `calls`
        if done >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for name in [name for name in runs if name not in failed]:
            try:
                each = elapsed(runs[name], arguments, calls[name], device)
                if done < 0 and (each < LONG or device.type == "cuda"):
                    again = elapsed(runs[name], arguments, 1, device)
                    calls[name] = max(1, min(100, int(GROUP / max(again, 1e-9))))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failed[name] = _failure(error)
                continue
            if done >= 0:
                found[name].append(1e3 * each)
        if done < 0:
            began = time.perf_counter()
    return {name: each for name, each in found.items() if name not in failed}, failed


def elapsed(run: Run, arguments: tuple[Any, ...], calls: int, device: torch.device) -> float:
    """Returns the seconds of a call, measured over several."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        run(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / calls
