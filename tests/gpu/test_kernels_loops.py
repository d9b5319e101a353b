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


def test_the_inner_loop_of_amd():
    (loop,) = inner_loops(AMD)
    assert (loop.loads, loop.copies, loop.pending) == ({16: 1, 2: 1}, {}, -1)
    assert (loop.matrix, loop.barriers, loop.spills) == (1, 1, 1)
