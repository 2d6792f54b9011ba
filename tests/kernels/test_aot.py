import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edadm_compile.errors import ArtifactError, InputError, TargetError
from edadm_compile.kernels import aot, aot_process, request, targets
from edadm_compile.kernels.aot_cache import Cache, default_cache
from edadm_compile.kernels.census import census
from edadm_compile.kernels.cubin import Bundle, Cubin
from edadm_compile.kernels.launch import Launch, LaunchPlan, Operand, Tile
from tests.kernels import double

ROOT = Path(__file__).parents[2]


def operand(space, key, dtype, *shape, offset=0):
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return Operand(space, key, dtype, shape, tuple(strides), offset)


def rows(batch=2, shift=16, offset=0, **constants):
    operands = {
        "x": operand("input", "x", torch.int8, batch, 48),
        "out": operand("arena", 0, torch.float32, batch, 48, offset=offset),
    }
    scalars = {"rows": batch, "shift": shift}
    return Launch("rows", "first+norm", operands, {"COLS": 48, **constants}, scalars, Tile({"BLOCK": 64}, 4, 2))


def product(size=128, stages=3):
    operands = {
        "a": operand("arena", 0, torch.int8, 512, 512),
        "b": operand("constant", "w", torch.int8, 512, 512),
        "out": operand("arena", 1, torch.int32, 512, 512),
    }
    tile = Tile({"BLOCK_M": 64, "BLOCK_N": size, "BLOCK_K": size}, 4, stages)
    return Launch("product", "mid", operands, {"M": 512, "N": 512, "K": 512}, {}, tile)


def library():
    return Launch("torch", "resize", {"out": operand("arena", 0, torch.float32, 2, 48)})


def plan(*launches, arch="sm_90", batch=2):
    return LaunchPlan(arch, batch, torch.float16, launches, (), 0, {}, 0, {}, (1,))


def broken(name):
    return replace(double.ROWS, entry=f"tests.kernels.double_triton:{name}")


@pytest.fixture(autouse=True)
def doubles(monkeypatch):
    double.install(monkeypatch)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture
def no_compiler(monkeypatch):
    """Fails if a process would be started."""
    monkeypatch.setattr(aot, "Worker", lambda *_: pytest.fail("something was compiled"))


def test_every_kernel_is_compiled_once(cache):
    """Two batches share what does not depend on the batch; a scalar that is a multiple of 16 is another kernel."""
    plans = [plan(rows(batch), library(), product(), batch=batch) for batch in (1, 2, 16)]
    said = []
    cubins = aot.compile_plans(plans, jobs=2, cache=cache, progress=lambda n, what: said.append((n, what)))
    keys = [aot.plan_keys(p) for p in plans]
    assert keys[0] == keys[1] != keys[2] and keys[0][1] == "" and keys[0][2] == keys[2][2]
    assert set(cubins) == {keys[0][0], keys[0][2], keys[2][0]} and len(cubins) == 3
    assert sorted(said) == [(1, "product sm_90"), (1, "rows sm_90"), (1, "rows sm_90")]
    first, second = cubins[keys[0][0]], cubins[keys[0][2]]
    assert first.params == ("u64", "u64", "u32", "u32", "u64", "u64") and first.name == "rows_kernel"  # no bias
    assert second.params == ("u64",) * 5 and second.num_warps == 4 and second.shared > 0
    for cubin in (first, second):
        assert cubin.data.startswith(b"\x7fELF") and 0 < cubin.registers <= 255 and cubin.spills == 0


def test_code_is_for_the_architecture_asked_for(cache):
    plans = [plan(product(64), arch=arch) for arch in targets.TARGETS]
    cubins = aot.compile_plans(plans, jobs=2, cache=cache)
    assert len(cubins) == 6
    for arch, cubin in zip(targets.TARGETS, cubins.values(), strict=True):
        found = census(cubin.data, cubin.shared)
        assert found.integer_mma > 0 and found.registers == cubin.registers
        flags = int.from_bytes(cubin.data[48:52], "little")  # e_flags of the ELF header
        assert targets.capability(arch) in (flags & 0xFF, flags >> 8 & 0xFF)


