"""Loops are found in machine code, in PTX and in AMD's assembly, and read for what they do in one turn."""

from kappa_fast.kernels.loops import inner_loops, whole

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R2, desc[UR4][R4.64] ;
        /*0020*/                   IMAD R1, R1, R2, R3 ;
        /*0030*/               @P0 LDGSTS.E.BYPASS.128 [R7], desc[UR4][R8.64], !P1 ;
        /*0040*/              @!P2 LDG.E.U16 R9, desc[UR4][R8.64+0x80] ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   DEPBAR.LE SB0, 0x2 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   STL [R1+0x8], R24 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/               @P3 BRA 0x30 ;
        /*00c0*/                   DADD R2, R2, R4 ;
        /*00d0*/               @P4 BRA 0x20 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
"""
PTX = """
$L__BB0_2:
        add.s32         %r1, %r1, 1;
$L__BB0_3:                              // =>This Inner Loop Header: Depth=1
        @%p5 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd3 + 0 ];
        ld.global.b16 {%rs1}, [ %rd3 + 0 ];
        cp.async.cg.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x10, %r8;
        cp.async.wait_group     2;
        bar.sync        0;
        mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 { %rd1 }, { %rd2 }, { %rd3 }, { %rd4 };
        fma.rn.f64      %rd5, %rd6, %rd7, %rd8;
        @%p6 bra        $L__BB0_3;
        bra.uni         $L__BB0_2;
"""
AMD = """
.LBB0_1:                                ; %loop
        global_load_dwordx4 v[2:5], v[6:7], off
        buffer_load_ushort v8, v9, s[4:7], 0 offen
        v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
        s_barrier
        scratch_store_dword off, v1, s32
        s_cbranch_scc1 .LBB0_1
        s_endpgm
"""
# As Triton 3.6 disassembles sm_120: no semicolons, and columns of scheduling behind the operands.
ANNOTATED = """
        /*0b00*/               @P0 EXIT                  &req={1}         ?trans5;  /* 0x000000000000094d */
        /*0c80*/           BRA.U UP0, 0xd50                               ?trans5;  /* 0x0000000100307547 */
        /*0f50*/           DEPBAR.LE SB0, 0x2                             ?WAIT4_END_GROUP;  /* 0x000080800000791a */
        /*0f60*/           HMMA.1688.F32.TF32 R56, R64, R36, R56          ?trans1;  /* 0x000000244038723c */
        /*0f70*/           LDGSTS.E.BYPASS.128 [R25], desc[UR24][R4.64]   &req={1}  /* 0x000000244038723c */
        /*0f80*/           BRA.U !UP0, 0xf50             &req={1}         ?WAIT15_END_GROUP; /* 0xfffffff908107547 */
        /*1710*/           DEPBAR.LE SB0, 0x0                             ?WAIT4_END_GROUP;  /* 0x000080000000791a */
        /*1f10*/           EXIT                                           ?trans5;  /* 0x000000000000794d */
        /*1f20*/           BRA 0x1f20;  /* 0xfffffffc00fc7947 */
"""
# The latch of each loop lies before its head, the inner one waits for a barrier in a loop of its own, and both have an
# extra way to go on.
LATCH_FIRST = """
        bra.uni         $L__BB0_3;
$L__BB0_10:
        cp.async.wait_group     0;
        @%p46 bra       $L__BB0_3;
        bra.uni         $L__BB0_11;
$L__BB0_3:
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r8;
        @%p26 tcgen05.mma.cta_group::1.kind::f16 [ %r428 + 0 ], %rd147, %rd148, %r177, %p25;
        @%p33 bra       $L__BB0_10;
        bra.uni         $L__BB0_7;
$L__BB0_9:
        mbarrier.try_wait.parity.shared.b64 %p1, [%r432], %r431;
        @!%p1 bra       $L__BB0_9;
        cp.async.cg.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x10, %r8;
        @%p44 bra       $L__BB0_7;
        bra.uni         $L__BB0_10;
$L__BB0_7:
        cp.async.wait_group     2;
        @%p24 bra       $L__BB0_9;
        @%p36 tcgen05.mma.cta_group::1.kind::f16 [ %r428 + 0 ], %rd177, %rd178, %r213, %p35;
        @%p36 tcgen05.mma.cta_group::1.kind::f16 [ %r428 + 0 ], %rd179, %rd180, %r213, %p35;
        bra.uni         $L__BB0_9;
$L__BB0_11:
        ret;
"""


def test_the_inner_loop_of_machine_code():
    (loop,) = inner_loops(SASS)
    assert (loop.instructions, loop.loads, loop.copies, loop.pending) == (9, {2: 1}, {16: 1}, 2)
    assert (loop.matrix, loop.float64, loop.shuffles, loop.barriers, loop.spills) == (1, 0, 0, 1, 1)
    assert loop.width == 2
    assert str(loop) == ("9 instructions, 1 loads of 2, 1 copies of 16, 2 pending, 1 matrix, 1 barriers, 1 spills")


def test_a_kernel_without_loops_is_read_as_a_whole():
    found = whole(SASS)
    assert (found.instructions, found.loads, found.float64, found.whole) == (16, {2: 1, 8: 1}, 1, True)
    assert inner_loops("no code") == []
    assert whole("no code").width == 0


def test_the_inner_loop_of_ptx():
    (loop,) = inner_loops(PTX)
    assert (loop.loads, loop.copies, loop.pending) == ({16: 1, 2: 1}, {16: 1}, 2)
    assert (loop.matrix, loop.float64, loop.barriers, loop.spills) == (1, 1, 1, 0)


def test_columns_of_scheduling_are_no_operands():
    (loop,) = inner_loops(ANNOTATED)
    assert (loop.instructions, loop.copies, loop.pending, loop.matrix) == (4, {16: 1}, 2, 1)


def test_a_loop_whose_latch_lies_before_its_head():
    (loop,) = inner_loops(LATCH_FIRST)
    assert (loop.instructions, loop.copies, loop.pending, loop.matrix) == (9, {16: 1}, 2, 2)


def test_the_inner_loop_of_amd():
    (loop,) = inner_loops(AMD)
    assert (loop.loads, loop.copies, loop.pending) == ({16: 1, 2: 1}, {}, -1)
    assert (loop.matrix, loop.barriers, loop.spills) == (1, 1, 1)
