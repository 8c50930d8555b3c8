"""Tests of bench/ptx_on_host, which executes PTX on the CPU: results, checks and counts of small kernels."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from ptx_on_host import launches, machine, parser, translation
from ptx_on_host.machine import MODES, MachineError, Mode

needs_compiler = pytest.mark.skipif(machine.compiler() is None, reason="needs a C++ compiler")

KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 x, .param .u64 y)
{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<40>;
    .reg .b64 %d<20>;
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %d1, [x];
    ld.param.u64 %d2, [y];
    cvta.to.global.u64 %d1, %d1;
    cvta.to.global.u64 %d2, %d2;
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %d3, %r1, 4;
    add.s64 %d4, %d1, %d3;     // &x[thread]
    add.s64 %d5, %d2, %d3;     // &y[thread]
    shl.b32 %r2, %r1, 2;
    mov.u32 %r3, tile;
    add.s32 %r4, %r3, %r2;     // &tile[thread]
    BODY
    ret;
}
"""


def program(body):
    return translation.translate(parser.parse(KERNEL.replace("BODY", body), "kernel"))


def run(body, x, y, *, threads=32, blocks=1, mode=MODES[0], limit=machine.LIMIT):
    given = program(body)
    return machine.run(
        given,
        (blocks, 1, 1),
        threads,
        0,
        launches.packed(given.kernel, (x, y)),
        [launches.region(x), launches.region(y)],
        mode,
        limit,
    )


def floats(*values):
    return torch.tensor(values, dtype=torch.float32)


@needs_compiler
@pytest.mark.parametrize("mode", MODES)
def test_loop_with_different_lengths_per_lane(mode):
    """Lanes diverge in the loop and meet after it: y = thread * (thread + 1) / 2, and the shuffle has all lanes."""
    body = """
    mov.u32 %r5, 0;
    mov.u32 %r6, 0;
    loop:
    add.s32 %r6, %r6, %r5;
    add.s32 %r5, %r5, 1;
    setp.le.s32 %p1, %r5, %r1;
    @%p1 bra loop;
    shfl.sync.idx.b32 %r7|%p2, %r6, 31, 31, -1;
    sub.s32 %r8, %r7, %r6;
    st.global.u32 [%d5], %r8;
    """
    y = torch.zeros(32, dtype=torch.int32)
    run(body, torch.zeros(1), y, mode=mode)
    sums = torch.arange(32).cumsum(0)
    assert torch.equal(y.long(), sums[31] - sums)


WORDS = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x3F800000, 0xBF8CCCCD, 0x7F800000, 0xFFC00000, 0x12345678]


def as_float(word):
    return np.frombuffer(struct.pack("<I", word & 0xFFFFFFFF), np.float32)[0]


def signed(word):
    return word - (1 << 32) if word >> 31 else word


def to_bf16(word):
    value = torch.tensor([signed(word)], dtype=torch.int32).view(torch.float32)
    return int(value.bfloat16().view(torch.int16)) & 0xFFFF


@needs_compiler
@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r9, %r8, -7", lambda w: w - 7),
        ("bfe.u32 %r9, %r8, 5, 9", lambda w: w >> 5 & 511),
        ("bfe.s32 %r9, %r8, 28, 4", lambda w: signed(w) >> 28),
        ("shr.s32 %r9, %r8, 40", lambda w: signed(w) >> 31),
        ("shr.u32 %r9, %r8, 40", lambda w: 0),
        ("shl.b32 %r9, %r8, 33", lambda w: 0),
        ("prmt.b32 %r9, %r8, 0, 0x0123U", lambda w: int.from_bytes(w.to_bytes(4, "little"), "big")),
        ("prmt.b32 %r9, %r8, 0, 0xBBBB", lambda w: 0xFFFFFFFF * (w >> 31)),
        ("mul.hi.s32 %r9, %r8, %r8", lambda w: signed(w) ** 2 >> 32),
        ("mul.hi.u32 %r9, %r8, %r8", lambda w: w**2 >> 32),
        ("div.s32 %r9, %r8, 3", lambda w: int(signed(w) / 3)),
        ("rem.s32 %r9, %r8, 3", lambda w: signed(w) - 3 * int(signed(w) / 3)),
        ("neg.s32 %r9, %r8", lambda w: -w),
        ("setp.leu.f32 %p3, %r8, 0f00000000; selp.b32 %r9, 1, 0, %p3", lambda w: int(not as_float(w) > 0)),
        ("setp.lt.f32 %p3, %r8, 0f00000000; selp.b32 %r9, 1, 0, %p3", lambda w: int(as_float(w) < 0)),
        ("setp.num.f32 %p3, %r8, %r8; selp.b32 %r9, 1, 0, %p3", lambda w: int(as_float(w) == as_float(w))),
        ("mov.b32 {%h1, %h2}, %r8; mov.b32 %r9, {%h2, %h1}", lambda w: w >> 16 | w << 16),
        ("cvt.s32.s16 %r9, %h3", lambda w: signed((w & 0xFFFF) << 16) >> 16),
        ("cvt.rn.bf16x2.f32 %r9, %r8, 0f3F800000", lambda w: to_bf16(w) << 16 | 0x3F80),
        ("cvt.rzi.s32.f32 %r9, 0fC0200000", lambda w: -2),
        ("mul.wide.s32 %d9, %r8, -3; shr.u64 %d9, %d9, 32; cvt.u32.u64 %r9, %d9", lambda w: signed(w) * -3 >> 32),
        ("cvt.s64.s32 %d9, %r8; mad.lo.s64 %d9, %d9, 5, 1; cvt.u32.u64 %r9, %d9", lambda w: 5 * w + 1),
        ("fma.rn.f32 %r9, 0f40000000, 0f40400000, 0f3F800000", lambda w: 0x40E00000),
    ],
)
def test_arithmetic(instruction, expected):
    x = torch.tensor([signed(word) for word in WORDS] * 4, dtype=torch.int32)[:32].clone()
    y = torch.zeros(32, dtype=torch.int32)
    run(f"ld.global.u32 %r8, [%d4]; cvt.u16.u32 %h3, %r8; {instruction}; st.global.u32 [%d5], %r9;", x, y)
    wanted = [expected(word & 0xFFFFFFFF) & 0xFFFFFFFF for word in x.tolist()]
    got = [word & 0xFFFFFFFF for word in y.tolist()]
    if "bf16" in instruction:  # the payload of a NaN may differ
        keep = [as_float(word) == as_float(word) for word in x.tolist()]
        wanted, got = ([v for v, k in zip(values, keep, strict=True) if k] for values in (wanted, got))
    assert got == wanted


