"""The Triton kernels as compiled: their PTX is executed by tests/helpers/ptx, instruction by instruction.

Triton's own interpreter runs the kernels' source; here it is what the compiler made of it, for sm_75, sm_80 and sm_120.
Every access is checked against the tensors' exact elements, no read may come before a write, and what threads do in no
order must not depend on one.
"""

import json
import struct
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.helpers.ptx.arithmetic import fma
from tests.helpers.ptx.memory import Global
from tests.helpers.ptx.parse import parse
from tests.helpers.ptx.run import FaultError, launch
from tests.helpers.ptx.tensors import Written, region
from tests.kernels.conftest import COMPILING, ROOT
from tests.kernels.test_compile import ADD_UPSAMPLED, AUGMENT, COND_NORM, INFO_NCE

MODULE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry tested(.param .u64 given, .param .u64 made)
{{
    .reg .pred %p<9>; .reg .b32 %r<30>; .reg .b64 %rd<9>;
    .shared .align 16 .b8 kept[256];
    ld.param.b64 %rd1, [given];
    ld.param.b64 %rd2, [made];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    ld.global.b32 %r2, [%rd3];
    {body}
    st.global.b32 [%rd4], %r3;
    ret;
}}
"""


def executed(body, given, threads=32, blocks=1):
    """What a kernel makes of int32 or float32 numbers: %r1 is the thread, %r2 its number, and %r3 its result."""
    memory, written = Global(), Written()
    with written.noting():
        made = torch.empty(threads, dtype=given.dtype)
    pointers = [region(memory, name, x, written) for name, x in (("given", given), ("made", made))]
    kernel = parse(MODULE.format(body=body), "tested")
    launch(kernel, (blocks, 1, 1), (threads, 1, 1), struct.pack("<QQ", *pointers), memory)
    return made.tolist()


def rounded(exact):
    """The nearest float32 number to a fraction, of two the even one."""
    near = np.float32(float(exact))
    steps = [near, *(np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf))]
    return min(steps, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view("u4")) & 1))


def test_a_fused_multiply_add_rounds_once():
    generator = np.random.default_rng(0)
    a, b = ((1 + generator.integers(0, 2**23, 300) / 2**23).astype("f4") for _ in range(2))
    # Sums of all sizes: nearly cancelled, with and without an end in the middle of two numbers, and subnormal.
    c = -(a * b) * (1 + generator.integers(-4, 5, 300) / 2**23).astype("f4")
    c[100:] = np.ldexp(c[100:], generator.integers(-60, 60, 200)).astype("f4")
    small, step = np.finfo("f4").tiny, np.float32(2.0**-23)
    cases = [*zip(a, b, c, strict=True), *zip(small * a, b / 64, small * c, strict=True)]
    cases += [((1 + step) * half, 1 - step, 1 + step) for half in (step / 2, -step / 2)]
    given = [np.array(x, "f4") for x in zip(*cases, strict=True)]
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(*given, strict=True)]
    assert fma(*given).tolist() == list(map(rounded, exact))


def test_fused_and_separate_differ():
    given = torch.full((32,), 1 + 2.0**-12)
    fused = executed("fma.rn.f32 %r3, %r2, %r2, 0fBF801000;", given)
    separate = executed("mul.rn.f32 %r4, %r2, %r2; add.rn.f32 %r3, %r4, 0fBF801000;", given)
    assert fused == [2.0**-24] * 32 and separate == [0.0] * 32


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("div.s32 %r3, %r2, 3;", lambda i: int(i / 3)),
        ("rem.s32 %r3, %r2, 3;", lambda i: i - 3 * int(i / 3)),
        ("shr.s32 %r3, %r2, 40;", lambda i: -1 if i < 0 else 0),
        ("shl.b32 %r3, %r2, 32;", lambda i: 0),
        ("bfe.s32 %r3, %r2, 1, 2;", lambda i: ((i >> 1) + 2) % 4 - 2),
        ("mul.hi.s32 %r3, %r2, 1431655766;", lambda i: i * 1431655766 >> 32),
        ("ld.global.s8 %r3, [%rd3];", lambda i: i),
        ("cvt.s8.s32 %r3, %r2;", lambda i: i),
        ("setp.lt.s32 %p1, %r2, 3; mov.pred %p2, !%p1; selp.b32 %r3, 7, %r2, %p2;", lambda i: i if i < 3 else 7),
        ("mov.b64 %rd5, {%r2, %r1}; mov.b64 {%r4, %r3}, %rd5;", lambda i: i + 16),
        ("cvt.rn.f32.s32 %r4, %r2; mul.f32 %r4, %r4, 0f3F000000; cvt.rmi.f32.f32 %r3, %r4;", lambda i: _bits(i // 2)),
        ("cvt.rn.f32.s32 %r4, %r2; cvt.rn.bf16x2.f32 %r3, %r4, 0f00000000;", lambda i: _bits(float(i)) >> 16 << 16),
    ],
)
def test_integers(body, wanted):
    given = torch.arange(-16, 16, dtype=torch.int32)
    assert executed(body, given) == [wanted(i) for i in given.tolist()]


def test_what_nothing_sets_is_not_zero():
    assert executed("mov.b32 %r3, %r20;", torch.arange(32, dtype=torch.int32)) == [-1] * 32


@pytest.mark.parametrize(
    "instruction",
    [
        "add.bf16 %r3, %r2, %r2;",
        "add.f16x2 %r3, %r2, %r2;",
        "fma.rn.f64 %rd5, %rd3, %rd3, %rd3;",
        "sub.rn.f32.bf16 %r3, %r2, %r2;",
        "cvt.rn.f32.bf16x2 %r3, %r2;",
        "cvt.rzi.s32.f32 %r3, %r2;",
        "ld.volatile.global.b32 %r3, [%rd3];",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r3, %r4, %r5, %r6}, {%r2, %r2, %r2, %r2}, {%r2, %r2}, "
        "{%r3, %r4, %r5, %r6};",
    ],
)
def test_what_is_not_interpreted_is_named(instruction):
    with pytest.raises(NotImplementedError) as error:
        executed(instruction, torch.arange(32, dtype=torch.int32))
    assert instruction[:-1] in str(error.value)


def _bits(number):
    return struct.unpack("<i", struct.pack("<f", number))[0]


def test_a_sum_over_a_warp():
    steps = (f"shfl.sync.bfly.b32 %r4, %r2, {n}, 31, -1; add.f32 %r2, %r2, %r4;" for n in (16, 8, 4, 2, 1))
    assert executed("".join(steps) + "mov.b32 %r3, %r2;", torch.arange(32.0)) == [496.0] * 32


LOOP = """mov.b32 %r3, 0; mov.b32 %r5, 0;
AGAIN: setp.ge.s32 %p1, %r5, %r2;
    @%p1 bra DONE;
    add.s32 %r5, %r5, 1;
    add.s32 %r3, %r3, %r5;
    bra.uni AGAIN;
