"""Every backend matches the float64 reference within float32 error bounds.

The error of a float32 sum of k products, in any order, is at most k u / (1 - k u) times the sum of their magnitudes,
with u = 2^-24. The tests require this elementwise (plus a few roundings), or twice the error of torch in float32.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from rlsedit_fast import doctor, ops
from rlsedit_fast.ops import cpu, cuda, cuda_launch, dispatch, reference
from rlsedit_fast.ops.sizes import size_class

U = 2.0**-24
WIDTHS = (1, 3, 17, 64, 100, 257)
EDITS = (1, 3, 7, 16, 17, 64, 100)
PENDING = (0, 1, 7)

BACKENDS = [
    pytest.param("reference", "cpu", id="reference-cpu"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]


def needs(backend, op):
    module = dispatch.load(backend)
    if op not in module.OPS:
        pytest.skip(f"{backend} does not implement {op}")
    if (reason := module.unavailable_reason()) is None:
        return
    build = doctor.report()["build"].get("cpu", {})
    if backend == "cpu" and "OpenMP" not in reason and (build.get("built") or "failed" in build.get("reason", "")):
        pytest.fail(f"a compiler is available, but {reason}: {build}")
    pytest.skip(reason)


def bound(terms, magnitude, backend="reference"):
    """Returns the error bound of sums of `terms` products; on tensor cores eight times that of float32.

    The error of a tf32x3 product is at most 3 x 2^-22, or 12 u: the remainders of both operands after two tf32 parts of
    11 bits, and the omitted product of the two small parts. A sum is truncated (2 u) and can be aligned to one bit less
    (4 u). For k terms this is (4 k + 12) u, at most 8 k u for k >= 3.
    """
    u = U * (8 if backend == "triton" else 1)
    return terms * u / (1 - terms * u) * magnitude + torch.finfo(torch.float32).tiny


@cache
def symmetric(d, *, condition=1e5, seed=0):
    """Returns a read-only symmetric float32 matrix with eigenvalues from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    matrix = (basis * torch.logspace(0, -torch.tensor(condition).log10().item(), d, dtype=torch.float64)) @ basis.T
    return ((matrix + matrix.T) / 2).float()


