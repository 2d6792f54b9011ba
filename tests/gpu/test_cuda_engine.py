"""Needs a GPU: the CUDA engine end to end, and every kernel through it."""

import threading

import pytest
import torch

from edadm_compile.errors import TargetError
from edadm_compile.kernels import aot, request
from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.registry import kernel
from edadm_compile.kernels.targets import arch_of
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import make_plan as plan_program
from edadm_compile.runtime.engines.cuda import CudaEngine
from edadm_compile.runtime.engines.cuda_driver import Arguments, cuda_driver
from tests.gpu.compiled import run_compiled
from tests.kernels import double, matmul_cases, test_attention, test_groupnorm, test_layernorm, test_quantize
from tests.lowering.plans import inputs_of
from tests.runtime.test_cuda_engine import BIAS, expected, inputs, make_plan, make_program

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    double.install(monkeypatch)


@pytest.fixture(scope="module")
def bundle():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "kernel", lambda name: double.DOUBLES[name])
        return aot.compile_bundle([make_plan(batch, arch_of()) for batch in (2, 4)])


def engine_of(bundle, **options):
    tensors = {"bias": BIAS, "first": torch.tensor([-3.0])}.__getitem__
    return CudaEngine(make_program(), bundle, tensors=tensors, **options)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("graphs", [False, True])
def test_every_batch_and_timestep(bundle, graphs, where):
    """Changing inputs, replayed: 1 fills up the plan of 2, 9 runs as 4 + 4 + 1; known and unknown timesteps."""
    engine = engine_of(bundle, graphs=graphs)
    for seed in range(3):
        for batch in (1, 2, 3, 4, 5, 9):
            for t in (None, [10.0] * batch, [7.0] * batch):
                values = inputs(batch, seed, t)
                result = engine(*(value.to(where) for value in values))
                assert result.is_cuda and result.dtype == torch.float32
                assert torch.equal(result.cpu(), expected(*values))


def test_conditions_are_recomputed_when_they_change(bundle):
    engine = engine_of(bundle)
    x, t, cond = inputs(2)
    on_gpu = cond.cuda()
    for _ in range(3):
        assert torch.equal(engine(x, t, on_gpu).cpu(), expected(x, t, cond))
    cond.mul_(2), on_gpu.data.mul_(2)  # past the version counter
    engine.forget_conditions()
    assert torch.equal(engine(x, t, on_gpu).cpu(), expected(x, t, cond))
    cond.add_(5), on_gpu.add_(5)  # seen by its version
    assert torch.equal(engine(x, t, on_gpu).cpu(), expected(x, t, cond))
    other = on_gpu.clone().add_(7)
    assert torch.equal(engine(x, t, other).cpu(), expected(x, t, cond + 7))


def test_a_warm_call_does_not_wait_for_the_gpu(bundle):
    """With x on the GPU and t on the host nothing synchronises, equal timesteps or not."""
    engine = engine_of(bundle)
    x, _, cond = (value.cuda() for value in inputs(2))
    times = [torch.tensor([10.0, 10.0]), torch.tensor([25.0, 0.0])]
    results = []
    for warm in (False, True):
        torch.cuda.set_sync_debug_mode("error" if warm else "default")
        try:
            results = [engine(x, t, cond) for t in times]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for t, result in zip(times, results, strict=True):
        assert torch.equal(result.cpu(), expected(x.cpu(), t, cond.cpu()))


def test_calls_on_several_streams_do_not_mix(bundle):
    engine = engine_of(bundle)
    streams = [torch.cuda.Stream() for _ in range(3)]
    cases = [[value.cuda() for value in inputs(4, seed)] for seed in range(12)]
    torch.cuda.synchronize()
    results = []
    for i, (x, t, cond) in enumerate(cases):
        with torch.cuda.stream(streams[i % 3]):
            results.append(engine(x, t.cpu(), cond))
    torch.cuda.synchronize()
    for case, result in zip(cases, results, strict=True):
        assert torch.equal(result.cpu(), expected(*(value.cpu() for value in case)))


def test_it_runs_in_another_thread_and_in_inference_mode(bundle):
    engine, results = engine_of(bundle), []
    values = inputs(2)

    def call():
        with torch.inference_mode():
            results.append(engine(*values).cpu())

    for _ in range(2):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    results.append(engine(*values).cpu())
    assert len(results) == 3 and all(torch.equal(result, expected(*values)) for result in results)


def test_code_for_another_gpu_is_refused(bundle):
    other = "sm_80" if arch_of() != "sm_80" else "sm_90"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "kernel", lambda name: double.DOUBLES[name])
        foreign = aot.compile_bundle([make_plan(2, other)])
    with pytest.raises(TargetError, match=f"this GPU is {arch_of()}, but the file has code for {other}"):
        engine_of(foreign)
    with pytest.raises(TargetError, match="failed: "):
        cuda_driver().launch(*_not_a_kernel())


