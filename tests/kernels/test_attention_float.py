"""Attention on floating-point operands: the kernel under Triton's interpreter against the library operator in float64."""

import pytest
import torch

from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.registry import kernel

KERNEL = kernel("attention_float")
#: (batch, heads, queries, keys, head size, BLOCK_Q, BLOCK_KV): one key, ragged tails, several blocks, one real shape cut down
SHAPES = {
    "one query, one key": (1, 1, 1, 1, 8, 32, 32),
    "primes": (2, 3, 5, 7, 13, 32, 32),
    "text": (1, 2, 33, 77, 40, 32, 32),
    "whole blocks": (2, 2, 64, 64, 16, 64, 32),
    "whole blocks and a tail": (1, 1, 17, 530, 16, 32, 32),
    "wide heads": (1, 1, 16, 48, 160, 32, 16),
}


def launch(shape, dtype=torch.float32, stride=0, seed=0):
    batch, heads, queries, keys, size, block_q, block_kv = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    channels = heads * size
    tensors = {}
    for role, length in (
        ("q", queries),
        ("k", keys),
        ("v", keys),
    ):  # inside wider rows, as merged projections leave them
        rows = torch.full((batch, length, channels + stride), float("nan"), dtype=dtype)
        rows[..., :channels] = torch.randn((batch, length, channels), generator=generator).to(dtype)
        tensors[role] = rows[..., :channels].unflatten(-1, (heads, size))
    tensors["post"] = torch.tensor([0.02, 3.0, 50.0])
    tensors["out"] = torch.full((batch, queries + 1, channels), float("nan"), dtype=dtype)
    tensors["out_q"] = torch.full((batch, queries + 1, channels), 99, dtype=torch.int8)
    constants = {"LQ": queries, "LK": keys, "HEADS": heads, "D": size, "SCALE": size**-0.5, "OUT_STRIDE": channels,
                 "OUT_Q": True, "OUT_Q_STRIDE": channels, "EXACT": True, "QMIN": -100}  # fmt: skip
    for role, length in (("Q", queries), ("K", keys), ("V", keys)):
        row = channels + stride
        constants |= {f"{role}_BATCH": length * row, f"{role}_ROW": row, f"{role}_HEAD": size}
    values = {**KERNEL.constants, **constants, "batch": batch, "BLOCK_Q": block_q, "BLOCK_KV": block_kv}
    return tensors, values


def interpret(tensors, values):
    pointers = [tensors[role] for role in KERNEL.roles]
    named = {name: values[name] for name in (*KERNEL.constants, *KERNEL.sizes)}
    KERNEL.function()[KERNEL.grid(values)](*pointers, values["batch"], **named)


def expected(tensors):
    q, k, v = (tensors[role].permute(0, 2, 1, 3).double() for role in "qkv")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).flatten(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter test")
@pytest.mark.parametrize("stride", [0, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, stride):
    """float32: within a few roundings of float64; codes follow from the result; only the first LQ rows are written."""
    tensors, values = launch(shape, stride=stride)
    if values["batch"] > 1:  # rows of an image end where the next begins
        tensors["out"], tensors["out_q"] = (
            t[:, : values["LQ"]].contiguous() for t in (tensors["out"], tensors["out_q"])
        )
    interpret(tensors, values)
    out, codes = (tensors[role][:, : values["LQ"]] for role in ("out", "out_q"))
    wanted = expected(tensors)
    assert float((out.double() - wanted).abs().max()) <= 64 * 2.0**-24 * max(1.0, float(wanted.abs().max()))
    assert torch.equal(codes.float(), (torch.round(out / 0.02) + 3).clamp(-100, 127))
    assert tensors["out"][:, values["LQ"] :].isnan().all() and (tensors["out_q"][:, values["LQ"] :] == 99).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter test")
@pytest.mark.parametrize("shape", ["text", "whole blocks"])
def test_half_precision(shape):
    """float16 operands: probabilities and result are rounded to 11 bits, sums are float32."""
    tensors, values = launch(shape, torch.float16)
    if values["batch"] > 1:
        tensors["out"], tensors["out_q"] = (
            t[:, : values["LQ"]].contiguous() for t in (tensors["out"], tensors["out_q"])
        )
    interpret(tensors, values)
    wanted = expected(tensors)
    bound = 2.0**-10 * float(tensors["v"].abs().max()) + 2.0**-11 * wanted.abs()
    assert ((tensors["out"][:, : values["LQ"]].double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_library_operator(shape):
    tensors, values = launch(shape)
    tensors["out"], tensors["out_q"] = (t[:, : values["LQ"]].clone() for t in (tensors["out"], tensors["out_q"]))
    KERNEL.reference(tensors, values)
    assert float((tensors["out"].double() - expected(tensors)).abs().max()) < 1e-5


@pytest.mark.parametrize(("keys", "size", "block_kv"), [(77, 80, 32), (4096, 80, 64), (77, 40, 64), (256, 256, 32)])
def test_tiles_that_do_not_spill(keys, size, block_kv):
    from edadm_compile.kernels.attention_float import choose

    found = choose({"D": size, "LK": keys, "LQ": 1024, "HEADS": 8, "batch": 8})
    assert isinstance(found, Tile) and found.sizes["BLOCK_KV"] == block_kv


def test_few_programs_get_fewer_queries_each():
    from edadm_compile.kernels.attention_float import choose

    rows = [
        choose({"D": 256, "LK": 256, "LQ": 256, "HEADS": 1, "batch": batch}).sizes["BLOCK_Q"]
        for batch in (1, 8, 32, 64)
    ]
    assert rows == [16, 16, 32, 64]
