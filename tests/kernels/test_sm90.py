"""The Gluon kernels: arithmetic and buffers on the CPU (`gluon_cpu`), machine code by counting, results on a GPU."""

import re
from dataclasses import replace

import pytest
import torch

from edadm_compile.kernels import aot, census, qconv2d_sm90, qlinear_sm90
from edadm_compile.kernels.launch import Launch, LaunchPlan, Tile
from edadm_compile.kernels.registry import kernel
from edadm_compile.kernels.request import request_of
from edadm_compile.kernels.targets import SHARED_LIMIT, arch_of
from tests.gpu.compiled import operand_of, run_compiled
from tests.kernels import gluon_cpu, matmul_cases

SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "STAGES": 3}
#: 9 steps of 64 with 5 channels: more than the buffers, and an odd number.
CONVOLUTIONS = {
    "one step": {"window": (1, 1), "sides": (0, 0, 0, 0)},
    "two steps": {"window": (1, 2), "sides": (0, 0, 0, 0), "STAGES": 4},
    "as many steps as buffers": {"window": (2, 2), "STAGES": 4},
    "two buffers": {"STAGES": 2},
    "borders, odd sizes": {"batch": 3, "size": (5, 7), "inner": 67, "outer": 70},
    "stride, one side": {"size": (9, 8), "stride": (2, 2), "sides": (0, 1, 0, 1)},
    "dilation": {"size": (8, 9), "dilation": (2, 1), "sides": (2, 2, 1, 1), "window": (3, 3)},
    "upsampled": {"upsample": 2, "size": (4, 5), "batch": 2},
    "many channels": {"inner": 200, "outer": 131, "size": (4, 4), "BLOCK_M": 128, "BLOCK_N": 64},
    "pixels in chunks": {"batch": 2, "size": (9, 11), "outer": 65, "BLOCK_N": 128},
    "wide tile": {"batch": 2, "size": (11, 13), "outer": 64, "BLOCK_N": 256},
    "one image per chunk": {"batch": 3, "size": (8, 8), "outer": 65, "BLOCK_N": 128, "ROW": True},
    "images in a chunk": {"batch": 3, "size": (5, 5), "outer": 65, "BLOCK_N": 128, "ROW": True, "RESIDUAL": True},
    "statistics": {"batch": 2, "size": (8, 8), "outer": 37, "STATS": True, "ACT": 1},
    "planes of pixels": {"batch": 2, "size": (5, 5), "outer": 3, "OUT_NCHW": True},
    "shallow": {"BLOCK_K": 32, "inner": 37},
    "deep": {"BLOCK_K": 128, "inner": 130, "size": (4, 4)},
}
LINEARS = {
    "one row": {"per_image": 1, "inner": 200, "outer": 64},
    "odd": {"batch": 3, "per_image": 17, "inner": 131, "outer": 37},
    "chunks": {"batch": 2, "per_image": 77, "inner": 320, "outer": 70, "BLOCK_N": 128, "ROW": True, "ACT": 2},
    "statistics": {"batch": 2, "per_image": 128, "inner": 70, "outer": 70, "STATS": True},
}
CASES = [("qconv2d_sm90", name) for name in CONVOLUTIONS] + [("qlinear_sm90", name) for name in LINEARS]


def case(kind, name, **flags):
    """(tensors, values) of a case; SMALL where it says nothing else."""
    cases, build = (
        (CONVOLUTIONS, matmul_cases.conv_case) if kind == "qconv2d_sm90" else (LINEARS, matmul_cases.linear_case)
    )
    return build(**{**SMALL, **cases[name], **flags})


def warps_of(values):
    return 8 if values["BLOCK_M"] * values["BLOCK_N"] > 128 * 128 else 4


def run_on_cpu(name, tensors, values):
    assert qconv2d_sm90.supports(values, warps_of(values)) == ""
    gluon_cpu.run(kernel(name), tensors, values, warps_of(values))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_source_computes_the_reference(monkeypatch, kind, name, bits):
    monkeypatch.setattr(matmul_cases, "launch", run_on_cpu)
    if name == "shallow" and bits == 4:
        pytest.skip("int4 needs a depth of 64")
    for flags in ({"EXACT": True}, {"OUT_Q": True, "OUT": False}):
        tensors, values = case(kind, name, bits=bits, **flags)
        if values["STATS"] and values["OUT_Q"]:
            continue  # the statistics are compared with those of `out`
        matmul_cases.check(kind, tensors, values)


def test_a_buffer_that_is_filled_too_early_is_noticed(monkeypatch):
    """The model of asynchrony can fail: one group too few in flight, or one product too many."""
    for method, more in (("wait_group", 1), ("warpgroup_mma_wait", 1)):
        with monkeypatch.context() as patch:
            real = getattr(gluon_cpu.Device, method)
            patch.setattr(
                gluon_cpu.Device, method, lambda self, n, deps=None, r=real, m=more: r(self, n + m, *_some(deps))
            )
            patch.setattr(matmul_cases, "launch", run_on_cpu)
            with pytest.raises(AssertionError):
                matmul_cases.check("qconv2d_sm90", *case("qconv2d_sm90", "borders, odd sizes", EXACT=True))


