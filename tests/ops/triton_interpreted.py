"""The Triton kernels in Triton's interpreter against float64, run by test_triton_kernels in a separate process.

The interpreter multiplies in float32 for every precision and runs programs sequentially, so these tests use float32
bounds and cannot detect tensor core errors or races.
"""

from __future__ import annotations

import pytest
import torch

from rlsedit_fast import ops
from rlsedit_fast.kernels import correct, downdate, moment, panel, tables

U = 2.0**-24
EMPTY = 12345  # padding of int16 tensors

# (layers, d, n, r): every n and every kind of width, with and without pending rows
CASES = [
    (1, 1, 1, 0),
    (1, 3, 3, 1),
    (3, 17, 16, 7),
    (1, 64, 64, 0),
    (3, 100, 17, 40),
    (1, 257, 1, 33),
    (1, 257, 100, 7),
    (1, 512, 3, 0),
    (1, 512, 17, 1),
    (1, 130, 150, 9),
]


def bound(terms, magnitude):
    """Returns the error bound of float32 sums of `terms` products in any order."""
    return terms * U / (1 - terms * U) * magnitude + torch.finfo(torch.float32).tiny


def around(tensor):
    """Returns a copy of the tensor as a view of a larger tensor of NaN (or `EMPTY`), and the larger tensor."""
    *layers, height, width = tensor.shape
    filler = float("nan") if tensor.is_floating_point() else EMPTY
    whole = tensor.new_full((*(size + 1 for size in layers), height + 3, width + 5), filler)
    view = whole[tuple(slice(size) for size in layers)][..., 1 : height + 1, 2 : width + 2]
    view.copy_(tensor)
    return view, whole


def untouched(view, whole):
    """Returns whether the padding around the view is unmodified; clears the view."""
    view.fill_(float("nan") if view.is_floating_point() else EMPTY)
    return bool((whole.isnan() if whole.is_floating_point() else whole == EMPTY).all())


