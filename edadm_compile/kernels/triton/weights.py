# mypy: ignore-errors
"""Weight tiles: int8 as they are, int4 unpacked to 16 times the code."""

import triton
import triton.language as tl


@triton.jit
def unpack_int4(packed, ASM: tl.constexpr):
    """Two nibbles of every byte as int8 values of 16 times the code.

    A nibble in the high half of a byte needs no sign extension, and |16 * code| <= 128 keeps the accumulators in int32
    up to K = 131000. The factor 16 leaves with the multiplier in the epilogue.

    Args:
        packed: uint8 [BLOCK_M, BLOCK_K / 2].
        ASM: treat four bytes as one 32-bit word, which Triton does not find out by itself.

    Returns:
        (low, high): int8 [BLOCK_M, BLOCK_K / 2] each, 16 times the codes of the low and of the high nibbles.
    """
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 shifted;
            shl.b32 shifted, $2, 4;
            and.b32 $0, shifted, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }
            """,
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed << 4).to(tl.int8, bitcast=True)
        high = (packed & 0xF0).to(tl.int8, bitcast=True)
    return low, high
