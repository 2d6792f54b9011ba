"""The CUDA engine on the CPU: a driver that runs kernels' references on the memory behind the packed pointers."""

import ctypes
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from edadm_compile.errors import ArtifactError, InputError, TargetError
from edadm_compile.ir.program import TimeTables
from edadm_compile.kernels import registry
from edadm_compile.kernels.cubin import Bundle, Cubin
from edadm_compile.kernels.launch import TIME_TABLES, Buffer, ConstantSpec, Launch, LaunchPlan, Operand, Tile
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import make_plan as plan_program
from edadm_compile.runtime.engines import cuda_driver
from edadm_compile.runtime.engines.cuda import CudaEngine
from edadm_compile.runtime.engines.cuda_driver import Arguments, CudaDriver
from edadm_compile.runtime.engines.cuda_plan import may_start_early
from edadm_compile.runtime.engines.cuda_time import TimeRows
from tests.graphs import GraphBuilder
from tests.kernels import double
from tests.lowering.plans import inputs_of

COLS = 12
KEYS = torch.tensor([0.0, 10.0, 25.0, 90.0], dtype=torch.float64)
TABLES = {"emb": torch.arange(4 * COLS).reshape(4, COLS) * 100.0, "mean": torch.arange(4 * 6.0).reshape(4, 6)}
BIAS = torch.arange(COLS) * 1000.0


class Path(torch.nn.Module):
    def forward(self, t):
        return (t.float()[:, None].expand(-1, COLS) * 7,)


def operand(space, key, batch, cols=COLS, strides=None, offset=0):
    return Operand(space, key, torch.float32, (batch, cols), strides or (cols, 1), offset)


def rows(layer, batch, gain=1.0, shift=0, **operands):
    constants = {"COLS": COLS, "GAIN": gain, "BIAS_STRIDE": operands["bias"].strides[0] if "bias" in operands else 0}
    return Launch("rows", layer, operands, constants, {"rows": batch, "shift": shift}, Tile({"BLOCK": 16}, 4, 2))


