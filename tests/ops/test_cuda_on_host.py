"""The CUDA kernels, as nvcc and NVRTC compile them, executed on the CPU by bench/ptx_on_host.

Operands are surrounded by NaN, outputs and workspaces start as NaN, and an access outside an operand is an error.
Blocks and warps run in forward and reverse order with bitwise equal results. Accesses of different threads with no
barrier between them are errors. docs/kernels.md describes what this cannot show.
"""

from __future__ import annotations

import pytest
import torch
from ptx_on_host import cuda_kernels
from ptx_on_host.machine import MODES, compiler

from rlsedit_fast import ops
from rlsedit_fast.ops import cuda, cuda_launch, cuda_plan, reference

U = 2.0**-24
GUARD = 256  # elements before and after a tensor

# layers, n, d_k, d_v; a panel has 128 edits, a tile of Sig 64, a chunk 32, a slab 16
FACTOR_SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 17, 5),
    (1, 16, 64, 4),
    (3, 17, 100, 33),
    (1, 64, 257, 3),
    (2, 65, 36, 130),
    (1, 100, 24, 8),
    (1, 128, 132, 1),
    (2, 129, 20, 7),
    (1, 160, 260, 40),
    (1, 257, 12, 129),
]
# layers, d, r, extra columns per row of C
DOWNDATE_SHAPES = [
    (1, 1, 1, 0),
    (3, 5, 7, 0),
    (1, 64, 8, 0),
    (2, 100, 9, 3),
    (1, 128, 33, 4),
    (2, 129, 16, 0),
    (1, 260, 20, 0),
    (1, 385, 3, 1),
]


# layers, n, d, extra columns per row of C; a strip has 128 rows, a tile 64 columns, a chunk 8 tiles
PANEL_SHAPES = [
    (1, 1, 1, 0),
    (2, 3, 17, 0),
    (1, 4, 64, 4),
    (3, 2, 65, 0),
    (1, 5, 128, 1),
    (2, 8, 131, 0),
    (1, 7, 260, 0),
    (1, 1, 700, 0),
]


class Guarded:
    """Tensors with NaN (or a sentinel) before and after them."""

    def __init__(self):
        self.all = []

    def __call__(self, values, offset=0):
        """Returns a copy of `values`; `offset` shifts it from 16-byte alignment."""
        poison = float("nan") if values.dtype.is_floating_point else -77
        flat = torch.full((values.numel() + 2 * GUARD,), poison, dtype=values.dtype)
        inner = flat[GUARD + offset : GUARD + offset + values.numel()].view(values.shape)
        inner.copy_(values)
        self.all.append((flat, inner))
        return inner

    def empty(self, *shape, dtype=torch.float32):
        return self(torch.full(shape, float("nan") if dtype.is_floating_point else -77, dtype=dtype))

    def check(self):
        for flat, inner in self.all:
            start = (inner.data_ptr() - flat.data_ptr()) // flat.element_size()
            outside = torch.cat((flat[:start], flat[start + inner.numel() :]))
            assert (outside.isnan() if flat.dtype.is_floating_point else outside == -77).all()


def run(library, launches):
    for launch in launches:
        library.launch(launch, 0, 0)


def factor(library, projected, keys, innovation, noise, sign, offset=0):
    """Returns the four results of the kernels and checks the guards."""
    layers, n, d_k = projected.shape
    guarded = Guarded()
    given = [guarded(t, offset) for t in (projected, keys, innovation, noise)]
    outputs = (
        guarded.empty(layers, n, d_k),
        guarded.empty(*innovation.shape),
        guarded.empty(layers, n, n),
        guarded.empty(layers, dtype=torch.int32),
    )
    workspace = tuple(guarded.empty(*shape) for shape in cuda_plan.factor_workspace(layers, n, d_k))
    run(library, cuda_plan.factor(*given, sign, outputs, workspace))
    guarded.check()
    for now, before in zip(given, (projected, keys, innovation, noise), strict=True):
        assert torch.equal(now.view(torch.int32), before.view(torch.int32))
    return outputs