def test_the_same_request_gives_the_same_bytes_anywhere(cache, tmp_path):
    """No paths of the machine, no time: two compilations in different processes and folders agree."""
    plans = [plan(rows(), product())]
    assert aot.compile_plans(plans, jobs=2, cache=cache) == aot.compile_plans(plans, jobs=1, cache=tmp_path)
    for cubin in aot.compile_plans(plans, cache=cache).values():
        assert str(ROOT).encode() not in cubin.data and b"double_triton" not in cubin.data


def test_exact_kernels_round_twice(cache):
    """With EXACT a product and a sum must not become one fused instruction, as the reference rounds both."""
    fused, exact = (plan(rows(GAIN=0.3, EXACT=flag)) for flag in (False, True))
    cubins = aot.compile_plans([fused, exact], cache=cache)
    counts = [census(cubins[aot.plan_keys(p)[0]].data).opcodes for p in (fused, exact)]
    assert any(name.startswith("FFMA") for name in counts[0])
    assert not any(name.startswith("FFMA") for name in counts[1]) and any(n.startswith("FMUL") for n in counts[1])


def test_gluon_kernels_are_compiled_too(monkeypatch, cache):
    monkeypatch.setitem(double.DOUBLES, "rows", replace(double.ROWS, entry="tests.kernels.double_gluon:rows_kernel"))
    (cubin,) = aot.compile_plans([plan(rows())], cache=cache).values()
    assert cubin.params == ("u64", "u64", "u32", "u32", "u64", "u64") and cubin.num_warps == 4


def test_finished_kernels_are_not_compiled_again(cache, no_compiler):
    said = []
    cubins = aot.compile_plans([plan(rows(), product())], cache=cache, progress=lambda n, what: said.append(what))
    assert len(cubins) == 2 and said == ["rows sm_90", "product sm_90"]


@pytest.mark.parametrize("damage", ["cubin", "json", "missing", "foreign", "list"])
def test_a_damaged_entry_is_compiled_again(cache, tmp_path, damage):
    plans = [plan(rows())]
    (key, good) = next(iter(aot.compile_plans(plans, cache=cache).items()))
    store = Cache(tmp_path)
    store.put(key, good)
    assert store.get(key) == good
    record, code = tmp_path / f"{key}.json", tmp_path / f"{key}.cubin"
    if damage == "cubin":
        data = bytearray(code.read_bytes())
        data[1000] ^= 1
        code.write_bytes(data)
    elif damage == "json":
        record.write_text(record.read_text()[:-9])
    elif damage == "missing":
        code.unlink()
    else:
        record.write_text(json.dumps({"sha256": 3} if damage == "foreign" else []))
    assert store.get(key) is None
    assert aot.compile_plans(plans, cache=tmp_path) == {key: good} and store.get(key) == good
    assert len(list(tmp_path.iterdir())) == 2  # no temporary files


def test_the_cache_lies_where_the_desktop_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "edadm-compile" / "cubins"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "edadm-compile" / "cubins"


def test_a_cache_that_cannot_be_written_costs_only_time(cache, tmp_path):
    (key, good) = next(iter(aot.compile_plans([plan(rows())], cache=cache).items()))
    (tmp_path / "file").write_text("")
    Cache(tmp_path / "file" / "below").put(key, good)
    assert Cache(tmp_path / "file" / "below").get(key) is None


def test_keys_tell_requests_apart():
    base = rows()
    variants = [
        base, rows(shift=17), rows(offset=1), rows(EXACT=True), rows(GAIN=1), rows(GAIN=2.0), rows(BIAS_STRIDE=1),
        replace(base, tile=Tile({"BLOCK": 32}, 4, 2)), replace(base, tile=Tile({"BLOCK": 64}, 8, 2)),
        replace(base, tile=Tile({"BLOCK": 64}, 4, 3)),
        replace(base, operands={**base.operands, "bias": operand("constant", "b", torch.float32, 48)}),
        replace(base, operands={**base.operands, "x": operand("input", "x", torch.float16, 2, 48)}),
    ]  # fmt: skip
    keys = [aot.plan_keys(plan(launch))[0] for launch in variants]
    assert len(set(keys)) == len(keys)
    assert aot.plan_keys(plan(base, arch="sm_80")) != aot.plan_keys(plan(base))
    assert aot.plan_keys(plan(rows(offset=4)))[0] == keys[0] and aot.plan_keys(plan(rows(batch=7)))[0] == keys[0]