def _some(deps):
    return () if deps is None else (deps,)


def launch_of(kind, tensors, values, num_warps):
    found = kernel(kind)
    constants = {name: values[name] for name in found.constants}
    tile = Tile({size: values[size] for size in found.sizes}, num_warps, values["STAGES"])
    operands = {role: operand_of(role, tensor) for role, tensor in tensors.items()}
    return Launch(kind, kind, operands, constants, {s: values[s] for s in found.scalars}, tile)


def sd_case(bits, tile, store=torch.float16, **flags):
    """A 3x3 convolution of Stable Diffusion with a full epilogue, one row of pixels of it; only its shape matters."""
    tensors, values = matmul_cases.conv_case(
        inner=320, outer=320, size=(4, 64), bits=bits, store=store, ASM=True, ROW=True, RESIDUAL=True, OUT_Q=True, ACT=1,
        **tile, **flags,
    )  # fmt: skip
    return tensors, {**values, **dict.fromkeys(("OUT_STRIDE", "OUT_Q_STRIDE", "RES_STRIDE"), 320)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize(
    ("bits", "sizes", "warps", "flags"),
    [
        (8, (128, 128, 64, 4), 4, {}),
        (8, (64, 128, 64, 4), 4, {"STATS": True}),
        (8, (128, 256, 64, 4), 8, {}),
        (4, (128, 128, 64, 3), 4, {}),
        (4, (64, 256, 64, 4), 4, {}),
    ],
)
def test_machine_code(cache, bits, sizes, warps, flags):
    """Products and copies in flight, full-width copies, no spills, two programs of 4 warps on a multiprocessor."""
    tile = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "STAGES"), sizes, strict=True))
    tensors, values = sd_case(bits, tile, **flags)
    assert qconv2d_sm90.supports(values, warps) == ""
    plan = LaunchPlan(
        "sm_90", 1, torch.float16, (launch_of("qconv2d_sm90", tensors, values, warps),), (), 0, {}, 0, {}, (1,)
    )
    (cubin,) = aot.compile_plans([plan], jobs=1, cache=cache).values()
    found = census.census(cubin.data, cubin.shared)
    assert census.check(found, "sm_90", integer=True) == [] and cubin.spills == 0
    copies = {name: count for name, count in found.opcodes.items() if name.startswith("LDGSTS")}
    assert set(copies) == {"LDGSTS.E.BYPASS.128"}
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", census.disassemble(cubin.data))
    steps = 45  # 9 taps x 5 blocks of 64 channels: odd, so int4 ends with a drained step
    assert steps % 2 == 1 and waits == (["2", "2", "0", "0"] if bits == 4 else ["1", "0"])
    if warps == 4:
        assert 2 * (cubin.shared + 1024) <= 228 << 10 and 2 * 128 * found.registers <= 65536
    assert found.shared == qconv2d_sm90.shared_bytes(values), "the epilogue needs memory of its own"


FULL = {**kernel("qconv2d_sm90").constants, "C": 320, "KC": 320, "O": 320, "H": 64, "W": 64, "OH": 64, "OW": 64, "KH": 3,
        "KW": 3, "pixels": 4096, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT_K": 1, "STAGES": 3}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "warps", "reason"),
    [
        ({}, 4, ""),
        ({"SEGMENTS": 2}, 4, "two segments"),
        ({"GLU": True}, 4, "a gated output"),
        ({"SPLIT_K": 2}, 4, "a sum over several programs"),
        ({"EXACT": True, "OUT_Q": True}, 4, "exact requantization"),
        ({}, 2, "2 warps"),
        ({"BLOCK_M": 64}, 8, "64 rows of weights for 8 warps"),
        ({"BLOCK_N": 32}, 4, "32 columns"),
        ({"BLOCK_K": 32, "BITS": 4}, 4, "a depth of 32"),
        ({"BLOCK_K": 32}, 4, ""),
        ({"BLOCK_N": 256}, 4, "that many accumulators"),
        ({"STATS": True}, 4, "that many accumulators"),
        ({"STATS": True}, 8, ""),
        ({"BLOCK_M": 256}, 8, "256 rows where the weights end"),  # 320 rows are stored as 384, two tiles read 512
        ({"BLOCK_M": 256, "O": 512}, 8, ""),
        ({"STAGES": 1}, 4, "1 stages"),
        ({"STAGES": 16}, 4, "262144 bytes of shared memory"),
    ],
)
def test_what_it_takes(change, warps, reason):
    assert qconv2d_sm90.supports({**FULL, **change}, warps) == reason