def innovations(layers, n, d_k, d_v, sign, condition=1e5, seed=0):
    """Returns F, K, E and noise for an ill-conditioned C per layer."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(layers, n, d_k, generator=generator)
    if n > 2:  # similar keys: Sig is ill-conditioned
        keys[:, 1] = keys[:, 0] * (1 + 1e-3)
    basis = torch.linalg.qr(torch.randn(layers, d_k, d_k, dtype=torch.float64, generator=generator)).Q
    spectrum = torch.logspace(2, 2 - torch.tensor(condition).log10().item(), d_k, dtype=torch.float64)
    projected = (keys.double() @ ((basis * spectrum) @ basis.mT)).float()
    noise = torch.linspace(0.5, 2, n).expand(layers, n).clone()
    if sign < 0:
        gram = projected.double() @ keys.double().mT
        noise += 1.1 * torch.linalg.eigvalsh(gram)[:, -1:].float()
    return projected, keys, torch.randn(layers, n, d_v, generator=generator), noise


def bound(terms, magnitude):
    return terms * U / (1 - terms * U) * magnitude + torch.finfo(torch.float32).tiny


def check_factor(library, shape, sign, offset=0):
    """Checks backward errors: L L^T = Sig, L U = F and L A = E up to rounding."""
    layers, n, d_k, d_v = shape
    given = innovations(layers, n, d_k, d_v, sign)
    u, a, lower, info = factor(library, *given, sign, offset)
    assert (info == 0).all()
    assert torch.equal(lower, lower.tril())
    f, k, e, w = (t.double() for t in given)
    lower64 = lower.double()
    gram = f @ k.mT
    sigma = torch.diag_embed(w) + sign * (gram + gram.mT) / 2
    magnitude = torch.diag_embed(w) + (f.abs() @ k.abs().mT + k.abs() @ f.abs().mT) / 2
    off = (lower64 @ lower64.mT - sigma).tril().abs()
    assert (off <= bound(d_k + 4, magnitude) + bound(n + 4, lower64.abs() @ lower64.abs().mT)).all()
    for solved, right in ((u.double(), f), (a.double(), e)):
        off = (lower64 @ solved - right).abs()
        assert (off <= bound(n + 4, lower64.abs() @ solved.abs())).all()
    return u, a, lower


def downdates(layers, d, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(layers, d, d, generator=generator)
    base = base.tril() + base.tril(-1).mT
    pending = torch.randn(layers, r, d, generator=generator)
    return base, pending, torch.where(torch.rand(layers, r, generator=generator) < 0.3, -1.0, 1.0)


def check_downdate(library, shape, offset=0):
    layers, d, r, extra = shape
    base, pending, signs = downdates(layers, d, r)
    guarded = Guarded()
    wide = guarded(torch.nn.functional.pad(base, (0, extra), value=float("nan")), offset)
    got = wide[..., :d]
    run(library, cuda_plan.downdate(got, guarded(pending, offset), guarded(signs)))
    guarded.check()
    assert wide[..., d:].isnan().all()
    for layer in range(layers):
        truth, rows = base[layer].double(), pending[layer].double()
        reference.downdate_(truth, rows, signs[layer].double())
        magnitude = base[layer].double().abs() + rows.abs().T @ rows.abs()
        assert ((got[layer].double() - truth).abs() <= bound(r + 3, magnitude)).all()
        assert torch.equal(got[layer], got[layer].T)
    return got.clone()


def check_panel(library, shape, offset=0):
    layers, n, d, extra = shape
    base, keys, _ = downdates(layers, d, n)
    guarded = Guarded()
    upper = torch.where(torch.ones(d, d).triu().bool(), base, float("nan"))  # the lower triangle must not be read
    padded = guarded(torch.nn.functional.pad(upper, (0, extra), value=float("nan")), offset)[..., :d]
    projected = guarded.empty(layers, n, d)
    workspace = tuple(guarded.empty(*shape) for shape in cuda_plan.panel_workspace(layers, n, d))
    run(library, cuda_plan.panel(padded, guarded(keys, offset), projected, workspace))
    guarded.check()
    off = (projected.double() - keys.double() @ base.double()).abs()
    assert (off <= bound(d + 4, keys.double().abs() @ base.double().abs())).all()
    return projected.clone()


@pytest.fixture(scope="module", params=["nvrtc", "nvcc"])
def kernels(request):
    """Returns the kernels of a compiler in both orders of execution."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    try:
        text = {"nvrtc": cuda_kernels.nvrtc_ptx, "nvcc": cuda_kernels.nvcc_ptx}[request.param]()
    except cuda_kernels.Missing as error:
        pytest.skip(str(error))
    return tuple(cuda_kernels.Kernels(text, mode) for mode in MODES)


