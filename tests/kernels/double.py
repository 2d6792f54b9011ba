"""Kernels that only tests know: ``out = x * GAIN + shift + bias``, and an int8 matrix product."""

from edadm_compile.kernels.registry import Kernel, cdiv


def _rows(tensors, values):
    result = tensors["x"].float() * values["GAIN"] + values["shift"]
    if "bias" in tensors:
        result = result + tensors["bias"].float()
    tensors["out"].copy_(result)


ROWS = Kernel(
    name="rows",
    roles=("x", "bias", "out"),
    scalars=("rows", "shift"),
    constants={"COLS": 0, "GAIN": 1.0, "BIAS_STRIDE": 0, "EXACT": False},
    sizes=("BLOCK",),
    grid=lambda v: (v["rows"], cdiv(v["COLS"], v["BLOCK"]), 1),
    reference=_rows,
    entry="tests.kernels.double_triton:rows_kernel",
)


def _product(tensors, values):
    tensors["out"].copy_(tensors["a"].int() @ tensors["b"].int().T)


PRODUCT = Kernel(
    name="product",
    roles=("a", "b", "out"),
    scalars=(),
    constants={"M": 0, "N": 0, "K": 0},
    sizes=("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    grid=lambda v: (cdiv(v["M"], v["BLOCK_M"]), cdiv(v["N"], v["BLOCK_N"]), 1),
    reference=_product,
    entry="tests.kernels.double_triton:product_kernel",
)
DOUBLES = {"rows": ROWS, "product": PRODUCT}


def install(monkeypatch):
    """Let `registry.kernel` find the doubles beside the real kernels."""
    from edadm_compile.kernels import registry

    real = registry.kernel

    def kernel(name):
        return DOUBLES[name] if name in DOUBLES else real(name)

    for module in ("edadm_compile.kernels.request", "edadm_compile.runtime.engines.cuda_plan"):
        monkeypatch.setattr(f"{module}.kernel", kernel)
