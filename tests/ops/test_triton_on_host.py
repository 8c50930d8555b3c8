"""The Triton kernels, as Triton compiles them for sm_80 and sm_90, executed on the CPU by bench/ptx_on_host.

The shapes are not multiples of the tiles, and small. Together they launch every configuration of the tables, which the
last test checks. Operands are surrounded by NaN and results start as NaN, and all checks of the interpreter apply.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("rlsedit_fast.kernels", reason="needs an installed package: pip install -e .")

from ptx_on_host import machine
from ptx_on_host.machine import MODES
from ptx_on_host.triton_kernels import Host, on_host

from rlsedit_fast import ops
from rlsedit_fast.kernels import correct, downdate, moment, panel, tables
from rlsedit_fast.kernels.precision import ENVIRONMENT, PRECISIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(machine.compiler() is None, reason="needs a C++ compiler"),
]

U = 2.0**-24
PRODUCT = {"tf32x3": 12, "bf16x6": 4, "ieee": 0}  # error of a product in U, see `precision.PRECISIONS`
CAPABILITIES = (80, 90)
GUARD = 64  # elements before and after an operand, a multiple of 16 to keep the alignment
LAUNCHED: dict[int, set[str]] = {capability: set() for capability in CAPABILITIES}

# Widths divisible by 16, as in models; other widths compile to other code and are in the soak tests.
# layers, d, n, pending rows
PANELS = [(1, 80, 1, 0), (2, 144, 3, 16), (1, 528, 16, 16), (1, 528, 20, 32), (1, 144, 50, 16), (1, 272, 100, 16)]
DOWNDATES = [(2, 80, 16), (1, 144, 48)]  # layers, d, rows
CORRECTS = [(2, 80, 96, 5), (1, 144, 160, 40)]  # layers, d_v, d_k, n
MOMENTS = [(1, 144, 40)]  # layers, d, rows
# Widths that are not.
ODD_PANELS = [(1, 1, 1, 0), (3, 17, 16, 7), (2, 100, 3, 9), (1, 257, 33, 40), (1, 133, 100, 7), (1, 130, 150, 9)]
ODD_DOWNDATES = [(1, 1, 1), (3, 17, 3), (2, 133, 20), (1, 257, 40)]
ODD_CORRECTS = [(1, 1, 1, 1), (3, 100, 17, 16), (1, 130, 131, 100)]
ODD_MOMENTS = [(1, 1, 1), (2, 133, 33)]

TRIANGLES = [(1, 80, 1, 0), (2, 144, 3, 16), (1, 144, 16, 0), (1, 144, 20, 16)]
ODD_TRIANGLES = [
    case for case in [*PANELS, *ODD_PANELS] if case[2] <= panel.TRIANGLE_MAX_ROWS and case not in TRIANGLES
]


def odd(case):
    return pytest.param(case, marks=pytest.mark.soak)


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    return request.param


@pytest.fixture(params=PRECISIONS)
def precision(request, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, request.param)
    return request.param


def guarded(tensor):
    """Returns a copy of the tensor within a larger one of NaN, and a function that checks the latter."""
    filler = float("nan") if tensor.is_floating_point() else 12345
    whole = tensor.new_full((tensor.numel() + 2 * GUARD,), filler)
    inner = whole[GUARD:-GUARD].view(tensor.shape).copy_(tensor)

    def check():
        outside = torch.cat((whole[:GUARD], whole[-GUARD:]))
        assert (outside.isnan() if tensor.is_floating_point() else outside == filler).all()

    return inner, check


def in_every_mode(capability, function, *tensors, processors=4):
    """Calls a function with copies of the tensors in every mode; the results must be bitwise equal."""
    results = []
    for mode in MODES:
        copies = [guarded(tensor) for tensor in tensors]
        with on_host(Host(capability, mode, processors)) as host:
            got = function(*(inner for inner, _ in copies))
        LAUNCHED[capability] |= set(host.launched)
        for _, check in copies:
            check()
        results.append([inner for inner, _ in copies] if got is None else [got])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    return results[0]


def operands(layers, d, n, r, seed=0):
    """Returns C_base, K, U_p and signs of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(layers, d, d, generator=generator)
    base = base.tril() + base.tril(-1).mT
    signs = torch.where(torch.arange(r) % 3 == 1, -1.0, 1.0).expand(layers, r).contiguous()
    return base, torch.randn(layers, n, d, generator=generator), torch.randn(layers, r, d, generator=generator), signs