def make_plan(batch, arch="sm_90"):
    """out = 2 x + cond + 1 + 70000 + emb + bias, in four launches; the first depends on the condition alone."""
    condition, hidden, total = (operand("arena", i, batch) for i in range(3))
    add = ["aten.add.Tensor", [{"role": "in0"}, {"role": "in1"}], {}]
    inputs = {"in0": hidden, "in1": operand("input", TIME_TABLES, batch, strides=(COLS + 6, 1), offset=6), "out": total}
    launches = (
        rows("condition", batch, 1.0, 1, x=operand("input", "cond", batch), out=condition),
        rows("mix", batch, 2.0, 70_000, out=hidden, bias=condition, x=operand("input", "x", batch)),
        Launch("torch", "time", inputs, why_float="test", call=add),
        rows(
            "last",
            batch,
            1.0,
            0,
            x=total,
            bias=operand("constant", "bias", batch, strides=(0, 1), offset=1),
            out=operand("output", 0, batch),
        ),
    )
    size = -(-batch * COLS * 4 // 256) * 256
    buffers = tuple(Buffer(size, 0, 4, i * size) for i in range(3))
    inputs = {"x": ((batch, COLS), torch.float32), "cond": ((batch, COLS), torch.float32)}
    inputs |= {TIME_TABLES: ((batch, COLS + 6), torch.float32)}
    tables = {"mean": (0, (6,)), "emb": (6, (COLS,))}
    constants = {"bias": ConstantSpec(("first", "bias"), "vector", {"length": COLS + 1})}
    shape = (batch, COLS)
    return LaunchPlan(arch, batch, torch.float32, launches, buffers, 3 * size, constants, 0, inputs, shape, 1, tables)


def make_bundle(*plans):
    """One kernel per layer, so that a driver knows which launch it is asked for."""
    keys, cubins = {}, {}
    for plan in plans:
        names = []
        for i, launch in enumerate(plan.launches):
            layer = launch.layer if launch.kernel in double.DOUBLES else f"{i} {launch.layer}"
            key = "" if launch.kernel == "torch" else f"{layer}/{plan.batch}"
            if key:
                params = ("u64",) * len(launch.operands) + ("u32",) * len(launch.scalars) + ("u64", "u64")
                cubins[key] = Cubin(key, b"\x7fELF", 64, 4, 32, 0, params)
            names.append(key)
        keys[plan.arch, plan.batch] = tuple(names)
    return Bundle({(p.arch, p.batch): p for p in plans}, keys, cubins)


class FakeDriver:
    """Runs references; `log` has the name of every kernel launched."""

    def __init__(self, bundle):
        self.log, self.loaded, self.broken = [], [], False
        self._launches = {
            key: launch
            for name, plan in bundle.plans.items()
            for key, launch in zip(bundle.keys[name], plan.launches, strict=True)
        }

    def load(self, cubin):
        self.loaded.append(cubin.name)
        return cubin

    def launch(self, function, grid, block, shared, stream, arguments, early=False):
        if self.broken:
            raise TargetError("gone")
        self.log.append(function.name)
        launch = self._launches[function.name]
        kernel = double.DOUBLES.get(launch.kernel) or registry.kernel(launch.kernel)
        # What the device would see: the parameters in memory, in the order of the kernel's signature.
        table = (ctypes.c_void_p * len(arguments.kinds)).from_address(arguments.address)
        kinds = [ctypes.c_uint64 if kind == "u64" else ctypes.c_int32 for kind in arguments.kinds]
        values = [kind.from_address(cell).value for kind, cell in zip(kinds, table, strict=True)]
        assert values[-2:] == [0, 0]
        present = [role for role in kernel.roles if role in launch.operands]
        tensors = {role: _at(values[i], launch.operands[role]) for i, role in enumerate(present)}
        scalars = dict(zip(kernel.scalars, values[len(present) : -2], strict=True))
        given = {**kernel.constants, **launch.constants, **launch.tile.sizes, **scalars}
        assert grid == kernel.grid(given) and block == 128 and shared == 64 and stream == 0
        kernel.reference(tensors, given)


def _at(pointer, operand):
    """A tensor at an address; its storage seems to go on, since references view the gaps between rows as kernels do."""
    memory = (ctypes.c_uint8 * (operand.span + (1 << 20))).from_address(pointer)
    return torch.frombuffer(memory, dtype=operand.dtype).as_strided(operand.shape, operand.strides)


def make_program(tables=TABLES, path=True):
    builder = GraphBuilder(x=(COLS,), t_dtype=torch.float32, cond=(COLS,))
    for name in tables:
        builder.graph.placeholder(name)
    time = TimeTables(KEYS, dict(tables), fx.symbolic_trace(Path()) if path else None, ("emb",))
    return builder.program(builder.x, "lowered", time=time, shapes=False)


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    double.install(monkeypatch)


@pytest.fixture
def bundle():
    return make_bundle(make_plan(2), make_plan(4))


@pytest.fixture
def driver(bundle):
    return FakeDriver(bundle)


def engine_of(bundle, driver, program=None, **options):
    tensors = {"bias": BIAS, "first": torch.tensor([-3.0])}.__getitem__
    return CudaEngine(program or make_program(), bundle, "cpu", tensors=tensors, arch="sm_90", driver=driver, **options)


@pytest.fixture
def engine(bundle, driver):
    return engine_of(bundle, driver)


def inputs(batch, seed=0, t=None):
    generator = torch.Generator().manual_seed(seed)
    x, cond = (torch.randint(-50, 50, (batch, COLS), generator=generator).float() for _ in range(2))
    chosen = KEYS[torch.randint(0, 4, (batch,), generator=generator)] if t is None else torch.tensor(t)
    return x, chosen.float(), cond


def expected(x, t, cond):
    time = TimeTables(KEYS, dict(TABLES), Path(), ("emb",)).lookup(t)
    return 2 * x + cond + 70_001 + time["emb"] + BIAS


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 7, 9, 12])
def test_every_batch_size_gives_its_rows(engine, driver, batch):
    """1 fills up the plan of 2, 3 that of 4, 9 runs as 4 + 4 + 1."""
    for seed in range(2):
        values = inputs(batch, seed)
        assert torch.equal(engine(*values), expected(*values))
    sizes = [name.split("/")[1] for name in driver.log if name.startswith("last")]
    plans = {1: "2", 2: "2", 3: "4", 4: "4", 5: "42", 6: "42", 7: "44", 9: "442", 12: "444"}[batch]
    assert "".join(sizes) == plans * 2


def test_launches_run_in_order_and_kernels_are_loaded_once(engine, driver):
    values = inputs(2)
    engine(*values)
    assert driver.loaded == driver.log == ["condition/2", "mix/2", "last/2"]
    engine(*values)
    assert driver.loaded == ["condition/2", "mix/2", "last/2"] and driver.log[3:] == ["mix/2", "last/2"]


def test_results_are_not_overwritten(engine):
    first, second = inputs(2, 1), inputs(2, 2)
    kept = engine(*first)
    engine(*second)
    assert torch.equal(kept, expected(*first)) and kept.dtype == torch.float32


def _conditioned(driver):
    return sum(name.startswith("condition") for name in driver.log)