def _not_a_kernel():
    from cuda.bindings import driver

    return driver.CUfunction(0), (1, 1, 1), 32, 0, 0, Arguments([], [])


@pytest.mark.parametrize("stages", [2, 3])
def test_large_shared_memory_and_exact_products(stages):
    """64 KB and more must be asked for; int8 products accumulate exactly."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (512, 512), generator=generator).to(torch.int8) for _ in range(2))
    out = torch.full((512, 512), 7, dtype=torch.int32)
    tile = Tile({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, 8, stages)
    run_compiled("product", {"a": a, "b": b, "out": out}, {"M": 512, "N": 512, "K": 512}, {}, tile)
    assert torch.equal(out, (a.double() @ b.double().T).int())


CONVOLUTIONS = {
    "3x3": {"inner": 64, "outer": 64, "size": (16, 16)},
    "odd": {"inner": 37, "outer": 21, "size": (7, 9), "batch": 3},
    "stride": {"inner": 32, "outer": 33, "size": (9, 9), "stride": (2, 2)},
    "upsample": {"inner": 40, "outer": 24, "size": (6, 6), "upsample": 2},
    "split": {"inner": 320, "outer": 320, "size": (8, 8), "SPLIT_K": 4},
    "two sources": {
        "inner": 64,
        "inner2": 96,
        "outer": 48,
        "size": (8, 8),
        "OUT_Q": True,
        "ROW": True,
        "RESIDUAL": True,
    },
}
LINEARS = {
    "vector": {"per_image": 1, "inner": 1280, "outer": 320},
    "context": {"batch": 2, "per_image": 77, "inner": 768, "outer": 320, "OUT_Q": True},
    "odd": {"batch": 3, "per_image": 17, "inner": 131, "outer": 37},
}
TILES = [{}, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}]


def run_matmul(name, tensors, values):
    found = kernel(name)
    tile = Tile({size: values[size] for size in found.sizes})
    run_compiled(name, tensors, values, {scalar: values[scalar] for scalar in found.scalars}, tile)


@pytest.mark.parametrize("tile", TILES, ids=["16", "64", "128"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [f"qconv2d {n}" for n in CONVOLUTIONS] + [f"qlinear {n}" for n in LINEARS])
def test_matrix_kernels_equal_their_reference_bit_for_bit(monkeypatch, name, bits, tile):
    monkeypatch.setattr(matmul_cases, "launch", run_matmul)
    kind, _, case = name.partition(" ")
    flags = {**(CONVOLUTIONS if kind == "qconv2d" else LINEARS)[case], "bits": bits, "EXACT": True, "ASM": True, **tile}
    build = matmul_cases.conv_case if kind == "qconv2d" else matmul_cases.linear_case
    matmul_cases.check(kind, *build(**flags))


NORMS = [("groupnorm", test_groupnorm, n) for n in test_groupnorm.CASES]
NORMS += [("layernorm", test_layernorm, n) for n in test_layernorm.CASES]
NORMS += [("attention", test_attention, n) for n in test_attention.CASES]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("case", NORMS, ids=lambda case: f"{case[0]} {case[2]}")
def test_other_kernels_stay_within_their_error_bounds(case, exact):
    name, module, which = case
    flags = {"EXACT": exact}
    if name == "groupnorm":
        flags["ACT"] = 1
    tensors, constants, scalars, tile = module.build(which, **flags)
    run_compiled(name, tensors, constants, scalars, tile)
    module.check(tensors, constants)


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "gaps"])
@pytest.mark.parametrize("name", list(test_quantize.SHAPES))
def test_quantize_equals_its_reference(name, layout):
    runs = []
    for run in (run_compiled, test_quantize.run_reference):
        tensors, constants, scalars, tile = test_quantize.build(name, layout, EXACT=True)
        run("quantize", tensors, constants, scalars, tile)
        runs.append(tensors)
    assert torch.equal(runs[0]["out_q"], runs[1]["out_q"]) and torch.equal(runs[0]["out"], runs[1]["out"])


@pytest.mark.parametrize("store", [torch.float32, torch.float16])
def test_a_compiled_unet_agrees_with_the_reference_engine(artifact, store):
    """Integer sums are exact; what differs are roundings of float32 (and of float16 between kernels) and codes at a tie."""
    program = artifact.lowered
    exact = store == torch.float32
    plans = [plan_program(program, Target(arch_of(), batch, store, exact=exact)) for batch in (1, 4)]
    engine = CudaEngine(program, aot.compile_bundle(plans))
    for batch, seed in ((1, 0), (3, 1), (4, 2), (6, 3)):
        values = inputs_of(program, batch, seed)
        with torch.no_grad():
            truth = program(*values)
        for _ in range(2):
            result = engine(*values).cpu()
            error = (result - truth).abs()
            spread = truth.std()
            assert bool((error.mean() <= (0.01 if exact else 0.05) * spread).item())
            assert bool((error.max() <= (0.1 if exact else 0.4) * spread).item())