def limit(terms, precision, magnitude):
    """Bounds the error of sums of `terms` products that are truncated at each step."""
    terms = 2 * terms + PRODUCT[precision]
    return terms * U / (1 - terms * U) * magnitude + torch.finfo(torch.float32).tiny


def check_panel(got, given, precision):
    base, keys, pending, signs = (tensor.double() for tensor in given)
    truth = keys @ base - ((keys @ pending.mT) * signs[:, None]) @ pending
    magnitude = keys.abs() @ base.abs() + (keys.abs() @ pending.abs().mT) @ pending.abs()
    terms = base.shape[-1] + pending.shape[-2] + 4 + PRODUCT[precision]
    assert ((got.double() - truth).abs() <= limit(terms, precision, magnitude)).all()


@pytest.mark.parametrize("case", [*PANELS, *map(odd, ODD_PANELS)], ids=str)
def test_panel(capability, precision, case):
    layers, d, n, r = case
    if n <= panel.FEW and precision != "ieee":
        pytest.skip("few rows use no matrix product")
    given = operands(layers, d, n, r)
    (got,) = in_every_mode(capability, lambda *g: ops.panel(*g, backend="triton"), *given)
    check_panel(got, given, precision)


@pytest.mark.parametrize("case", [*TRIANGLES, *map(odd, ODD_TRIANGLES)], ids=str)
def test_panel_triangle_variant(capability, precision, case):
    layers, d, n, r = case
    if n <= panel.FEW and precision != "ieee":
        pytest.skip("few rows use no matrix product")
    base, *others = operands(layers, d, n, r)
    lower = torch.where(torch.ones(d, d).tril().bool(), base, float("nan"))
    (got,) = in_every_mode(capability, lambda *g: panel.panel(*g, variant="triangle"), lower, *others)
    check_panel(got, (base, *others), precision)


@pytest.mark.parametrize("case", [*DOWNDATES, *map(odd, ODD_DOWNDATES)], ids=str)
def test_downdate(capability, precision, case):
    layers, d, r = case
    base, _, pending, signs = operands(layers, d, 1, r)
    got, *_ = in_every_mode(capability, lambda *g: ops.downdate_(*g, backend="triton"), base, pending, signs)
    truth = base.double() - (pending * signs[..., None]).double().mT @ pending.double()
    magnitude = base.double().abs() + pending.double().abs().mT @ pending.double().abs()
    assert ((got - truth).abs() <= limit(r + 3, precision, magnitude)).all()
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("case", [*CORRECTS, *map(odd, ODD_CORRECTS)], ids=str)
def test_correct_and_correct_split(capability, precision, case):
    layers, d_v, d_k, n = case
    torch.manual_seed(d_v)
    weight, whitened, rows = torch.randn(layers, d_v, d_k), torch.randn(layers, n, d_v), torch.randn(layers, n, d_k)
    truth = weight.double() - whitened.double().mT @ rows.double()
    magnitude = weight.double().abs() + whitened.double().abs().mT @ rows.double().abs()
    got, *_ = in_every_mode(capability, lambda *g: ops.correct_(*g, -1, backend="triton"), weight, whitened, rows)
    assert ((got - truth).abs() <= limit(n + 3, precision, magnitude)).all()
    high, low, *_ = in_every_mode(
        capability, lambda *g: ops.correct_split_(*g, -1, backend="triton"), *ops.split(weight), whitened, rows
    )
    assert torch.equal(ops.join(high, low), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*MOMENTS, *map(odd, ODD_MOMENTS)], ids=str)