DONE: """


def test_threads_that_part_meet_again():
    meet = "shfl.sync.idx.b32 %r3, %r3, 31, 31, -1;"
    given = torch.arange(32, dtype=torch.int32)
    assert executed(LOOP, given) == [i * (i + 1) // 2 for i in range(32)]
    assert executed(LOOP + meet, given) == [496] * 32


SHARED = "mov.b32 %r6, kept; shl.b32 %r7, %r1, 2; add.s32 %r7, %r7, %r6;"
STORE, LOAD = "st.shared.b32 [%r7], %r2;", "ld.shared.b32 %r3, [%r7];"
COPY = "cp.async.ca.shared.global [%r7], [%rd3], 4; cp.async.commit_group;"
FEW = "setp.lt.u32 %p1, %r1, 8;"


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ("ld.global.b32 %r3, [%rd3+4];", "thread (31, 0, 0) of block (0, 0, 0) accesses 4 bytes 0 bytes beyond given"),
        ("ld.global.b32 %r3, [%rd3+-4];", "thread (0, 0, 0) of block (0, 0, 0) accesses 4 bytes 4 bytes before given"),
        ("ld.global.b16 %r3, [%rd3+1];", "at no multiple of 2"),
        ("ld.global.b32 %r3, [%rd4];", "reads bytes of made that nothing has written"),
        (SHARED + LOAD, "reads bytes of shared memory that nothing has written"),
        (SHARED + "ld.shared.b32 %r3, [%r7+256];", "accesses 4 bytes 0 bytes beyond shared memory of 256 bytes"),
        (SHARED + STORE + LOAD, ""),
        (SHARED + "st.shared.b32 [%r6], %r2;" + LOAD, "where another writes something else"),
        (SHARED + "st.shared.b32 [%r6], 7; mov.b32 %r3, %r2;", ""),
        (SHARED + COPY + LOAD, "nothing has written"),
        (SHARED + COPY + "cp.async.wait_group 0;" + LOAD, ""),
        (SHARED + STORE + COPY + "cp.async.wait_group 1;" + LOAD, "nothing has written"),
        (FEW + "@%p1 bra THERE; bar.sync 0;\nTHERE: bar.sync 0; mov.b32 %r3, %r2;", "others of its block at another"),
        (FEW + "mov.b32 %r3, %r2; @%p1 bra THERE; shfl.sync.idx.b32 %r3, %r2, 0, 31, -1;\nTHERE:", "are elsewhere"),
        ("shfl.sync.idx.b32 %r3, %r2, 0, 31, 255;", "acts with some threads of its warp only"),
    ],
)
def test_what_is_refused(body, refused):
    given = torch.arange(32, dtype=torch.int32)
    if refused:
        with pytest.raises(FaultError) as error:
            executed(body, given)
        assert refused in str(error.value) and "`" in str(error.value)
    else:
        assert executed(body, given) == list(range(32))


OTHERS = SHARED + "xor.b32 %r8, %r1, 32; shl.b32 %r8, %r8, 2; add.s32 %r8, %r8, %r6;"
NEIGHBOURS = SHARED + "xor.b32 %r8, %r1, 1; shl.b32 %r8, %r8, 2; add.s32 %r8, %r8, %r6;"
ALIKE = SHARED + "st.shared.b32 [%r6], 7;"
TURN = "ld.shared.b32 %r3, [%r8];"
EARLY, LATE = "reads bytes of shared memory that another may write later", "that another uses at the same time"


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        (OTHERS + STORE + "bar.sync 0;" + TURN, ""),
        (OTHERS + STORE + TURN, EARLY),
        (OTHERS + STORE + "bar.sync 0;" + TURN + "st.shared.b32 [%r7], 0;", LATE),
        (OTHERS + STORE + "bar.sync 0;" + TURN + "bar.sync 0; st.shared.b32 [%r7], 0;", ""),
        (OTHERS + COPY + "cp.async.wait_group 0; bar.sync 0;" + TURN, ""),
        (OTHERS + COPY + "cp.async.wait_group 0;" + TURN, EARLY),
        (OTHERS + STORE + "bar.sync 0;" + TURN + COPY, LATE),
        (OTHERS + STORE + "bar.sync 0;" + TURN + STORE, LATE),  # though it is what is there
        (NEIGHBOURS + STORE + TURN, EARLY),  # threads of a warp need not be in step
        (ALIKE + "ld.shared.b32 %r3, [%r6];", EARLY),
        (ALIKE + "bar.sync 0; ld.shared.b32 %r3, [%r6]; xor.b32 %r3, %r1, 32;", ""),
    ],
)
def test_what_threads_do_in_no_order_is_refused(body, refused):
    given = torch.arange(64, dtype=torch.int32)
    if refused:
        with pytest.raises(FaultError, match=refused):
            executed(body, given, threads=64)
    else:
        assert executed(body, given, threads=64) == [i ^ 32 for i in range(64)]


BLOCK = "mov.u32 %r4, %ctaid.x; setp.eq.s32 %p1, %r4, 0; mov.b32 %r3, %r2;"


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        (BLOCK, ""),
        (BLOCK + "mov.b32 %r3, %r4;", "writes bytes of made where another writes something else"),
        (BLOCK + "@%p1 st.global.b32 [%rd3], 99;", "changes bytes of given that another uses at the same time"),
        (BLOCK + "@%p1 st.global.b32 [%rd4], %r3; @!%p1 ld.global.b32 %r3, [%rd4];", "that another may write later"),
    ],
)
def test_what_blocks_do_in_no_order_is_refused(body, refused):
    given = torch.arange(32, dtype=torch.int32)
    if refused:
        with pytest.raises(FaultError, match=refused):
            executed(body, given, blocks=2)
    else:
        assert executed(body, given, blocks=2) == list(range(32))


def test_memory_between_the_elements_is_not_the_tensors():
    every_other = torch.arange(64, dtype=torch.int32)[::2]
    with pytest.raises(FaultError, match="between the elements of given"):
        executed("mov.b32 %r3, %r2;", every_other)
    assert executed("mov.b32 %r3, %r2;", every_other, threads=1) == [0]


# The kernels.


@pytest.fixture(scope="module")
def outcome(kernel_cache):
    """Errors of every case, by name, the kernels that ran, and what became of reads outside the filter."""
    import tests.helpers.triton_device  # noqa: F401 - skips where the tests that are the cases are skipped

    command = [sys.executable, "-m", "tests.kernels.ptx_cases", str(kernel_cache[1])]
    result = subprocess.run(command, cwd=ROOT, env=COMPILING, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("op", ["augment", "cond_norm", "add_upsampled", "epilogue", "l2_normalize", "info_nce"])
def test_what_the_compiler_made_gives_the_references_results(outcome, op):
    errors = {name: error for name, error in outcome["results"].items() if name.startswith(op)}
    assert errors and not any(errors.values()), "\n".join(f"{name}: {error}" for name, error in errors.items())


def test_every_kernel_is_executed(outcome):
    assert set(outcome["kernels"]) >= AUGMENT | INFO_NCE | COND_NORM | ADD_UPSAMPLED


@pytest.mark.parametrize("target", ["sm_75", "sm_80"])
def test_a_barrier_left_out_is_noticed(outcome, target):
    """Each of the gradients: of their reductions, of tiles with masks and without, of copies ahead, of the end."""
    count, unnoticed = outcome["barriers"][target]
    assert count >= 15 and not unnoticed, "\n".join(unnoticed)


def test_a_read_outside_the_filter_is_found(outcome):
    """1 - distance * (1 / reach), rounded once, is above 0 at the reach where the rounded 1 / reach is too small."""
    for length, old, new in outcome["outside"]:
        small = Fraction(float(np.float32(1) / np.float32(2 * length))) * 2 * length < 1
        assert ("4 bytes before pixels" in old) == small and not new, (length, old, new)
    assert any(old for _, old, _ in outcome["outside"])