def operands(d, n, r, seed=1):
    """Returns C_base, K, U_p and signs of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    pending = 0.1 * torch.randn(r, d, generator=generator)
    signs = torch.where(torch.arange(r) % 3 == 1, -1.0, 1.0)
    return symmetric(d), torch.randn(n, d, generator=generator), pending, signs


def check_panel(got, base, keys, pending, signs, backend="reference"):
    base, keys, pending, signs = (t.double().cpu() for t in (base, keys, pending, signs))
    truth = reference.panel(base, keys, pending, signs)
    terms = base.shape[0] + pending.shape[0] + 4
    magnitude = keys.abs() @ base.abs() + (keys.abs() @ pending.abs().T) @ pending.abs()
    assert got.shape == truth.shape
    assert ((got.double().cpu() - truth).abs() <= bound(terms, magnitude, backend)).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("d", WIDTHS)
def test_panel(backend, device, d):
    needs(backend, "panel")
    for n in EDITS:
        for r in PENDING:
            given = [t.to(device) for t in operands(d, n, r)]
            if dispatch.unsupported_reason(backend, "panel", given):
                continue  # the cuda backend supports few edits
            check_panel(ops.panel(*given, backend=backend), *given)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("d", [*WIDTHS, 1100])  # 1100: two strips of columns, many blocks of rows
def test_native_panel_in_every_instruction_set(isa, d):
    needs("cpu", "panel")
    if not cpu.runs(isa):
        pytest.skip(f"this processor has no {isa}")
    for n in (*EDITS, 2, 4, 5, 8, 12, 13, 24, 25, 33, 45, 49):
        given = operands(d, n, 0)
        check_panel(cpu.native_panel(given[0], given[1], isa), *given)


def test_native_panel_is_as_accurate_as_torch():
    needs("cpu", "panel")
    base, keys, *_ = operands(700, 48, 0)
    truth = keys.double() @ base.double()
    ours, theirs = (cpu.native_panel(base, keys) - truth).norm(), (keys @ base - truth).norm()
    assert ours <= 2 * theirs


def test_native_panel_reads_one_triangle_with_any_stride():
    needs("cpu", "panel")
    base, keys, _, _ = operands(100, 9, 0)
    wide = torch.full((100, 113), float("nan"))
    wide[:, :100] = torch.where(torch.ones(100, 100).tril().bool(), base, float("nan"))
    assert torch.equal(cpu.native_panel(wide[:, :100], keys), cpu.native_panel(base, keys))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Few and many edits, with and without a remainder of whole vectors.
@pytest.mark.parametrize("n", [3, 17, 48, 49])
@pytest.mark.parametrize("d", [257, 1100])
@pytest.mark.usefixtures("threads")
def test_native_panel_is_deterministic_for_any_number_of_threads(d, n):
    needs("cpu", "panel")
    given = operands(d, n, 0)
    first = cpu.native_panel(*given[:2])
    check_panel(first, *given)
    assert all(torch.equal(cpu.native_panel(*given[:2]), first) for _ in range(4))


def test_panel_uses_torch_with_many_threads(monkeypatch):
    """The sums of all threads would use as much memory as C."""
    needs("cpu", "panel")
    base, keys, pending, signs = operands(1100, 100, 3)
    native, calls = cpu.native_panel, []
    monkeypatch.setattr(cpu, "native_panel", lambda *given: calls.append(1) or native(*given))
    for threads, expected in ((2, 1), (64, 0)):
        calls.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        check_panel(cpu.panel(base, keys, pending, signs), base, keys, pending, signs)
        assert len(calls) == expected


def check_factor(outputs, projected, keys, innovation, noise, sign):
    """Checks backward errors, which do not depend on the condition: L L^T = Sig, L U = F and L A = E up to rounding."""
    u, a, lower = (t.double().cpu() for t in outputs[:3])
    assert outputs[3].item() == 0
    assert torch.equal(lower, lower.tril())
    n, d = keys.shape
    f, k, e, w = (t.double() for t in (projected, keys, innovation, noise))
    gram = f @ k.T
    sigma = w.diag() + sign * (gram + gram.T) / 2
    magnitude = w.diag() + (f.abs() @ k.abs().T + k.abs() @ f.abs().T) / 2
    recomposed = (lower @ lower.T - sigma).tril().abs()
    assert (recomposed <= bound(d + 4, magnitude) + bound(n + 4, lower.abs() @ lower.abs().T)).all()
    for solved, right in ((u, f), (a, e)):
        assert solved.shape == right.shape
        assert ((lower @ solved - right).abs() <= bound(n + 4, lower.abs() @ solved.abs())).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("sign", [1, -1])
def test_factor(backend, device, d, sign):
    needs(backend, "factor")
    for n in EDITS:
        base, keys, _, _ = operands(d, n, 0)
        projected = keys @ base
        noise = torch.linspace(0.5, 2, n)
        if sign < 0:  # Sig must stay positive definite
            noise = noise + 1.1 * torch.linalg.eigvalsh(projected.double() @ keys.double().T)[-1].float()
        innovation = torch.randn(n, 5, generator=torch.Generator().manual_seed(d))
        given = [t.to(device) for t in (projected, keys, innovation, noise)]
        check_factor(ops.factor(*given, sign, backend=backend), projected, keys, innovation, noise, sign)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("n", [20, 129, 300, 700])
def test_factor_of_many_edits_and_several_layers(backend, device, n):
    needs(backend, "factor")
    keys = torch.randn(2, n, 257, generator=torch.Generator().manual_seed(n))
    projected, innovation = keys @ symmetric(257), torch.flip(keys, (2,))[..., :5]
    noise = torch.linspace(0.5, 2, n).expand(2, n)
    given = (projected, keys, innovation, noise)
    outputs = ops.factor(*(t.to(device) for t in given), 1, backend=backend)
    for layer in range(2):
        check_factor([t[layer] for t in outputs], *(t[layer] for t in given), 1)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_factor_of_nearly_parallel_keys(backend, device, scale):
    needs(backend, "factor")
    generator = torch.Generator().manual_seed(3)
    d, n = 300, 100
    one = torch.randn(1, d, generator=generator)
    keys = scale * (one + 1e-3 * torch.randn(n, d, generator=generator)) / d**0.5
    innovation, noise = torch.randn(n, 24, generator=generator), torch.ones(n)
    given = [t.to(device) for t in (keys, keys, innovation, noise)]
    check_factor(ops.factor(*given, 1, backend=backend), keys, keys, innovation, noise, 1)


@pytest.mark.parametrize("d", [1, 64, 65, 255, 256, 257, 513, 1000])
@pytest.mark.usefixtures("threads")
def test_mirror(d):
    needs("cpu", "downdate_")
    matrix = torch.randn(d, d, generator=torch.Generator().manual_seed(d))
    whole = matrix.tril() + matrix.tril(-1).T
    cpu._mirror_(matrix)
    assert torch.equal(matrix, whole)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_factor_reports_the_failed_pivot(backend, device):
    needs(backend, "factor")
    keys = torch.eye(5, 8, device=device)
    noise = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0], device=device)  # Sig = noise - 0.75: negative at the third
    *_, info = ops.factor(0.75 * keys, keys, torch.ones(5, 2, device=device), noise, -1, backend=backend)
    assert info.dtype == torch.int32
    assert info.item() == 3


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("d", WIDTHS)
def test_downdate(backend, device, d):
    needs(backend, "downdate_")
    for r in (*PENDING, 33, cpu.SYRK_RANK + 2):
        base, _, pending, signs = operands(d, 1, r)
        got, *rest = (t.to(device, copy=True) for t in (base, pending, signs))
        ops.downdate_(got, *rest, backend=backend)
        truth = base.double()
        reference.downdate_(truth, pending.double(), signs.double())
        magnitude = base.double().abs() + pending.double().abs().T @ pending.double().abs()
        assert ((got.double().cpu() - truth).abs() <= bound(r + 3, magnitude, backend)).all()
        if backend != "reference":
            assert torch.equal(got, got.T)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_downdate_of_several_layers(backend, device):
    needs(backend, "downdate_")
    layers = [operands(200, 1, 9, seed) for seed in range(3)]
    base, pending, signs = (torch.stack([layer[part] for layer in layers]) for part in (0, 2, 3))
    got = base.to(device, copy=True)
    ops.downdate_(got, pending.to(device), signs.to(device), backend=backend)
    for layer in range(3):
        truth, rows = base[layer].double(), pending[layer].double()
        reference.downdate_(truth, rows, signs[layer].double())
        magnitude = base[layer].double().abs() + rows.abs().T @ rows.abs()
        assert ((got[layer].double().cpu() - truth).abs() <= bound(9 + 3, magnitude, backend)).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_downdate_does_not_write_outside_its_matrix(backend, device):
    needs(backend, "downdate_")
    base, _, pending, signs = (t.to(device) for t in operands(100, 1, 7))
    wide = torch.full((103, 117), float("nan"), device=device)
    wide[:100, :100] = base
    ops.downdate_(wide[:100, :100], pending, signs, backend=backend)
    assert wide[:100, :100].isfinite().all()
    assert wide[100:].isnan().all()
    assert wide[:100, 100:].isnan().all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_correct(backend, device, sign):
    needs(backend, "correct_")
    weight, whitened, rows = torch.randn(33, 65), torch.randn(17, 33), torch.randn(17, 65)
    got = weight.to(device, copy=True)
    ops.correct_(got, whitened.to(device), rows.to(device), sign, backend=backend)
    truth = weight.double() + sign * whitened.double().T @ rows.double()
    magnitude = weight.double().abs() + whitened.double().abs().T @ rows.double().abs()
    assert ((got.double().cpu() - truth).abs() <= bound(17 + 2, magnitude, backend)).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_correct_split_matches_correct_on_the_joined_weight(backend, device, sign, transposed, monkeypatch):
    needs(backend, "correct_split_")
    monkeypatch.setattr(reference, "SPLIT_CHUNK", 300)  # several chunks, the last one shorter
    weight, whitened, rows = torch.randn(33, 65), torch.randn(17, 33), torch.randn(17, 65)
    if transposed:
        weight = weight.T.contiguous().T
    high, low = (half.to(device) for half in ops.split(weight))
    ops.correct_split_(high, low, whitened.to(device), rows.to(device), sign, backend=backend)
    truth = weight.double() + sign * whitened.double().T @ rows.double()
    magnitude = weight.double().abs() + whitened.double().abs().T @ rows.double().abs()
    got = ops.join(high, low).cpu()
    assert ((got.double() - truth).abs() <= bound(17 + 2, magnitude, backend)).all()
    assert torch.equal(ops.split(got)[0], high.cpu())


def check_nans_stay(correct, device):
    """Checks NaN of every payload in U, and in the halves: an infinite upper half with a remainder is a NaN."""
    payloads = torch.tensor([*(1 << bit for bit in range(23)), 0x407FFF, 0x7F7FFF, 0x7F8000, 0x7FFFFF])
    bits = torch.cat([payloads | 0x7F800000, payloads | -0x800000]).to(torch.int32)
    rows = bits.view(torch.float32)[None]
    assert rows.isnan().all()
    high, low = ops.split(torch.randn(9, rows.shape[1]))
    high[8], low[8] = torch.inf, 1
    halves = [half.to(device, copy=True) for half in (high, low)]
    correct(*halves, torch.ones(1, 9, device=device), rows.to(device))
    assert all(half.isnan().all() for half in (halves[0], ops.join(*halves)))
    halves = [half.to(device, copy=True) for half in (high, low)]
    correct(*halves, torch.zeros(1, 9, device=device), torch.zeros_like(rows).to(device))
    assert halves[0].isnan().all(1).tolist() == [False] * 8 + [True]
    assert not halves[0][:8].isnan().any()
    number = torch.tensor([[0x7F7FFFFF, 0x7F7F8000]], dtype=torch.int32).view(torch.float32)
    halves = [half.to(device) for half in ops.split(number)]
    correct(*halves, torch.zeros(1, 1, device=device), torch.zeros(1, 2, device=device))
    assert torch.equal(ops.join(*halves).cpu(), number)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_correct_split_keeps_every_nan(backend, device):
    needs(backend, "correct_split_")
    check_nans_stay(lambda *given: ops.correct_split_(*given, 1, backend=backend), device)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_native_correct_split_keeps_every_nan_in_every_instruction_set(isa):
    needs("cpu", "correct_split_")
    if not cpu.runs(isa):
        pytest.skip(f"this processor has no {isa}")
    check_nans_stay(lambda *given: cpu.correct_split_(*given, 1, isa), "cpu")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("transposed", [False, True])
def test_native_correct_split_in_every_instruction_set(isa, transposed):
    needs("cpu", "correct_split_")
    if not cpu.runs(isa):
        pytest.skip(f"this processor has no {isa}")
    for d_v, d_k, n in ((1, 1, 1), (8, 48, 3), (13, 200, 1), (33, 65, 17), (64, 400, 131), (20, 193, 0)):
        weight, whitened, rows = torch.randn(d_v, d_k), torch.randn(n, d_v), torch.randn(n, d_k)
        wide = torch.full((d_k + 3, d_v + 5) if transposed else (d_v + 3, d_k + 5), 7.0)
        high, low = ops.split(wide)
        inner = [half[:-3, :-5].T if transposed else half[:-3, :-5] for half in (high, low)]
        for half, new in zip(inner, ops.split(weight), strict=True):
            half.copy_(new)
        cpu.correct_split_(*inner, whitened, rows, -1, isa)
        truth = weight.double() - whitened.double().T @ rows.double()
        magnitude = weight.double().abs() + whitened.double().abs().T @ rows.double().abs()
        got = ops.join(*inner)
        assert ((got.double() - truth).abs() <= bound(n + 2, magnitude)).all()
        assert torch.equal(ops.split(got)[0], inner[0])
        inner[0].fill_(7.0)
        inner[1].fill_(0)
        assert (ops.join(high, low) == 7).all()  # no writes outside


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [50, 4 * cpu.SYRK_RANK + 3])
def test_moment_with_rows_of_any_dtype(backend, device, accumulator, dtype, tokens):
    needs(backend, "moment_")
    if backend == "cpu" and accumulator == torch.float64:
        pytest.skip("the cpu backend supports only float32")
    if backend == "triton" and accumulator == torch.float64:
        pytest.skip("the triton backend supports only float32")
    moment, rows = symmetric(65).to(accumulator), torch.randn(tokens, 65).to(dtype)
    got = moment.to(device, copy=True)
    ops.moment_(got, rows.to(device), backend=backend)
    truth = moment.double() + rows.double().T @ rows.double()
    magnitude = moment.double().abs() + rows.double().abs().T @ rows.double().abs()
    assert got.dtype == accumulator
    assert ((got.double().cpu() - truth).abs() <= bound(tokens + 2, magnitude, backend)).all()
    if backend != "reference":
        assert torch.equal(got, got.T)


@pytest.mark.parametrize(
    ("op", "d", "rows", "native"),
    [
        ("downdate_", 4096, 256, True),
        ("downdate_", 4096, 128, False),
        ("downdate_", 2048, 512, False),
        ("moment_", 1024, 4096, True),
        ("panel", 4096, 100, True),
        ("panel", 4096, 129, False),
    ],
)
def test_native_kernels_are_the_default_where_recorded_benchmarks_show_it(op, d, rows, native):
    needs("cpu", op)
    matrix, keys = torch.empty(d, d, device="meta"), torch.empty(rows, d, device="meta")
    assert cpu.preferred(size_class(op, (matrix, keys))) is native


def batch_of(op, device):
    """Returns the arguments of an operation for three different layers."""
    layers = []
    for seed in range(3):
        few = operands(100, 7, 7, seed=seed)  # supported by every backend
        base, keys, pending, signs = operands(100, 17, 7, seed=seed)
        innovation = torch.randn(17, 33, generator=torch.Generator().manual_seed(seed))
        weight = torch.randn(33, 100, generator=torch.Generator().manual_seed(seed))
        layers.append(
            {
                "panel": few,
                "factor": (keys @ base, keys, innovation, torch.linspace(0.5, 2, 17)),
                "downdate_": (base, pending, signs),
                "correct_": (weight, innovation, keys),
                "correct_split_": (*ops.split(weight), innovation, keys),
                "moment_": (base, keys),
            }[op]
        )
    return [torch.stack(parts).to(device) for parts in zip(*layers, strict=True)]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("op", dispatch.OPERATIONS)
def test_batch_of_layers_matches_single_layers(op, backend, device):
    """Not bitwise, because a batch can be split differently."""
    needs(backend, op)
    scalars = (1,) if op in ("factor", "correct_", "correct_split_") else ()
    together, alone = batch_of(op, device), batch_of(op, device)
    returned = getattr(ops, op)(*together, *scalars, backend=backend)
    outputs = together[:2] if op == "correct_split_" else together[:1] if returned is None else returned
    for layer in range(3):
        single = [tensor[layer].clone() for tensor in alone]
        returned = getattr(ops, op)(*single, *scalars, backend=backend)
        expected = single[:2] if op == "correct_split_" else single[:1] if returned is None else returned
        found = [output[layer] for output in outputs] if isinstance(outputs, (tuple, list)) else [outputs[layer]]
        expected = [*expected] if isinstance(expected, (tuple, list)) else [expected]
        if op == "correct_split_":
            found, expected = [ops.join(*found)], [ops.join(*expected)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", dispatch.OPERATIONS)
def test_operations_in_a_cuda_graph(op, backend):
    needs(backend, op)
    scalars = (1,) if op in ("factor", "correct_", "correct_split_") else ()
    eager, captured = batch_of(op, "cuda"), batch_of(op, "cuda")
    expected = getattr(ops, op)(*eager, *scalars, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = getattr(ops, op)(*captured, *scalars, backend=backend)
    graph.replay()
    if found is not None:
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        assert all(torch.equal(one, other) for one, other in pairs)
    assert all(torch.equal(one, other) for one, other in zip(captured, eager, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32x3", "bf16x6", "ieee"])
def test_triton_precisions_and_variants_on_a_gpu(precision):
    needs("triton", "panel")
    from rlsedit_fast.kernels import downdate, panel

    for n in EDITS:
        given = [tensor[None].to("cuda") for tensor in operands(257, n, 7)]
        for variant in panel.VARIANTS if n <= panel.TRIANGLE_MAX_ROWS else ("full",):
            got = panel.panel(*given, variant=variant, input_precision=precision)
            check_panel(got[0], *(tensor[0] for tensor in given), backend="triton")
            assert torch.equal(panel.panel(*given, variant=variant, input_precision=precision), got)
    base, _, pending, signs = given
    got = base.clone()
    downdate.downdate_(got, pending, signs, input_precision=precision)
    truth = base.double() - (pending * signs[..., None]).double().mT @ pending.double()
    magnitude = base.double().abs() + pending.double().abs().mT @ pending.double().abs()
    assert ((got - truth).abs() <= bound(10, magnitude, "triton")).all()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [5, 150])
def test_kernels_compiled_at_run_time_match_the_library(n, monkeypatch):
    needs("cuda", "factor")
    keys, innovation, ones = torch.randn(2, n, 260), torch.randn(2, n, 70), torch.ones(2, n)
    given = [tensor.cuda() for tensor in (keys @ symmetric(260), keys, innovation, ones)]
    base = symmetric(260).repeat(2, 1, 1).cuda()

    def both():
        u, a, *_ = ops.factor(*given, 1, backend="cuda")
        ops.downdate_(left := base.clone(), u, given[3], backend="cuda")
        return u, a, left, ops.panel(base, given[1][:, :5].contiguous(), u, given[3], backend="cuda")

    expected = both()
    compiled = cuda_launch.Compiled()
    monkeypatch.setattr(cuda_launch, "launcher", lambda: compiled)
    for one, other in zip(both(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# Without the reference backend: its Cholesky aborts the capture, which breaks the following tests.
@pytest.mark.parametrize(("backend", "device"), [value for value in BACKENDS if value.values[0] in ("cuda", "triton")])
@pytest.mark.parametrize("n", [5, 150])
def test_step_in_a_cuda_graph(backend, device, n):
    """A captured step, replayed with other tensors, matches the eager step."""
    needs(backend, "downdate_")
    needs("cuda", "factor")

    def backend_of(op):
        """Returns the backend of an operation: the given one, `cuda` for factor, or the reference."""
        if op in dispatch.load(backend).OPS and (op, backend, n <= cuda.MAX_PANEL_EDITS) != ("panel", "cuda", False):
            return backend
        return "cuda" if op == "factor" else "reference"

    def contents(seed):
        generator = torch.Generator().manual_seed(seed)
        keys, innovation = torch.randn(2, n, 260, generator=generator), torch.randn(2, n, 70, generator=generator)
        weight = torch.randn(2, 70, 260, generator=generator)
        return [t.to(device) for t in (symmetric(260).repeat(2, 1, 1), weight, keys, innovation)]

    ones, none = torch.ones(2, n, device=device), torch.empty(2, 0, 260, device=device)

    def step(base, weight, keys, innovation):
        projected = ops.panel(base, keys, none, none[..., 0], backend=backend_of("panel"))
        rows, whitened, _, info = ops.factor(projected, keys, innovation, ones, 1, backend=backend_of("factor"))
        ops.correct_(weight, whitened, rows, 1, backend=backend_of("correct_"))
        ops.downdate_(base, rows, ones, backend=backend_of("downdate_"))
        return info

    tensors = contents(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*tensors)  # compiles, loads and warms up outside the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        info = step(*tensors)
    for seed in (1, 2):
        expected = contents(seed)
        for place, new in zip(tensors, expected, strict=True):
            place.copy_(new)
        graph.replay()
        assert not step(*expected).any()
        assert not info.any()
        for got, eager in zip(tensors, expected, strict=True):
            assert torch.equal(got, eager)
