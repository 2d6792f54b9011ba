"""Device code of a double in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def rows_kernel(
    x_ptr, bias_ptr, out_ptr, rows, shift, COLS: gl.constexpr, GAIN: gl.constexpr, BIAS_STRIDE: gl.constexpr,
    EXACT: gl.constexpr, BLOCK: gl.constexpr
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    column = gl.program_id(1) * BLOCK + gl.arange(0, BLOCK, layout=layout)
    row = gl.program_id(0)
    mask = (column < COLS) & (row < rows)
    value = gl.load(x_ptr + row * COLS + column, mask=mask).to(gl.float32) * GAIN + shift
    gl.store(out_ptr + row * COLS + column, value, mask=mask)