def test_moment(capability, precision, case, dtype):
    layers, d, t = case
    base, keys, _, _ = operands(layers, d, t, 0)
    keys = keys.to(dtype)
    got, _ = in_every_mode(capability, lambda *g: ops.moment_(*g, backend="triton"), base, keys)
    truth = base.double() + keys.double().mT @ keys.double()
    magnitude = base.double().abs() + keys.double().abs().mT @ keys.double().abs()
    assert ((got - truth).abs() <= limit(t + 3, precision, magnitude)).all()
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("steps", [12, pytest.param(200, marks=pytest.mark.soak)])
def test_stream_of_updates_is_as_accurate_as_float32(capability, precision, steps):
    """Updates of an ill-conditioned C with the compiled panel and downdate, against float64 and against torch."""
    d, n = 128, 16
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    truth = (basis * torch.logspace(2, -3.3, d, dtype=torch.float64)) @ basis.mT
    truth = (truth + truth.mT) / 2
    compiled, plain = truth.float()[None].clone(), truth.float().clone()

    def whitened(keys, projected):
        sigma = torch.eye(n, dtype=keys.dtype) + projected @ keys.mT
        lower = torch.linalg.cholesky((sigma + sigma.mT) / 2)
        return torch.linalg.solve_triangular(lower, projected, upper=False)

    with on_host(Host(capability)):
        for _ in range(steps):
            keys = torch.randn(n, d, generator=generator)
            projected = ops.panel(compiled, keys[None], keys.new_empty(1, 0, d), keys.new_empty(1, 0), backend="triton")
            update = whitened(keys, projected[0])
            ops.downdate_(compiled, update[None].contiguous(), torch.ones(1, n), backend="triton")
            update = whitened(keys, keys @ plain)
            plain.addmm_(update.mT, update, alpha=-1)
            update = whitened(keys.double(), keys.double() @ truth)
            truth = truth - update.mT @ update
    off, off_plain = ((c.double() - truth).norm() for c in (compiled[0], plain))
    assert off <= 2 * off_plain


def configurations(capability):
    """Yields the kernels with the settings of every entry of the tables."""
    for precision in PRECISIONS:
        launches = []
        for n in (1, panel.FEW, 16, 32, 64, panel.MAX_ROWS):
            if n > panel.FEW or precision == "ieee":
                launches.append((panel.rows_kernel, "panel", n, {"EDITS": n}))
                if n <= panel.TRIANGLE_MAX_ROWS:
                    launches.append((panel.triangle_kernel, "panel_triangle", n, {"EDITS": n}))
        for n in (16, panel.FINISH_MAX_ROWS):
            for block in (0, 128):
                launches.append((panel.finish_kernel, "panel_finish", n, {"EDITS": n, "BLOCK": block}))
        for table, kernels in (
            ("downdate", (downdate.downdate_kernel,)),
            ("correct", (correct.correct_kernel, correct.correct_split_kernel)),
            ("moment", (moment.moment_kernel,)),
        ):
            for entry in tables.table(table).get(f"sm_{capability}") or tables.table(table)[tables.DEFAULT]:
                for kernel in kernels:
                    launches.append((kernel, table, entry["rows"], {"WIDEN": False}))
                    if kernel is moment.moment_kernel:
                        launches.append((kernel, table, entry["rows"], {"WIDEN": False, "PRECISION": "ieee"}))
        for kernel, table, rows, constants in launches:
            settings = tables.configuration(table, f"sm_{capability}", rows, precision)
            settings = {"PRECISION": precision, **settings, **constants}
            names = [name for name in kernel.arg_names if name.isupper()]
            text = " ".join(f"{name}={settings[name]}" for name in names)
            yield f"{kernel.fn.__name__} {text} warps={settings['num_warps']} stages={settings['num_stages']}"


def test_every_configuration_was_launched(capability, request):
    """Runs after the others. The kernels that a launch uses do not depend on whether all tests are selected."""
    others = sum(
        item.path == request.path and f"[{capability}-" in item.name and item is not request.node
        for item in request.session.items
    )
    wanted = len(PRECISIONS) * (len(PANELS) + len(TRIANGLES) + len(DOWNDATES) + len(CORRECTS) + 3 * len(MOMENTS))
    if others < wanted:
        pytest.skip("only some tests of this file are selected")
    assert set(configurations(capability)) <= LAUNCHED[capability]
