"""Tests of backend selection and argument checks."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast import ops
from rlsedit_fast.errors import BackendError, InputError
from rlsedit_fast.ops import cpu, dispatch, reference


def arguments(op, dtype=torch.float32):
    """Returns new arguments for an operation, with d_k = 6, d_v = 4, n = 3, r = 2."""
    torch.manual_seed(0)
    base = torch.eye(6, dtype=dtype) + 0.1
    keys, pending = torch.randn(3, 6, dtype=dtype), 0.1 * torch.randn(2, 6, dtype=dtype)
    signs, noise = torch.tensor([1, -1], dtype=dtype), torch.ones(3, dtype=dtype)
    innovation = torch.randn(3, 4, dtype=dtype)
    return {
        "panel": (base, keys, pending, signs),
        "factor": (keys @ base, keys, innovation, noise, 1),
        "downdate_": (base, pending, signs),
        "correct_": (torch.randn(4, 6, dtype=dtype), innovation, keys, -1),
        "correct_split_": (*ops.split(torch.randn(4, 6)), innovation.float(), keys.float(), -1),
        "moment_": (base, keys),
    }[op]


def outcome(op, given, function):
    """Returns the result of an operation, or its first argument if the operation works in place."""
    returned = function(*given)
    return returned if returned is not None else given[0]


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("op", dispatch.OPERATIONS)
def test_requested_backend_runs_or_raises(op, backend):
    given = arguments(op)
    reason = dispatch.unsupported_reason(backend, op, [x for x in given if isinstance(x, torch.Tensor)])
    function = getattr(ops, op)
    if reason is None:
        function(*given, backend=backend)
        return
    kept = given[0].clone()
    with pytest.raises(BackendError) as error:
        function(*given, backend=backend)
    assert repr(backend) in str(error.value)
    assert reason in str(error.value)
    assert torch.equal(given[0], kept)


@pytest.mark.parametrize("op", [op for op in dispatch.OPERATIONS if op != "correct_split_"])  # float32 only
def test_auto_uses_reference_for_float64(op):
    given = arguments(op, torch.float64)
    expected = outcome(op, arguments(op, torch.float64), reference.OPS[op])
    torch.testing.assert_close(outcome(op, given, getattr(ops, op)), expected, rtol=0, atol=0)
    with pytest.raises(BackendError, match=r"float32 only|cannot be imported"):
        getattr(ops, op)(*arguments(op, torch.float64), backend="cpu")


def test_auto_skips_a_missing_extension(monkeypatch):
    monkeypatch.setattr(cpu, "_problem", "it is broken")
    expected = reference.panel(*arguments("panel"))
    torch.testing.assert_close(ops.panel(*arguments("panel")), expected, rtol=0, atol=0)
    assert "cpu" not in ops.available_backends()
    with pytest.raises(BackendError, match="it is broken"):
        ops.panel(*arguments("panel"), backend="cpu")


def test_environment_sets_the_backend_and_the_argument_overrides_it(monkeypatch):
    monkeypatch.setenv("RLSEDIT_BACKEND", "triton")
    with pytest.raises(BackendError, match="'triton'"):
        ops.panel(*arguments("panel"))
    ops.panel(*arguments("panel"), backend="reference")
    ops.panel(*arguments("panel"), backend="auto")
    monkeypatch.setenv("RLSEDIT_BACKEND", "")
    ops.panel(*arguments("panel"))


def test_unknown_backend_lists_the_known_ones(monkeypatch):
    with pytest.raises(InputError, match="backend='gpu': expected one of auto, reference, cpu, triton, cuda"):
        ops.panel(*arguments("panel"), backend="gpu")
    monkeypatch.setenv("RLSEDIT_BACKEND", "fastest")
    with pytest.raises(InputError, match="RLSEDIT_BACKEND='fastest'"):
        ops.panel(*arguments("panel"))


def test_first_usable_backend_of_a_list_runs(monkeypatch):
    tensors = [torch.ones(3, 3), torch.ones(1, 3)]
    monkeypatch.setattr(cpu, "_problem", "it is broken")
    assert dispatch.choose("moment_", "cpu,reference", tensors) == "reference"
    monkeypatch.setattr(dispatch.load("reference"), "unsupported_reason", lambda op, tensors: "not here")
    assert dispatch.choose("moment_", "reference,cpu", tensors) == "reference", "fallback"
    monkeypatch.undo()
    monkeypatch.setenv("RLSEDIT_BACKEND", "triton,reference")
    torch.testing.assert_close(ops.panel(*arguments("panel")), reference.panel(*arguments("panel")), rtol=0, atol=0)
    for wrong in ("triton,", "triton;cuda", "auto,cuda"):
        with pytest.raises(InputError, match="separated by commas"):
            ops.panel(*arguments("panel"), backend=wrong)


def test_auto_logs_its_choice_once(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="rlsedit_fast.ops.dispatch"):
        for _ in range(3):
            ops.panel(*arguments("panel"))
    (message,) = (record.getMessage() for record in caplog.records)
    assert "panel on cpu uses backend" in message


@pytest.mark.parametrize(
    ("op", "position", "replacement"),
    [
        ("panel", 0, torch.ones(6, 5)),
        ("panel", 0, torch.ones(6)),
        ("panel", 1, torch.ones(3, 5)),
        ("panel", 1, torch.ones(3, 6, dtype=torch.float64)),
        ("panel", 2, torch.ones(())),
        ("panel", 3, torch.ones(1)),
        ("factor", 1, torch.ones(2, 6)),
        ("factor", 2, torch.ones(4, 4)),
        ("factor", 3, torch.ones(3, 1)),
        ("factor", 4, 0),
        ("downdate_", 1, torch.ones(2, 5)),
        ("downdate_", 2, torch.ones(3)),
        ("correct_", 0, torch.ones(6, 4)),
        ("correct_", 2, torch.ones(2, 6)),
        ("correct_", 3, 2),
        ("correct_split_", 0, torch.ones(4, 6)),
        ("correct_split_", 1, torch.ones(4, 6)),
        ("correct_split_", 1, torch.ones(4, 5, dtype=torch.int16)),
        ("correct_split_", 3, torch.ones(3, 6, dtype=torch.float64)),
        ("correct_split_", 4, 0),
        ("moment_", 0, torch.ones(6, 6, dtype=torch.bfloat16)),
        ("moment_", 1, torch.ones(3, 5)),
        ("moment_", 1, torch.ones(3, 6, dtype=torch.int64)),
    ],
)
def test_mismatched_arguments_raise(op, position, replacement):
    given = [*arguments(op)]
    given[position] = replacement
    with pytest.raises(InputError, match=op):
        getattr(ops, op)(*given)


@pytest.mark.parametrize("op", dispatch.OPERATIONS)
def test_batch_of_layers(op):
    singles = [[x + 0 if isinstance(x, torch.Tensor) else x for x in arguments(op)] for _ in range(3)]
    for layer, single in enumerate(singles):  # each layer has its own values
        single[-1 if op == "moment_" else 2] += layer
    stacked = [
        torch.stack(parts) if isinstance(parts[0], torch.Tensor) else parts[0] for parts in zip(*singles, strict=True)
    ]
    together = outcome(op, stacked, getattr(ops, op))
    for layer, single in enumerate(singles):
        alone = outcome(op, single, getattr(ops, op))
        if not isinstance(alone, tuple):
            alone, together = (alone,), together if isinstance(together, tuple) else (together,)
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(all_of_them[layer], one)


def test_empty_and_mismatched_batches_of_layers_raise():
    base, keys, pending, signs = arguments("panel")
    with pytest.raises(InputError, match=r"keys has shape \[3, 6\], expected \[2, any, 6\]"):
        ops.panel(torch.stack((base, base)), keys, pending, signs)
    with pytest.raises(InputError, match="at least one layer"):
        ops.panel(*(tensor[None][:0] for tensor in (base, keys, pending, signs)))


def test_import_does_not_import_triton_or_transformers():
    code = "import sys, rlsedit_fast.ops as ops; ops.available_backends(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rlsedit_fast.ops.reference" in loaded
    assert not {"triton", "transformers"} & set(loaded)


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_solver_ignores_the_global_matmul_precision(allowed, monkeypatch):
    """The user's setting is restored afterwards."""
    seen = []
    matmul = torch.backends.cuda.matmul
    real = reference.panel

    def narrow():
        return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32

    def panel(*given):
        seen.append(narrow())
        return real(*given)

    monkeypatch.setitem(reference.OPS, "panel", panel)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(allowed)
        state = rf.RLSState(torch.randn(3, 5), rf.Prior(lam=1.0), backend="reference")
        state.update(torch.randn(2, 5), torch.randn(2, 3))
        assert torch.get_float32_matmul_precision() == allowed
        assert narrow() == (allowed != "highest")
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert not any(seen)


@pytest.mark.gpu
def test_gpu_step_ignores_tf32():
    generator = torch.Generator().manual_seed(0)
    weight, keys, values = (
        torch.randn(*shape, generator=generator).cuda() for shape in ((64, 256), (32, 256), (32, 64))
    )
    states = []
    before = torch.get_float32_matmul_precision()
    try:
        for allowed in ("highest", "high"):
            torch.set_float32_matmul_precision(allowed)
            states.append(rf.RLSState(weight, rf.Prior(lam=1.0), delay=0, backend="reference"))
            states[-1].update(keys, values)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(states[0].weight, states[1].weight)
    assert torch.equal(states[0].precision_inverse(), states[1].precision_inverse())