def test_keys_depend_on_the_sources_and_on_triton(monkeypatch):
    key = aot.plan_keys(plan(rows()))
    for name in ("sources_digest", "triton_version"):
        with monkeypatch.context() as patch:
            patch.setattr(request, name, lambda *_: "other")
            assert aot.plan_keys(plan(rows())) != key
    request.sources_digest.cache_clear()
    assert request.sources_digest("tests.kernels.double_triton") != request.sources_digest("tests.kernels.double")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("broken_kernel", "arange's range must be a power of 2"),
        ("other_arguments_kernel", "its registry entry gives"),
        ("no_such_kernel", "has no attribute 'no_such_kernel'"),
    ],
)
def test_a_kernel_that_does_not_compile_is_named(monkeypatch, tmp_path, entry, reason):
    monkeypatch.setitem(double.DOUBLES, "rows", broken(entry))
    with pytest.raises(TargetError) as error:
        aot.compile_plans([plan(rows())], cache=tmp_path)
    text = str(error.value)
    assert text.startswith("cannot compile rows for sm_90 (layer first+norm; BLOCK=64, 4 warps, 2 stages): ")
    assert reason in text and "\n" not in text


def test_a_compiler_that_crashes_is_reported(monkeypatch, tmp_path):
    (tmp_path / "crashes_on_import.py").write_text("import os\nprint('last words')\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(double.DOUBLES, "rows", replace(double.ROWS, entry="crashes_on_import:kernel"))
    with pytest.raises(TargetError, match=r"layer first.norm.* the compiler ended with signal 6; "):
        aot.compile_plans([plan(rows())], cache=tmp_path)


def test_what_finished_before_a_failure_is_kept(monkeypatch, tmp_path, cache):
    good = aot.compile_plans([plan(product())], cache=cache)
    bad = replace(rows(), kernel="bad")
    monkeypatch.setitem(double.DOUBLES, "bad", broken("broken_kernel"))
    with pytest.raises(TargetError):
        aot.compile_plans([plan(product(), bad)], jobs=1, cache=tmp_path)
    assert Cache(tmp_path).get(next(iter(good))) == next(iter(good.values()))


def test_too_much_shared_memory_is_refused(cache):
    big = plan(product(128, stages=6), arch="sm_89")
    for _ in range(2):  # compiled, then from the cache
        with pytest.raises(TargetError, match=r"cannot run product for sm_89 .*shared memory, allowed 101376"):
            aot.compile_plans([big], cache=cache)


@pytest.mark.parametrize(
    ("launch", "arch", "message"),
    [
        (rows(), "sm_75", "got architecture 'sm_75', allowed sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"),
        (rows(), "", "got architecture ''"),
        (rows(batch=0), "sm_90", r"first\+norm: rows needs a grid of \(0, 1, 1\)"),
        (rows(COLS=64 * 65536), "sm_90", r"needs a grid of \(2, 65536, 1\)"),
        (
            replace(rows(), operands={"x": operand("input", "x", torch.complex64, 2), "out": rows().operands["out"]}),
            "sm_90",
            "cannot take x of torch.complex64",
        ),
    ],
)
def test_what_no_gpu_takes_is_refused_before_compiling(launch, arch, message, no_compiler):
    with pytest.raises(TargetError, match=message):
        aot.compile_plans([plan(launch, arch=arch)])


def test_missing_triton_says_what_to_install(monkeypatch, no_compiler):
    request.triton_folder.cache_clear()
    request.triton_version.cache_clear()
    find = request.importlib.util.find_spec
    monkeypatch.setattr(request.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(TargetError, match=r"pip install 'triton>=3.6'"):
        aot.compile_plans([plan(rows())])
    assert aot.compile_plans([plan(library())]) == {}  # nothing to compile


def test_compilers_start_clean(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    monkeypatch.setenv("KEPT", "1")
    found = aot_process.environment(tmp_path)
    assert "TRITON_INTERPRET" not in found and "DISABLE_LLVM_OPT" not in found and found["KEPT"] == "1"
    assert str(ROOT) in found["PYTHONPATH"].split(os.pathsep)
    code = "import sys, edadm_compile.kernels.aot_worker as w; print('torch' in sys.modules, 'triton' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], env=found, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


INTERRUPTED = """
import sys, torch
from pathlib import Path
from edadm_compile.kernels import aot, request
from tests.kernels import double
from tests.kernels.test_aot import plan, product
request.kernel = lambda name: double.DOUBLES[name]
plans = [plan(product(size, stages)) for size in (32, 64, 128) for stages in range(1, 9)]
aot.compile_plans(plans, jobs=2, cache=Path(sys.argv[1]), progress=lambda n, what: print("done", flush=True))
"""


def _workers(scratch):
    """Processes that work below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={scratch}".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_compilation_leaves_nothing_behind(tmp_path, how):
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as main:
        assert main.stdout.readline() == "done\n"
        assert len(_workers(scratch)) >= 3  # itself and two compilers
        main.send_signal(how)
        _, said = main.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while _workers(scratch) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _workers(scratch) == []
    kept = list((tmp_path / "cache").glob("[!.]*.json"))
    assert 1 <= len(kept) <= 24 and all(  # all of them where the signal came late
        Cache(tmp_path / "cache").get(path.stem) for path in kept
    )
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in said and list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", targets.TARGETS),
        ("none", ()),
        ("sm_90", ("sm_90",)),
        ("sm_120, sm_80,sm_80", ("sm_80", "sm_120")),
    ],
)
def test_targets_are_named(text, expected):
    assert aot.parse_targets(text) == expected


@pytest.mark.parametrize("text", ["", "sm_75", "90", "sm_90,", "all,sm_90", "SM_90"])
def test_other_targets_are_refused(text):
    with pytest.raises(InputError, match="allowed sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, or all, or none"):
        aot.parse_targets(text)


@pytest.mark.parametrize(
    ("present", "expected"),
    [((9, 0), ("sm_90",)), ((12, 0), ("sm_120",)), ((7, 5), targets.DEFAULT_TARGETS), (None, targets.DEFAULT_TARGETS)],
)
def test_the_gpu_present_is_the_default_target(monkeypatch, present, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: present)
    assert aot.parse_targets(None) == expected


GOOD = Cubin("k", b"\x7fELF", 0, 4, 32, 0, ("u64",))


def test_kernels_survive_json():
    assert Cubin.from_json(json.loads(json.dumps(GOOD.to_json())), GOOD.data) == GOOD


@pytest.mark.parametrize(
    "change", [{"name": 3}, {"shared": -1}, {"shared": True}, {"registers": 1.0}, {"params": "u64"}, {"params": [1]}, {"more": 1}, {"overlaps": 1}]
)  # fmt: skip
def test_malformed_kernels_are_refused(change):
    with pytest.raises(ArtifactError, match="malformed"):
        Cubin.from_json({**GOOD.to_json(), **change}, GOOD.data)
    with pytest.raises(ArtifactError, match="not machine code"):
        Cubin.from_json(GOOD.to_json(), b"MZ")


def test_a_bundle_holds_what_its_plans_launch(cache):
    plans = [plan(rows(batch), library(), batch=batch) for batch in (4, 2)] + [plan(rows(), arch="sm_80")]
    bundle = aot.compile_bundle(plans, cache=cache)
    assert bundle.archs == ("sm_80", "sm_90") and bundle.batches("sm_90") == (2, 4) and bundle.batches("sm_89") == ()
    name = ("sm_90", 2)
    key = bundle.keys[name][0]
    assert bundle.keys[name][1] == "" and key in bundle.cubins
    for keys in ({}, {name: (key,)}, {name: (key, key)}, {name: ("", "")}, {name: ("absent", "")}):
        with pytest.raises(ArtifactError):
            Bundle({name: bundle.plans[name]}, keys, bundle.cubins)
    with pytest.raises(ArtifactError):
        Bundle({("sm_80", 2): bundle.plans[name]}, {("sm_80", 2): (key, "")}, bundle.cubins)
