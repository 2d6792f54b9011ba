"""Run a registered kernel on CPU tensors: its Triton function (interpreted, or on a GPU), or its torch reference."""

import torch

from edadm_compile.kernels.registry import kernel

GPU = torch.cuda.is_available()
#: Values of the constant ASM that can run here: the interpreter has no inline assembly.
ASM = (False, True) if GPU else (False,)
#: Unit roundoff of the float types; Triton's interpreter truncates to bfloat16 instead of rounding.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
#: What memory holds before a launch.
SENTINEL = 85


def run_triton(name, tensors, constants, scalars, tile):
    """Launch the Triton function with the argument order of the registry; absent roles are None."""
    entry = kernel(name)
    values = {**entry.constants, **constants, **scalars, **tile.sizes}
    assert not {*tensors} - {*entry.roles} and not {*constants} - {*entry.constants}
    assert {*scalars} == {*entry.scalars} and {*tile.sizes} == {*entry.sizes}
    arguments = [tensors.get(role) for role in entry.roles] + [scalars[n] for n in entry.scalars]
    named = {n: values[n] for n in (*entry.constants, *entry.sizes)}
    if not GPU:
        entry.function()[entry.grid(values)](*arguments, **named)
        return
    copies = {id(t): _whole(t).cuda() for t in tensors.values()}
    on_device = [
        a if isinstance(a, int) or a is None else copies[id(a)].as_strided(a.shape, a.stride(), a.storage_offset())
        for a in arguments
    ]
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": not values["EXACT"]}
    entry.function()[entry.grid(values)](*on_device, **named, **options)
    for t in tensors.values():
        _whole(t).copy_(copies[id(t)])


def _whole(t):
    """All the memory behind a view, flat."""
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())


def run_reference(name, tensors, constants, scalars, tile):
    entry = kernel(name)
    entry.reference(tensors, {**entry.constants, **constants, **scalars, **tile.sizes})


def poisoned(shape, dtype):
    """Memory that is wrong wherever a kernel forgets to write: NaN, or `SENTINEL` for codes."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else SENTINEL, dtype=dtype)


def untouched(memory):
    """Whether every element is as `poisoned` left it."""
    return bool((memory.isnan() if memory.dtype.is_floating_point else memory == SENTINEL).all())


def strided(batch, pixels, channels, stride, dtype, seed, spread=1.0):
    """Random [batch, pixels, channels] with pixel stride `stride`; what lies between is NaN."""
    generator = torch.Generator().manual_seed(seed)
    memory = poisoned((batch, pixels, stride), dtype)
    shift = 2 * torch.randn(channels, generator=generator)
    memory[..., :channels] = (torch.randn(batch, pixels, channels, generator=generator) * spread + shift).to(dtype)
    return memory[..., :channels]


def post(scale, zero):
    return torch.tensor([scale, zero, 1 / scale], dtype=torch.float32)


def check_floats(result, exact, error):
    """|result - exact| within `error` (of the float32 computation) and the rounding of the store type."""
    assert result.shape == exact.shape
    bound = error + UNIT[result.dtype] * (exact.abs() + error) + 1e-30
    if result.dtype == torch.float16:
        bound = bound + 2.0**-25  # half the smallest subnormal
    worst = ((result.double() - exact).abs() / bound).max()
    assert bool(worst <= 1), float(worst)


def check_codes(result, exact, error, quantizer, qmin=-128, qmax=127, undecided=0.02):
    """Codes equal those of `exact` except where an error of `error` moves it over a rounding boundary."""
    scale, zero = quantizer[0].double(), quantizer[1].double()
    error = error + 2 * UNIT[torch.float32] * exact.abs()  # of the division or of the multiplication by 1 / scale
    low, high = (torch.clamp(torch.round((exact + sign * error) / scale) + zero, qmin, qmax) for sign in (-1, 1))
    assert result.shape == exact.shape and not result.dtype.is_floating_point
    assert float((low != high).double().mean()) <= undecided  # else the comparison would mean nothing
    wrong = (result < low) | (result > high)
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} codes, first at {wrong.nonzero()[0].tolist()}"