@pytest.mark.parametrize("bits", [8, 4])
def test_candidates_fit_and_are_supported(bits):
    values = {key: value for key, value in FULL.items() if key not in kernel("qconv2d_sm90").sizes} | {"BITS": bits}
    linear = {"C": 320, "KC": 320, "O": 320, "rows": 4096, "BITS": bits}
    for module, given in ((qconv2d_sm90, values), (qlinear_sm90, linear)):
        tiles = module.candidates(given)
        assert len(tiles) >= 5
        full = {**module.KERNEL.constants, **given}
        for tile in tiles:
            assert set(tile.sizes) == set(module.KERNEL.sizes) and tile.num_stages == tile.sizes["STAGES"] >= 3
            assert module.supports({**full, **tile.sizes}, tile.num_warps) == ""
            shared = qconv2d_sm90.shared_bytes({**full, **tile.sizes})
            assert shared <= SHARED_LIMIT["sm_90"] and (tile.num_warps == 8 or 2 * (shared + 1024) <= 228 << 10)
        assert module.candidates({**given, "GLU": True}) == []
        assert all(tile.sizes["BLOCK_M"] == 64 for tile in module.candidates({**given, "O": 4}))


def test_device_code_is_part_of_the_key(monkeypatch):
    """A changed Gluon source, or another number of stages, is another kernel."""
    tensors, values = sd_case(8, SMALL)
    first = request_of(launch_of("qconv2d_sm90", tensors, values, 4), "sm_90")
    second = request_of(launch_of("qconv2d_sm90", tensors, {**values, "STAGES": 4}, 4), "sm_90")
    assert first.entry.startswith("edadm_compile.kernels.gluon.") and first.key != second.key
    assert replace(first, num_warps=8).key != first.key


def magnitude_of(kind, tensors, values):
    """|result| without the activation, float64 [pixels, O]."""
    copies = matmul_cases.copy_of(tensors)
    kernel(kind).reference(copies, {**values, "ACT": 0, "STATS": False, "OUT_Q": False})
    shape = (values.get("pixels") or values["rows"], values["O"])
    return copies["out"].as_strided(shape, (values["OUT_STRIDE"], 1)).double().abs()


TILES = {
    "64": ({}, 4),
    "64x128": ({"BLOCK_N": 128, "STAGES": 4}, 4),
    "128x128": ({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, 4),
    "64x256": ({"BLOCK_N": 256, "STAGES": 4}, 4),
    "128x256": ({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128}, 8),
    "256x128": ({"BLOCK_M": 256, "BLOCK_N": 128, "STAGES": 2}, 8),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or arch_of() != "sm_90", reason="no GPU of sm_90")
@pytest.mark.parametrize("tile", list(TILES))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_equals_the_reference(monkeypatch, kind, name, bits, tile):
    """Bit for bit in float32 (no fused rounding), codes next to a tie within one; memory around untouched."""
    sizes, warps = TILES[tile]

    def launch(kind, tensors, values):
        found = kernel(kind)
        chosen = Tile({size: values[size] for size in found.sizes}, warps, values["STAGES"])
        run_compiled(kind, tensors, values, {s: values[s] for s in found.scalars}, chosen)

    monkeypatch.setattr(matmul_cases, "launch", launch)
    ran = 0
    for flags in ({"EXACT": True}, {"OUT_Q": True, "OUT": False}):
        tensors, values = case(kind, name, bits=bits, ASM=True, **flags, **sizes)
        if qconv2d_sm90.supports(values, warps) or (values["STATS"] and values["OUT_Q"]):
            continue
        if (
            values["STATS"]
            and values.get("OH", 1) * values.get("OW", values.get("ROWS_PER_IMAGE", 1)) % values["BLOCK_N"]
        ):
            continue
        ran += 1
        # The roundings of an activation are relative to what goes into it: x * sigmoid(x) is small where x is not.
        size = {"magnitude": magnitude_of(kind, tensors, values)} if values["ACT"] and values["OUT"] else {}
        for _ in range(3):  # a race need not lose the first time
            matmul_cases.check(kind, tensors, values, ulps=0 if flags.get("EXACT") and not values["ACT"] else 4, **size)
    if not ran:
        pytest.skip("the tile does not fit the case")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or arch_of() != "sm_90", reason="no GPU of sm_90")
@pytest.mark.parametrize("bits", [8, 4])
def test_many_programs_give_the_same_every_time(monkeypatch, bits):
    """A full GPU, long loops: products and copies that overtake each other would show."""
    sizes, warps = TILES["128x128"]

    def launch(kind, tensors, values):
        chosen = Tile({size: values[size] for size in kernel(kind).sizes}, warps, values["STAGES"])
        run_compiled(kind, tensors, values, {"pixels": values["pixels"]}, chosen)

    monkeypatch.setattr(matmul_cases, "launch", launch)
    flags = {"batch": 8, "inner": 640, "outer": 640, "size": (32, 32), "EXACT": True, "ASM": True, "bits": bits}
    tensors, values = matmul_cases.conv_case(**{**SMALL, **sizes, **flags})
    for _ in range(5):
        matmul_cases.check("qconv2d_sm90", tensors, values)