def operands(layers, d, n, r, seed=0):
    """Returns C_base, K, U_p and signs of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(layers, d, d, generator=generator)
    base = base.tril() + base.tril(-1).mT
    signs = torch.where(torch.arange(r) % 3 == 1, -1.0, 1.0).expand(layers, r).contiguous()
    return (
        base,
        torch.randn(layers, n, d, generator=generator),
        torch.randn(layers, r, d, generator=generator),
        signs,
    )


def check_panel(got, base, keys, pending, signs):
    base, keys, pending, signs = (tensor.double() for tensor in (base, keys, pending, signs))
    truth = keys @ base - ((keys @ pending.mT) * signs[:, None]) @ pending
    magnitude = keys.abs() @ base.abs() + (keys.abs() @ pending.abs().mT) @ pending.abs()
    terms = base.shape[-1] + pending.shape[-2] + 4
    assert got.shape == truth.shape
    assert ((got.double() - truth).abs() <= bound(terms, magnitude)).all()


@pytest.mark.parametrize(("layers", "d", "n", "r"), CASES)
def test_panel(layers, d, n, r):
    given = operands(layers, d, n, r)
    views = [around(tensor) for tensor in given[:3]]
    check_panel(ops.panel(*(view for view, _ in views), given[3], backend="triton"), *given)
    assert all(untouched(*pair) for pair in views)


@pytest.mark.parametrize(("layers", "d", "n", "r"), [case for case in CASES if case[2] <= panel.TRIANGLE_MAX_ROWS])
def test_panel_triangle_variant(layers, d, n, r):
    base, *others = operands(layers, d, n, r)
    lower = torch.where(torch.ones(d, d).tril().bool(), base, float("nan"))
    check_panel(panel.panel(lower, *others, variant="triangle"), base, *others)


@pytest.mark.parametrize("capability", ["default", "sm_90"])
@pytest.mark.parametrize("processors", [1, 132])
def test_panel_splits_of_every_table(capability, processors, monkeypatch):
    assert capability in tables.table("panel")
    monkeypatch.setattr(panel, "device", lambda index: (capability, processors))
    for n in (1, 4, 16, 33):
        given = operands(1, 300, n, 20)
        for variant in panel.VARIANTS if n <= panel.TRIANGLE_MAX_ROWS else ("full",):
            check_panel(panel.panel(*given, variant=variant), *given)


@pytest.mark.parametrize("variant", panel.VARIANTS)
def test_panel_is_deterministic(variant):
    given = operands(3, 100, 5, 7)
    together = panel.panel(*given, variant=variant)
    assert torch.equal(panel.panel(*given, variant=variant), together)
    for layer in range(3):
        # A separate launch can be split differently, so the result is not bitwise equal.
        alone = panel.panel(*(tensor[layer : layer + 1] for tensor in given), variant=variant)
        torch.testing.assert_close(alone[0], together[layer], rtol=1e-5, atol=1e-4)


def test_panel_of_transposed_views_and_no_rows():
    base, keys, pending, signs = operands(1, 40, 3, 4)
    columns = [tensor[0].T.contiguous().T for tensor in (base, keys, pending)]
    check_panel(ops.panel(*columns, signs[0], backend="triton")[None], base, keys, pending, signs)
    assert ops.panel(base, keys[:, :0], pending, signs, backend="triton").shape == (1, 0, 40)


@pytest.mark.parametrize(
    ("layers", "d", "r"), [(1, 1, 1), (3, 17, 3), (1, 64, 64), (1, 100, 0), (3, 257, 7), (1, 512, 40)]
)
def test_downdate(layers, d, r):
    base, _, pending, signs = operands(layers, d, 1, r)
    (got, whole), (rows, around_rows) = around(base), around(pending)
    ops.downdate_(got, rows, signs, backend="triton")
    truth = base.double() - (pending * signs[..., None]).double().mT @ pending.double()
    magnitude = base.double().abs() + pending.double().abs().mT @ pending.double().abs()
    assert ((got - truth).abs() <= bound(r + 3, magnitude)).all()
    assert torch.equal(got, got.mT)
    assert untouched(got, whole)
    assert untouched(rows, around_rows)


def test_downdate_tiles_of_every_table(monkeypatch):
    for capability in tables.table("downdate"):
        monkeypatch.setattr(downdate, "device", lambda index, capability=capability: (capability, 132))
        for r in (20, 100):
            base, _, pending, signs = operands(1, 300, 1, r)
            got = base.clone()
            downdate.downdate_(got, pending, signs, input_precision="tf32x3")  # no bf16x6 in the interpreter
            truth = base.double() - (pending * signs[..., None]).double().mT @ pending.double()
            magnitude = base.double().abs() + pending.double().abs().mT @ pending.double().abs()
            assert ((got - truth).abs() <= bound(r + 3, magnitude)).all()
            assert torch.equal(got, got.mT)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("layers", "d_v", "d_k", "n"),
    [(1, 1, 1, 1), (1, 5, 100, 3), (3, 100, 17, 16), (1, 257, 130, 17), (1, 130, 300, 100)],
)
def test_correct_and_correct_split(layers, d_v, d_k, n, transposed, sign):
    torch.manual_seed(d_v)
    weight, whitened, rows = torch.randn(layers, d_v, d_k), torch.randn(layers, n, d_v), torch.randn(layers, n, d_k)
    truth = weight.double() + sign * whitened.double().mT @ rows.double()
    limit = bound(n + 3, weight.double().abs() + whitened.double().abs().mT @ rows.double().abs())
    laid = weight.mT.clone(memory_format=torch.contiguous_format).mT if transposed else weight
    (got, whole), (a, around_a), (u, around_u) = around_as(laid), around(whitened), around(rows)
    ops.correct_(got, a, u, sign, backend="triton")
    assert ((got - truth).abs() <= limit).all()

    (high, whole_high), (low, whole_low) = (around_as(half) for half in ops.split(laid))
    ops.correct_split_(high, low, a, u, sign, backend="triton")
    joined = ops.join(high, low)
    assert ((joined - truth).abs() <= limit).all()
    again = ops.split(joined)  # rounded like ops.split, not truncated
    assert torch.equal(again[0], high)
    assert torch.equal(again[1], low)
    everything = [(got, whole), (high, whole_high), (low, whole_low), (a, around_a), (u, around_u)]
    assert all(untouched(*pair) for pair in everything)


def around_as(tensor):
    """`around` with the memory order of the tensor."""
    if tensor.stride(-1) == 1:
        return around(tensor)
    view, whole = around(tensor.mT)
    return view.mT, whole


def test_correct_split_with_any_strides_and_special_values():
    weight = torch.tensor([[1.0, float("inf"), -0.0], [float("nan"), 3.3895e38, 1e-42]])
    expected = weight + torch.ones(2, 1) @ torch.tensor([[0.0, 1.0, 0.0]])
    high, low = ops.split(weight)
    high, spread = high.clone(), torch.zeros(2, 6, dtype=torch.int16)[:, ::2]
    spread.copy_(low)
    ops.correct_split_(high, spread, torch.ones(1, 2), torch.tensor([[0.0, 1.0, 0.0]]), 1, backend="triton")
    joined = ops.join(high, spread)
    torch.testing.assert_close(joined, expected, rtol=0, atol=0, equal_nan=True)
    assert joined.signbit().tolist()[0] == expected.signbit().tolist()[0]


def test_correct_split_keeps_every_nan():
    payloads = torch.tensor([*(1 << bit for bit in range(23)), 0x7FFFFF])
    rows = torch.cat([payloads | 0x7F800000, payloads | -0x800000]).to(torch.int32).view(torch.float32)[None]
    high, low = ops.split(torch.randn(3, rows.shape[1]))
    ops.correct_split_(high, low, torch.ones(1, 3), rows, 1, backend="triton")
    assert high.isnan().all()
    assert ops.join(high, low).isnan().all()


def test_correct_tiles_of_every_table(monkeypatch):
    for capability in tables.table("correct"):
        monkeypatch.setattr(correct, "device", lambda index, capability=capability: (capability, 132))
        for n in (20, 100):
            weight, whitened, rows = torch.randn(1, 140, 200), torch.randn(1, n, 140), torch.randn(1, n, 200)
            truth = weight.double() - whitened.double().mT @ rows.double()
            limit = bound(n + 3, weight.double().abs() + whitened.double().abs().mT @ rows.double().abs())
            high, low = ops.split(weight)
            correct.correct_(weight, whitened, rows, -1, input_precision="tf32x3")
            correct.correct_split_(high, low, whitened, rows, -1, input_precision="tf32x3")
            assert ((weight - truth).abs() <= limit).all()
            assert torch.equal(ops.join(high, low), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layers", "d", "t"), [(1, 1, 1), (3, 17, 3), (1, 100, 100), (1, 257, 33), (1, 64, 0)])
def test_moment(layers, d, t, dtype):
    base, keys, _, _ = operands(layers, d, t, 0)
    keys = keys.to(dtype)
    (got, whole), (rows, around_rows) = around(base), around(keys)
    ops.moment_(got, rows, backend="triton")
    truth = base.double() + keys.double().mT @ keys.double()
    magnitude = base.double().abs() + keys.double().abs().mT @ keys.double().abs()
    assert ((got - truth).abs() <= bound(t + 3, magnitude)).all()
    assert torch.equal(got, got.mT)
    assert untouched(got, whole)
    assert untouched(rows, around_rows)


@pytest.mark.parametrize("name", ["tf32x3", "ieee"])  # the interpreter does not support bf16x6
def test_precision_from_environment_and_argument(name, monkeypatch):
    given = operands(1, 20, 3, 2)
    seen = []
    launch = panel.rows_kernel.run
    monkeypatch.setattr(
        panel.rows_kernel,
        "run",
        lambda *a, PRECISION, **k: seen.append(PRECISION) or launch(*a, PRECISION=PRECISION, **k),
    )
    monkeypatch.setenv("RLSEDIT_TRITON_PRECISION", name)
    ops.panel(*given, backend="triton")
    panel.panel(*given, input_precision="tf32x3")
    assert seen == [name, "tf32x3"]


@pytest.mark.parametrize("op", ["panel", "downdate_", "correct_", "correct_split_", "moment_"])
def test_rejected_precision_raises(op, monkeypatch):
    base, keys, pending, signs = operands(1, 20, 3, 2)
    weight = base.clone()
    halves = ops.split(weight)
    given = {
        "panel": (base, keys, pending, signs),
        "downdate_": (base, pending, signs),
        "correct_": (weight, keys, keys, 1),
        "correct_split_": (*halves, keys, keys, 1),
        "moment_": (base, keys),
    }[op]
    before = [tensor.clone() for tensor in given if isinstance(tensor, torch.Tensor)]
    monkeypatch.setenv("RLSEDIT_TRITON_PRECISION", "tf32")
    with pytest.raises(ValueError, match=r"RLSEDIT_TRITON_PRECISION='tf32' is not supported: .*positive definiteness"):
        getattr(ops, op)(*given, backend="triton")
    after = [tensor for tensor in given if isinstance(tensor, torch.Tensor)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_unsupported_arguments_raise():
    base, keys, pending, signs = operands(1, 20, 40, 2)
    with pytest.raises(ValueError, match="variant='half': expected one of full, triangle"):
        panel.panel(base, keys, pending, signs, variant="half")
    with pytest.raises(ValueError, match="at most 32 rows of keys, got 40"):
        panel.panel(base, keys, pending, signs, variant="triangle")
    with pytest.raises(RuntimeError, match=r"float32 only, got torch\.float64"):
        ops.moment_(base.double(), keys, backend="triton")
    with pytest.raises(RuntimeError, match=r"rows must be float32, bfloat16 or float16, got torch\.float64"):
        ops.moment_(base, keys.double(), backend="triton")
    with pytest.raises(RuntimeError, match="contiguous rows or columns"):
        ops.downdate_(torch.zeros(1, 40, 40)[:, ::2, ::2], pending, signs, backend="triton")
    with pytest.raises(RuntimeError, match="it does not implement factor"):
        ops.factor(keys, keys, keys, torch.ones(1, 40), 1, backend="triton")
    assert moment.moment_(base, keys[:, :0]) is None