def test_unknown_instruction_is_named():
    with pytest.raises(parser.PTXError, match=r"line \d+: unknown instruction tanh\.approx\.f32 in `tanh\.approx"):
        program("tanh.approx.f32 %r9, %r8;")
    with pytest.raises(parser.PTXError, match=r"unknown instruction bar\.sync in `bar\.sync 1, 64`"):
        program("bar.sync 1, 64;")
    with pytest.raises(parser.PTXError, match="there is no kernel other: the text has kernel"):
        parser.parse(KERNEL, "other")


SHARE = "st.shared.u32 [%r4], %r1; {}; xor.b32 %r5, %r4, {}; ld.shared.u32 %r6, [%r5]; st.global.u32 [%d5], %r6;"


@needs_compiler
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("distance", [4, 128], ids=["within a warp", "between warps"])
def test_missing_barrier_is_found(mode, distance):
    y = torch.zeros(64, dtype=torch.int32)
    run(SHARE.format("bar.sync 0", distance), torch.zeros(1), y, threads=64, mode=mode)
    assert torch.equal(y, torch.arange(64, dtype=torch.int32) ^ distance // 4)
    with pytest.raises(
        MachineError, match=r"thread \d+ (reads|writes) what .*, with no barrier between them .*: (ld|st)\.shared\.u32"
    ):
        run(SHARE.format("", distance), torch.zeros(1), y, threads=64, mode=mode)


COPY = """
cp.async.ca.shared.global [%r4], [%d4], 4;
cp.async.commit_group;
cp.async.ca.shared.global [%r4+128], [%d4], 4;
cp.async.commit_group;
cp.async.wait_group {};
ld.shared.u32 %r6, [%r4];
ld.shared.u32 %r7, [%r4+{}];
st.global.u32 [%d5], %r7;
"""


@needs_compiler
@pytest.mark.parametrize("mode", MODES)
def test_copy_that_is_not_waited_for_is_found(mode):
    x, y = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    for groups, offset in ((0, 128), (1, 0)):
        run(COPY.format(groups, offset), x, y, mode=mode)
        assert torch.equal(x, y)
    with pytest.raises(MachineError, match=r"a read of what an unfinished cp\.async writes"):
        run(COPY.format(1, 128), x, y, mode=mode)


@needs_compiler
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r6, [%d4+4];", "a read outside every tensor"),
        ("st.global.u32 [%d4+-4], %r1;", "a write outside every tensor"),
        ("ld.global.v2.u32 {%r6, %r7}, [%d4];", "a read at a misaligned address"),
        ("ld.shared.u32 %r6, [%r4+1000];", "shared memory: byte 1024 of 1024"),
        ("ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r4];", "shared memory: a misaligned address"),
        ("setp.gt.s32 %p1, %r1, 5; @%p1 bra after; bar.sync 0; after:", "not all lanes of the warp reach it"),
        ("setp.gt.s32 %p1, %r1, 31; @%p1 ret; bar.sync 0;", "some warps have ended"),
        ("loop: bra loop;", "more instructions than the limit"),
        ("st.shared.u32 [%r3], %r1;", "write the same word, with no barrier"),
        ("mov.u32 %r6, 8; cp.async.ca.shared.global [%r4], [%d4], 4, %r6;", "more bytes than its size"),
    ],
)
def test_mistake_is_found(body, message):
    x, y = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with pytest.raises(MachineError, match=message):
        run(body, x, y, threads=64, limit=10_000)