@pytest.fixture
def library(kernels):
    return kernels[0]


@pytest.fixture
def both_ways(kernels):
    """Calls a function in forward and reverse order and compares the results bitwise."""

    def call(function, *arguments):
        results = []
        for library in kernels:
            got = function(library, *arguments)
            results.append(got if isinstance(got, tuple) else (got,))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)

    return call


@pytest.mark.parametrize("shape", FACTOR_SHAPES, ids=str)
def test_factor(both_ways, shape):
    both_ways(check_factor, shape, 1)


@pytest.mark.parametrize("shape", FACTOR_SHAPES[:8], ids=str)
def test_factor_of_a_removal(library, shape):
    check_factor(library, shape, -1)


def test_factor_of_unaligned_operands(library):
    check_factor(library, (2, 20, 40, 8), 1, offset=1)


@pytest.mark.parametrize(("n", "at"), [(5, 3), (40, 1), (128, 128), (150, 40), (150, 140), (258, 257)])
def test_factor_reports_the_first_failed_pivot_per_layer(library, n, at):
    keys = torch.eye(n, n + 3).expand(2, n, n + 3).clone()
    noise = torch.ones(2, n)
    noise[1, at - 1 :: 7] = 0.5  # Sig = noise - 0.75
    *_, info = factor(library, 0.75 * keys, keys, torch.ones(2, n, 2), noise, -1)
    assert info.tolist() == [0, at]


def test_factor_reports_the_pivot_of_a_nan(library):
    keys = torch.eye(6, 8)[None]
    noise = torch.ones(1, 6)
    noise[0, 3] = float("nan")
    *_, info = factor(library, 0.5 * keys, keys, torch.ones(1, 6, 2), noise, 1)
    assert info.tolist() == [4]


@pytest.mark.parametrize("shape", DOWNDATE_SHAPES, ids=str)
def test_downdate(both_ways, shape):
    both_ways(check_downdate, shape)


def test_downdate_of_unaligned_operands(library):
    check_downdate(library, (1, 132, 5, 0), offset=3)


@pytest.mark.parametrize("shape", PANEL_SHAPES, ids=str)
def test_panel(both_ways, shape):
    both_ways(check_panel, shape)


def test_panel_of_unaligned_operands(library):
    check_panel(library, (1, 3, 132, 0), offset=1)


@pytest.fixture
def on_host(library, monkeypatch):
    """Runs the backend on the CPU with the host library."""
    monkeypatch.setattr(cuda_launch, "launcher", lambda: library)
    monkeypatch.setattr(cuda_launch, "_where", lambda device: (0, 0))
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(cuda, "unsupported_reason", lambda op, tensors: None)


@pytest.mark.parametrize("layers", [None, 3])
def test_backend_with_public_operations(on_host, layers):
    projected, keys, innovation, noise = innovations(layers or 1, 20, 33, 6, 1)
    base, pending, signs = downdates(layers or 1, 33, 4)
    given, state = [projected, keys, innovation, noise], [base, pending, signs]
    if layers is None:
        given, state = [t[0] for t in given], [t[0] for t in state]
    given[1] = given[1].mT.contiguous().mT  # not contiguous
    u, a, lower, info = ops.factor(*given, 1, backend="cuda")
    expected = factor(cuda_launch.launcher(), projected, keys, innovation, noise, 1)
    for got, whole in zip((u, a, lower, info), expected, strict=True):
        assert torch.equal(got, whole if layers else whole[0])
    keys = given[1][..., :5, :]
    got = ops.panel(state[0], keys, *state[1:], backend="cuda")
    truth = ops.panel(state[0].double(), keys.double(), *(t.double() for t in state[1:]), backend="reference")
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-4)
    truth = state[0].double()
    ops.downdate_(truth, *(t.double() for t in state[1:]), backend="reference")
    ops.downdate_(state[0], *state[1:], backend="cuda")
    torch.testing.assert_close(state[0].double(), truth, rtol=1e-5, atol=1e-5)
    before = state[0].clone()
    ops.downdate_(state[0], state[1][..., :0, :], state[2][..., :0], backend="cuda")
    assert torch.equal(state[0], before)