def test_conditions_are_computed_when_they_change(engine, driver):
    """Same tensor, same contents: once. Written to, replaced, in another batch, or asked for: again."""
    x, t, cond = inputs(2)
    for count, change in enumerate(
        (lambda: None, lambda: cond.add_(1), lambda: cond.data.mul_(2), engine.forget_conditions), start=1
    ):
        change()
        for _ in range(4):
            assert torch.equal(engine(x, t, cond), expected(x, t, cond))
        assert _conditioned(driver) == count
    other = cond + 1
    assert torch.equal(engine(x, t, other), expected(x, t, other)) and _conditioned(driver) == 5
    engine(x, t, other.clone())  # equal contents on the host need no computation
    assert _conditioned(driver) == 5
    small = engine(x[:1], t[:1], cond[:1])
    assert torch.equal(small, expected(x[:1], t[:1], cond[:1])) and _conditioned(driver) == 6


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_of_a_device_are_told_apart_by_version(monkeypatch, bundle, driver, inference):
    """For tensors that are not on the host: identity and version; inference tensors have none and always count as new."""
    from edadm_compile.runtime.engines import cuda

    monkeypatch.setattr(cuda, "_on_host", lambda value: False)
    engine = engine_of(bundle, driver)
    x, t, cond = inputs(2)
    if inference:
        with torch.inference_mode():
            cond = cond.clone()
    for _ in range(4):
        engine(x, t, cond)
    assert _conditioned(driver) == (4 if inference else 1)
    with torch.inference_mode(inference):
        cond.add_(1)
    assert torch.equal(engine(x, t, cond), expected(x, t, cond)) and _conditioned(driver) == (5 if inference else 2)
    engine(x, t, cond.view(2, COLS))
    assert _conditioned(driver) == (6 if inference else 2)
    engine(x, t, cond.clone())
    assert _conditioned(driver) == (7 if inference else 3)
    turned = cond.reshape(COLS, 2).T  # the same address, size and version, another tensor
    engine(x, t, cond), engine(x, t, turned)
    assert torch.equal(engine(x, t, turned), expected(x, t, turned))
    engine(x, t, cond)
    with torch.inference_mode():  # writes to ordinary tensors are counted there too
        if not inference:
            cond.add_(1)
    assert torch.equal(engine(x, t, cond), expected(x, t, cond))


def test_a_failed_call_forgets_its_conditions(engine, driver):
    x, t, cond = inputs(2)
    engine(x, t, cond)
    driver.broken = True
    with pytest.raises(TargetError):
        engine(x, t, cond + 1)
    driver.broken = False
    assert torch.equal(engine(x, t, cond), expected(x, t, cond)) and _conditioned(driver) == 2


def test_the_first_call_may_be_in_inference_mode(engine):
    first, second = inputs(2, 1), inputs(2, 2)
    with torch.inference_mode():
        assert torch.equal(engine(*first), expected(*first))
    assert torch.equal(engine(*second), expected(*second))
    x, t, cond = second
    result = engine(x.requires_grad_(), t, cond)
    assert not result.requires_grad


@pytest.mark.parametrize("t", [[10.0, 10.0, 10.0], [90.0, 0.0, 25.0], [0.0, 3.5, 90.0], [7.0, 7.0, 7.0]], ids=str)
def test_timesteps_may_be_known_unknown_equal_or_not(engine, t):
    for values in (inputs(3, t=t), inputs(3), inputs(3, t=t)):
        assert torch.equal(engine(*values), expected(*values))


def test_integer_timesteps_are_converted(engine):
    x, _, cond = inputs(2)
    assert torch.equal(engine(x, torch.tensor([25, 10]), cond), expected(x, torch.tensor([25.0, 10.0]), cond))


def test_a_timestep_outside_a_complete_table_is_refused(bundle, driver):
    engine = engine_of(bundle, driver, make_program(path=False))
    with pytest.raises(InputError, match=r"timestep: got \[3.0, 3.0\]"):
        engine(*inputs(2, t=[3.0, 3.0]))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_rows_of_all_tables_are_written_side_by_side(batch):
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (4,), "unused": (5,), "b": (2, 3, 1), "c": (7,)}
    time = TimeTables(KEYS, {name: torch.rand(4, *shape, generator=generator) for name, shape in shapes.items()})
    columns = {"c": (0, (7,)), "a": (7, (4,)), "b": (11, (2, 3, 1))}
    rows, out = TimeRows(time, columns, torch.device("cpu")), torch.full((batch, 17), float("nan"))
    draw = KEYS[torch.randint(0, 4, (batch,), generator=generator)]
    for t in (draw, KEYS[2].repeat(batch), torch.full((batch,), 12.0), draw.flip(0)):
        rows.write(t, out)
        wanted = time.lookup(t)
        assert torch.equal(out, torch.cat([wanted[n].reshape(batch, -1) for n in ("c", "a", "b")], dim=1))


