"""What the report reads of a kernel's loop."""

from bench.gpu_report.sass import Loop, product_loop

# A loop with its wait inside, one whose wait spins behind the end of the kernel, and a loop without products.
SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R56, R8, gdesc[UR8].tnspB, R56 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/                   MUFU.EX2 R5, R5 ;
        /*0070*/                   MUFU.EX2 R6, R6 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   MUFU.EX2 R7, R7 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0, 0x80 ;
.L_x_2:
        /*00b0*/              @!P1 BRA `(.L_x_5) ;
        /*00c0*/              @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*00d0*/                   MUFU.EX2 R7, R7 ;
        /*00e0*/              @P2 BRA `(.L_x_3) ;
        /*00f0*/                   EXIT ;
.L_x_5:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;
        /*0110*/                   BRA `(.L_x_2) ;
"""


def test_the_loop_with_products_is_found_and_counted():
    loop = product_loop(SASS)
    assert loop == Loop(instructions=10, products=2, exp2=3, overlapped=2, barriers=1)
    assert str(loop) == "10: 2 HGMMA, 3 EX2 (2 under HGMMA), 1 BAR"


def test_a_kernel_without_wgmma_has_none():
    assert product_loop(SASS.replace("HGMMA", "HMMA")) is None
