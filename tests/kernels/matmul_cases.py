"""Launches of the integer matrix kernels on random data, in poisoned memory."""

import torch

from edadm_compile.kernels import constants, qconv2d, qlinear
from edadm_compile.kernels.registry import cdiv, kernel
from edadm_compile.quant import packing
from edadm_compile.quant.spec import weight_spec

TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "SPLIT_K": 1}
SENTINEL = 77
GAP = 16  # elements between the pixels of an output that belong to somebody else


def generator(seed):
    return torch.Generator().manual_seed(seed)


def codes(shape, seed, low=-128, high=127):
    return torch.randint(low, high + 1, shape, generator=generator(seed)).to(torch.int8)


def weight(shape, bits, seed):
    spec = weight_spec(bits)
    return codes(shape, seed, spec.qmin, spec.qmax)


def reals(shape, seed):
    return torch.randn(shape, generator=generator(seed))


def stride_of(channels):
    return cdiv(channels, 16) * 16 + 16


def activations(x):
    """Codes [pixels, C] in rows of `stride_of(C)`, the rest and a slack behind them random."""
    stride = stride_of(x.shape[-1])
    memory = codes((x.shape[0] * stride + 256,), 99)
    view = memory.as_strided((x.shape[0], x.shape[-1]), (stride, 1))
    view.copy_(x)
    return view


def add_segment(tensors, values, number, x, w, bits, seed, *, pad=None, scale=1e-4):
    """Operands and constants of one segment ("" or "2").

    Args:
        x: int8 [pixels, C].
        w: int8 codes [O, C, kh, kw] or [O, C]; with GLU twice as many rows.
    """
    channels, block, rows = x.shape[1], values["BLOCK_K"], values["BLOCK_M"]
    padded = cdiv(channels, block) * block
    bits = packing.storage_bits(bits)
    arguments = {"rows": rows, "glu": values["GLU"]}
    device = torch.device("cpu")
    tensors[f"x{number}"] = activations(x)
    tensors[f"w{number}"] = constants.weight(
        [packing.pack(w, bits)], device, bits=bits, shapes=[tuple(w.shape)], channels=padded, block=block, **arguments
    )
    length = cdiv(values["O"], rows) * rows
    for role, values_of in (
        ("multiplier", reals(w.shape[0], seed).abs() * scale),
        ("bias", reals(w.shape[0], seed + 1)),
    ):
        tensors[f"{role}{number}"] = constants.vector([values_of], device, length=length, glu=values["GLU"])
    if pad is not None:
        tensors[f"pad{number}"] = constants.codes([], device, value=pad, length=padded)
    values.update({f"C{number}": channels, f"X{number}_STRIDE": tensors[f"x{number}"].stride(0), f"KC{number}": padded})
    values[f"BITS{number}"] = bits