@pytest.mark.parametrize("columns", [{"emb": (0, (COLS + 1,))}, {"other": (0, (COLS,))}])
def test_tables_that_are_not_the_programs_are_refused(columns):
    with pytest.raises(ArtifactError, match="the plan wants time table"):
        TimeRows(TimeTables(KEYS, dict(TABLES)), columns, torch.device("cpu"))


def test_a_program_without_time_tables_gets_its_timesteps(bundle, driver):
    program = replace(make_program({}), time=None)
    plan = make_plan(2)
    launches = list(plan.launches)
    launches[0] = replace(launches[0], operands={**launches[0].operands, "x": operand("input", "t", 2, strides=(1, 0))})
    table = {"x": plan.inputs["x"], "cond": plan.inputs["cond"], "t": ((2,), torch.float32)}
    table[TIME_TABLES] = plan.inputs[TIME_TABLES]
    plan = replace(plan, launches=tuple(launches), inputs=table, conditioning=0, tables={})
    other = make_bundle(plan)
    x, t, cond = inputs(2)
    result = engine_of(other, FakeDriver(other), program)(x, t, cond)
    assert torch.equal(result, 2 * x + t[:, None] + 70_001 + BIAS)  # nothing fills the tables: zero


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "sm_89",
            r"sm_89, but the file has code for sm_90; .*: edadm-compile target FILE --targets sm_89,sm_90 -o FILE$",
        ),
        ("sm_103", r"this GPU is sm_103, which cannot be compiled for \(possible: sm_80, .*\); .* code for sm_90$"),
    ],
)
def test_a_gpu_without_code_is_refused_with_the_command(bundle, driver, arch, message):
    with pytest.raises(TargetError, match=message):
        CudaEngine(make_program(), bundle, "cpu", arch=arch, driver=driver)
    with pytest.raises(TargetError, match=r"the file has no GPU code; add its code with: .*--targets sm_90 "):
        CudaEngine(make_program(), make_bundle(), "cpu", arch="sm_90", driver=driver)


@pytest.mark.parametrize("change", ["count", "lengths", "empty"])
def test_wrong_inputs_are_refused(engine, change):
    x, t, cond = inputs(2)
    wrong = {"count": (x, t), "lengths": (x, t, cond[:1]), "empty": (x[:0], t[:0], cond[:0])}[change]
    with pytest.raises(InputError, match="expected x, t, cond, each"):
        engine(*wrong)


@pytest.mark.parametrize(
    "params", [("u64",) * 2, ("u64", "u64", "u64", "u32"), ("u64",) * 7, ("u64", "u64", "u32", "u32", "b8", "u64")]
)
def test_a_kernel_with_other_parameters_is_refused(bundle, driver, params):
    key = "condition/2"
    wrong = replace(bundle, cubins={**bundle.cubins, key: replace(bundle.cubins[key], params=params)})
    with pytest.raises(ArtifactError, match=r"condition: kernel condition/2 takes .*recompile"):
        engine_of(wrong, driver)(*inputs(2))


def test_misplaced_memory_is_refused(driver):
    """The kernel was compiled for aligned pointers: a buffer elsewhere must not reach it."""
    plan = make_plan(2)
    buffers = (replace(plan.buffers[0], offset=4), *plan.buffers[1:])
    wrong = make_bundle(replace(plan, buffers=buffers))
    with pytest.raises(ArtifactError, match=r"condition: out lies at .* not at a multiple of 16"):
        engine_of(wrong, FakeDriver(wrong))(*inputs(2))


def test_batches_share_constants(engine, monkeypatch):
    from edadm_compile.kernels import constants

    made = []
    real = constants.make
    monkeypatch.setattr(constants, "make", lambda *a: made.append(1) or real(*a))
    engine(*inputs(2))
    engine(*inputs(4))
    assert len(made) == 1


def test_a_compiled_unet_equals_the_reference_engine_bit_for_bit(artifact):
    """Every launch of a real plan, its operands reached through the packed pointers alone."""
    program = artifact.lowered
    plans = [plan_program(program, Target("sm_90", batch, torch.float32, exact=True)) for batch in (1, 4)]
    bundle = make_bundle(*plans)
    engine = CudaEngine(program, bundle, "cpu", arch="sm_90", driver=FakeDriver(bundle))
    for batch, seed in ((1, 0), (3, 1), (4, 2), (6, 3)):
        values = inputs_of(program, batch, seed)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(engine(*values), program(*values))