@needs_compiler
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.u32 [%d5], %r1;", "two blocks write the same word"),
        (
            "mov.u32 %r6, %ctaid.x; setp.eq.s32 %p1, %r6, 0; @%p1 st.global.u32 [%d5], %r1; ld.global.u32 %r7, [%d5];",
            "block",
        ),
    ],
)
def test_race_between_blocks_is_found(mode, body, message):
    y = torch.zeros(32, dtype=torch.int32)
    run(body, torch.zeros(1), y, mode=mode)
    with pytest.raises(MachineError, match=message):
        run(body, torch.zeros(1), y, blocks=2, mode=mode)


@needs_compiler
def test_shared_memory_and_registers_start_as_nan():
    y = torch.zeros(32)
    run("ld.shared.f32 %r6, [%r4]; st.global.f32 [%d5], %r6;", torch.zeros(1), y)
    assert y.isnan().all()
    run("st.global.f32 [%d5], %r6;", torch.zeros(1), y.zero_())
    assert y.isnan().all()


@needs_compiler
@pytest.mark.parametrize(
    ("body", "kind", "units", "least"),
    [
        ("ld.shared.u32 %r6, [%r4];", "ld.shared", 1, 1),
        ("and.b32 %r5, %r4, 252; shl.b32 %r5, %r5, 1; ld.shared.u32 %r6, [%r5];", "ld.shared", 2, 1),
        ("and.b32 %r5, %r1, 7; shl.b32 %r5, %r5, 7; ld.shared.u32 %r6, [%r5];", "ld.shared", 8, 1),
        ("and.b32 %r5, %r1, 7; shl.b32 %r5, %r5, 7; ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [%r5];", "ld.shared", 32, 4),
        ("ld.shared.u32 %r6, [tile];", "ld.shared", 1, 1),
        ("ld.global.u32 %r6, [%d4];", "ld.global", 4, 4),
        (
            "and.b64 %d6, %d3, 127; add.s64 %d6, %d6, %d3; add.s64 %d6, %d1, %d6; ld.global.u32 %r6, [%d6];",
            "ld.global",
            8,
            4,
        ),
    ],
)
def test_counts_of_wavefronts_and_sectors(body, kind, units, least):
    x = torch.zeros(80, dtype=torch.int32)
    x = x[(-x.data_ptr() // 4) % 8 :][:72]  # sectors have 32 bytes
    given = program(body)
    counts = run(body, x, torch.zeros(32), mode=Mode(counting=True))
    (at,) = (i for i, n in enumerate(given.statements[:-1]) if given.kernel.statements[n].opcode.startswith(kind))
    assert (counts[at]["executed"], counts[at]["requests"]) == (1, 1)
    assert (counts[at]["units"], counts[at]["least"]) == (units, least)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "dtype", "depth"), [("m16n8k8", "tf32", 8), ("m16n8k16", "bf16", 16), ("m16n8k16", "f16", 16)]
)
def test_matrix_product(shape, dtype, depth):
    """The fragments of mma.sync, by the layout in the PTX manual."""
    torch.manual_seed(0)
    a, b, c = (torch.randint(-8, 9, size).double() for size in ((16, depth), (depth, 8), (16, 8)))
    narrow = {"tf32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    pack = 4 // narrow.itemsize
    lane = torch.arange(32)
    group, inner = lane // 4, lane % 4
    part = torch.arange(pack)

    def words(matrix, rows, columns):
        return matrix[rows, columns].to(narrow).contiguous().view(torch.int32).reshape(32)

    def across(i):  # [32, pack]
        return pack * inner[:, None] + 4 * pack * i + part

    given = [words(a, group[:, None] + 8 * (i % 2), across(i // 2)) for i in range(4)]
    given += [words(b.T, group[:, None], across(i)) for i in range(2)]
    sums = [(group + 8 * (i // 2), 2 * inner + i % 2) for i in range(4)]
    given += [c[rows, columns].float().view(torch.int32) for rows, columns in sums]
    x, y = torch.stack(given).contiguous(), torch.zeros(4, 32)
    loads = "".join(f"ld.global.u32 %r{10 + i}, [%d4+{128 * i}];" for i in range(10))
    stores = "".join(f"st.global.u32 [%d5+{128 * i}], %r{20 + i};" for i in range(4))
    product = f"""mma.sync.aligned.{shape}.row.col.f32.{dtype}.{dtype}.f32 {{%r20, %r21, %r22, %r23}},
        {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};"""
    run(loads + product + stores, x, y)
    wanted = c + a @ b
    for i, (rows, columns) in enumerate(sums):
        assert torch.equal(y[i].double(), wanted[rows, columns])