def add_epilogue(name, tensors, values, count, per_image, store):
    """Operands that the flags in `values` ask for; outputs poisoned."""
    outputs = values["O"]
    values["OUT_STRIDE"] = values["OUT_Q_STRIDE"] = values["RES_STRIDE"] = outputs + GAP
    values["ROW_STRIDE"] = outputs + 3
    poison = torch.full((count * (outputs + GAP) + 64,), float("nan"), dtype=store)
    if values["OUT_NCHW"]:
        tensors["out"] = torch.full((count // per_image, outputs, per_image), float("nan"))
    else:
        tensors["out"] = poison
    if values["OUT_Q"]:
        tensors["out_q"] = torch.full((poison.numel(),), SENTINEL, dtype=torch.int8)
        tensors["post"] = constants.post([torch.tensor(0.031), torch.tensor(-7)], torch.device("cpu"))
    if values["ROW"]:
        tensors["row"] = reals((count // per_image, outputs + 3), 21)
    if values["RESIDUAL"]:
        tensors["residual"] = reals((count, outputs + GAP), 22).to(store)
    if values["STATS"]:
        tensors["stats"] = torch.full((count // values["BLOCK_N"] * 2 * outputs,), float("nan"))
    if values["SPLIT_K"] > 1:
        tiles = kernel(name).grid(values)[0]
        accumulators = values["SEGMENTS"] * (2 if values["GLU"] else 1)
        size = values["SPLIT_K"] * accumulators * tiles * values["BLOCK_M"] * values["BLOCK_N"]
        tensors["partial"] = torch.full((size + 16,), 1 << 30, dtype=torch.int32)
        tensors["counter"] = torch.zeros(tiles, dtype=torch.int32)


def conv_case(
    *, batch=1, inner=5, inner2=0, outer=7, size=(5, 6), window=(3, 3), stride=(1, 1), sides=(1, 1, 1, 1),
    dilation=(1, 1), upsample=1, bits=8, bits2=8, pad=-37, store=torch.float32, **flags,
):  # fmt: skip
    """(tensors, values) of one convolution; `sides` are top, bottom, left, right."""
    values = {**kernel("qconv2d").constants, **TILE, **flags}
    (height, width), (top, bottom, left, right) = size, sides
    out_h = (height * upsample + top + bottom - dilation[0] * (window[0] - 1) - 1) // stride[0] + 1
    out_w = (width * upsample + left + right - dilation[1] * (window[1] - 1) - 1) // stride[1] + 1
    values |= {
        "H": height, "W": width, "KH": window[0], "KW": window[1], "STRIDE_H": stride[0], "STRIDE_W": stride[1],
        "PAD_T": top, "PAD_L": left, "DIL_H": dilation[0], "DIL_W": dilation[1], "UPSAMPLE": upsample,
        "OH": out_h, "OW": out_w, "O": outer, "pixels": batch * out_h * out_w, "SEGMENTS": 2 if inner2 else 1,
    }  # fmt: skip
    rows, tensors = (2 * outer if values["GLU"] else outer), {}
    for number, channels, width_of, seed in (("", inner, bits, 1), ("2", inner2, bits2, 5)):
        if channels:
            x = codes((batch * height * width, channels), seed)
            w = weight((rows, channels, *window), width_of, seed + 1)
            add_segment(tensors, values, number, x, w, width_of, seed + 2, pad=pad if any(sides) else None)
    add_epilogue("qconv2d", tensors, values, values["pixels"], out_h * out_w, store)
    return tensors, values


def linear_case(
    *, batch=1, per_image=5, inner=5, inner2=0, outer=7, bits=8, bits2=8, store=torch.float32, **flags
):  # fmt: skip
    """(tensors, values) of one linear layer of `batch` x `per_image` rows."""
    values = {**kernel("qlinear").constants, **TILE, **flags}
    values |= {"O": outer, "rows": batch * per_image, "ROWS_PER_IMAGE": per_image, "SEGMENTS": 2 if inner2 else 1}
    rows, tensors = (2 * outer if values["GLU"] else outer), {}
    for number, channels, width_of, seed in (("", inner, bits, 1), ("2", inner2, bits2, 5)):
        if channels:
            x = codes((values["rows"], channels), seed)
            add_segment(tensors, values, number, x, weight((rows, channels), width_of, seed + 1), width_of, seed + 2)
    add_epilogue("qlinear", tensors, values, values["rows"], per_image, store)
    return tensors, values


def launch(name, tensors, values):
    """Run the Triton kernel."""
    found = kernel(name)
    named = {key: values[key] for key in (*found.constants, *found.sizes)}
    arguments = [tensors.get(role) for role in found.roles] + [values[s] for s in found.scalars]
    found.function()[found.grid(values)](*arguments, **named)


def copy_of(tensors):
    """The same, each tensor on a copy of all the memory it lies in."""
    memory = {}
    for role, tensor in tensors.items():
        whole = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8)
        whole.untyped_storage().copy_(tensor.untyped_storage())
        memory[role] = whole.view(tensor.dtype).as_strided(tensor.size(), tensor.stride())
    return memory


def both(name, tensors, values):
    """(tensors after the Triton kernel, tensors after the reference), each on its own memory."""
    copies = [copy_of(tensors) for _ in range(2)]
    launch(name, copies[0], values)
    kernel(name).reference(copies[1], values)
    return copies


def memory_of(tensor):
    """All elements of the memory a tensor lies in."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def before_activation(name, tensors, values):
    """|value|, with GLU |value * gate|: what the rounding errors of an activation are measured by; [pixels, O]."""
    linear = qlinear.as_convolution(values) if name == "qlinear" else values
    value = qconv2d.segment(tensors, linear, "")
    if values["SEGMENTS"] == 2:
        value = value + qconv2d.segment(tensors, linear, "2")
    assert not values["ROW"] and not values["RESIDUAL"]
    return value.unflatten(1, (-1, values["O"])).double().prod(1).abs()


def check(name, tensors, values, ulps=0, magnitude=None):
    """Kernel against reference: codes and untouched memory exactly, floats exactly or within `ulps` of their type.

    Args:
        magnitude: float64 [pixels, O] that the roundings are relative to, instead of the result.
    """
    result, expected = both(name, tensors, values)
    for role, tensor in expected.items():
        mine, truth = memory_of(result[role]), memory_of(tensor)
        if role == "stats":  # the order of the sums is the kernel's own business
            check_stats(result, values)
        elif role == "partial":
            assert torch.equal(mine[-16:], truth[-16:]), "wrote behind the workspace"
        elif ulps and role == "out":
            written = ~truth.isnan()
            assert torch.equal(mine.isnan(), ~written)
            unit = truth.double().abs()
            if magnitude is not None:
                unit.as_strided(magnitude.shape, (values["OUT_STRIDE"], 1)).copy_(magnitude)
            error = (mine.double() - truth.double()).abs()
            assert bool((error <= ulps * torch.finfo(truth.dtype).eps * unit + 1e-35)[written].all()), role
        elif ulps and role == "out_q":  # a value next to a rounding boundary may fall on its other side
            assert bool(((mine.int() - truth.int()).abs() <= 1).all())
            assert int((mine != truth).sum()) <= 1 + truth.numel() // 100
        else:
            kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[truth.element_size()]
            assert torch.equal(mine.view(kind), truth.view(kind)), role
    return result


def check_stats(result, values):
    """Mean and squared deviations against those of the stored float32 output in float64."""
    n, channels, unit = values["BLOCK_N"], values["O"], 2.0**-24
    count = values.get("pixels", values.get("rows"))
    out = result["out"].as_strided((count, channels), (values["OUT_STRIDE"], 1)).double().reshape(-1, n, channels)
    mean, m2 = result["stats"].reshape(-1, 2, channels).double().unbind(1)
    deviation = out - out.mean(1, keepdim=True)
    slack = (n + 1) * unit * out.abs().mean(1)
    assert bool(((mean - out.mean(1)).abs() <= slack).all())
    truth = deviation.square().sum(1)
    bound = (n + 4) * unit * truth + 2 * slack * deviation.abs().sum(1) + n * slack**2
    assert bool(((m2 - truth).abs() <= bound).all())