def _api(**functions):
    """A stand-in for cuda.bindings.driver."""
    result = SimpleNamespace(CUDA_SUCCESS=0)
    base = {
        "CUresult": result, "cuInit": lambda flags: (0,), "cuCtxGetCurrent": lambda: (0, 77),
        "cuGetErrorString": lambda status: (0, b"out of order"),
        "CUfunction_attribute": SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8),
    }  # fmt: skip
    for name, function in functions.items():
        function.__name__ = name
    return SimpleNamespace(**base, **functions)


def test_the_driver_loads_once_and_asks_for_shared_memory(monkeypatch):
    calls = []

    def record(name, result=None):
        return lambda *a: calls.append((name, *a)) or ((0,) if result is None else (0, result))

    api = _api(
        cuModuleLoadData=record("load", "module"),
        cuModuleGetFunction=record("get", "function"),
        cuFuncSetAttribute=record("set"),
        cuLaunchKernel=record("launch"),
    )
    monkeypatch.setattr(cuda_driver.importlib, "import_module", lambda name: api)
    driver = CudaDriver()
    small, big = (Cubin("k", bytes(n), n, 4, 32, 0, ()) for n in (48 << 10, 50_000))
    assert driver.load(small) == driver.load(small) == driver.load(big) == "function"
    assert [c for c in calls if c[0] != "get"] == [
        ("load", small.data),
        ("load", big.data),
        ("set", "function", 8, 50_000),
    ]
    arguments = Arguments([1, -2], ["u64", "u32"])
    driver.launch("function", (1, 2, 3), 128, 64, 99, arguments)
    assert calls[-1] == ("launch", "function", 1, 2, 3, 128, 1, 1, 64, 99, arguments.address, 0)


def test_a_launch_that_may_start_early_says_so_to_the_driver(monkeypatch):
    calls = []
    api = _api(cuLaunchKernelEx=lambda *a: calls.append(a) or (0,))
    api.CUlaunchConfig, api.CUstream = SimpleNamespace, lambda handle: ("stream", handle)
    api.CUlaunchAttribute = lambda: SimpleNamespace(value=SimpleNamespace())
    api.CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="early")
    monkeypatch.setattr(cuda_driver.importlib, "import_module", lambda name: api)
    arguments = Arguments([1], ["u64"])
    CudaDriver().launch("function", (1, 2, 3), 128, 64, 99, arguments, True)
    ((config, function, address, extra),) = calls
    assert (function, address, extra) == ("function", arguments.address, 0)
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (1, 2, 3)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (128, 1, 1)
    assert (config.sharedMemBytes, config.hStream, config.numAttrs) == (64, ("stream", 99), 1)
    assert [(a.id, a.value.programmaticStreamSerializationAllowed) for a in config.attrs] == [("early", 1)]


def test_only_a_kernel_behind_a_kernel_starts_early():
    """Both wait by themselves; the first of the conditioning and of the step follow copies, "" is torch."""
    cubins = {name: Cubin(name, b"\x7fELF", 0, 4, 32, 0, (), name != "old") for name in ("a", "b", "old")}
    keys = ("a", "b", "a", "", "a", "b", "old", "a", "b")
    found = may_start_early(keys, cubins, 2)
    assert found == [False, True, False, False, False, True, False, False, True]
    assert not any(may_start_early(("old", "old"), cubins, 0))


def test_driver_errors_name_the_call(monkeypatch):
    api = _api(cuModuleLoadData=lambda data: (209, None))
    monkeypatch.setattr(cuda_driver.importlib, "import_module", lambda name: api)
    with pytest.raises(TargetError, match=r"cuModuleLoadData failed: out of order \(209\)"):
        CudaDriver().load(Cubin("k", b"", 0, 4, 32, 0, ()))


def test_a_missing_package_or_driver_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(cuda_driver.importlib, "import_module", missing)
    with pytest.raises(TargetError, match=r"pip install 'edadm-compile\[cuda\]'"):
        CudaDriver()

    def no_library(flags):
        raise RuntimeError("libcuda.so.1 not found")

    api = SimpleNamespace(**{**vars(_api()), "cuInit": no_library})
    monkeypatch.setattr(cuda_driver.importlib, "import_module", lambda name: api)
    with pytest.raises(TargetError, match="needs NVIDIA's driver: libcuda"):
        CudaDriver()


def test_importing_the_engine_loads_no_compiler():
    code = "import sys, edadm_compile.runtime.engines.cuda; print('triton' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
