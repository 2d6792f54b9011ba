"""What works on this machine, found by trying, and what to install for the rest. Needs no package to be installed."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import edadm_compile
from edadm_compile.errors import EdadmError, TargetError
from edadm_compile.report.versions import version_of

#: Smallest versions by distribution, as in pyproject.toml: those of every verb, and those of an extra.
BASICS = {
    "torch": "2.11", "numpy": "1.26", "scipy": "1.11", "safetensors": "0.5", "diffusers": "0.35", "click": "8.1",
    "rich": "13.7", "pillow": "10", "pyyaml": "6",
}  # fmt: skip
EXTRAS = {
    "triton": ("3.6", "pip install 'triton>=3.6'"),
    "onnx": ("1.19", "pip install 'edadm-compile[onnx]'"),
    "onnx-ir": ("0.1.15", "pip install 'edadm-compile[onnx]'"),
    "onnxruntime": ("1.23", "pip install 'edadm-compile[onnx]'"),
    "cuda-bindings": ("12.8", "pip install 'edadm-compile[cuda]'"),
}
#: Processor flags that make 8-bit products fast, as Linux names them.
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
#: Less free space than this is worth a remark, bytes: a large model with its calibration set needs it.
_SPACE = 2 << 30


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: "works"; "missing" or "fails" (a basic, or something an extra would bring); "note" for facts.
        found: version, result or reason.
        basic: without it no verb works.
        remedy: command or advice; "" where nothing is to be done.
    """

    name: str
    state: str
    found: str
    basic: bool = False
    remedy: str = ""


def run() -> dict[str, Any]:
    """Look at everything.

    Returns:
        ``checks`` (one row each: name, state, found, basic, remedy), ``works`` (no basic one is missing or fails),
        ``package`` (the folder this code was imported from).
    """
    checks = [*_packages(), _attempt("torch computes", _torch, basic=True),
              _attempt("reference engine", _reference, basic=True), _attempt("ONNX Runtime engine", _onnxruntime),
              _attempt("CUDA engine", _cuda), _attempt("Triton compiler", _triton), _processor(), *_space()]  # fmt: skip
    bad = [c for c in checks if c.basic and c.state in ("missing", "fails")]
    return {
        "checks": [asdict(c) for c in checks],
        "works": not bad,
        "package": str(Path(edadm_compile.__file__).parent),
    }


def check(result: dict[str, Any]) -> None:
    """Refuse a machine on which no verb works.

    Raises:
        TargetError: naming what is missing and the command that installs it.
    """
    bad = [c for c in result["checks"] if c["basic"] and c["state"] in ("missing", "fails")]
    if bad:
        cures = "; ".join(dict.fromkeys(c["remedy"] for c in bad if c["remedy"]))
        raise TargetError(
            f"doctor: {', '.join(c['name'] for c in bad)} missing or broken{f'; run: {cures}' if cures else ''}"
        )


def _packages() -> list[Check]:
    told = [Check("edadm-compile", "works", f"{edadm_compile.__version__}, Python {platform.python_version()}", True)]
    told += [_package(name, least, f"pip install '{name}>={least}'", True) for name, least in BASICS.items()]
    return told + [_package(name, least, remedy, False) for name, (least, remedy) in EXTRAS.items()]


def _package(name: str, least: str, remedy: str, basic: bool) -> Check:
    found = version_of(name)
    if found is None:
        return Check(name, "missing", f"not installed, needed is {least} or newer", basic, remedy)
    if _numbers(found) < _numbers(least):
        return Check(name, "fails", f"{found} is too old, needed is {least} or newer", basic, remedy)
    return Check(name, "works", found, basic)


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers: "2.13.0+cpu" is (2, 13, 0), "1.24rc1" is (1, 24)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for i, c in enumerate(part) if c.isdigit() and part[: i + 1].isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _attempt(name: str, attempt: Callable[[], tuple[str, str]], basic: bool = False) -> Check:
    """Run something small; whatever it raises is a finding."""
    try:
        found, remedy = attempt()
        return Check(name, "works", found, basic, remedy)
    except EdadmError as error:
        return Check(name, "missing", str(error), basic)
    except Exception as error:  # foreign code in an unknown state: that it fails is the answer
        return Check(name, "fails", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", basic)


def _torch() -> tuple[str, str]:
    torch = importlib.import_module("torch")
    value = int((torch.ones(8, 8) @ torch.ones(8, 8)).sum())
    if value != 512:
        raise ArithmeticError(f"a product of ones gives {value}, not 512")
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"{torch.get_num_threads()} threads, {cuda}", ""


def _reference() -> tuple[str, str]:
    torch = importlib.import_module("torch")
    importlib.import_module("edadm_compile.kernels.reference")
    scale, zero = torch.tensor([0.5]), torch.tensor([3.0])
    codes = torch.ops.edadm.quantize(torch.tensor([[-1.0, 0.0, 1.2, 90.0]]), scale, zero, 8, False)
    if codes.tolist() != [[1, 3, 5, 127]]:
        raise ArithmeticError(f"codes of -1, 0, 1.2, 90 are {codes.tolist()}, not 1, 3, 5, 127")
    return "integers as they are defined, slowly", ""


def _onnxruntime() -> tuple[str, str]:
    trial = importlib.import_module("edadm_compile.runtime.engines.trial")
    from edadm_compile.export.trial import ANSWER, CHANNELS, integer_convolution
    from edadm_compile.runtime.engines.onnxruntime import missing_packages

    missing = missing_packages()
    if missing:
        raise TargetError(f"{missing} not installed; run: pip install 'edadm-compile[onnx]'")
    found = trial.largest_products(integer_convolution(), CHANNELS)
    if found == ANSWER:
        return "an integer convolution of the largest codes is exact", ""
    return (
        f"integer products saturate (a sum of {ANSWER} comes out as {found}): this processor has no VNNI",
        "results of this engine differ from the reference engine; use --engine reference to check quality",
    )


def _cuda() -> tuple[str, str]:
    trial = importlib.import_module("edadm_compile.runtime.engines.trial")
    version, gpus = trial.find_gpus()
    if not gpus:
        raise TargetError("NVIDIA's driver finds no GPU")
    torch = importlib.import_module("torch")
    told = ", ".join(f"{g['name']} ({g['arch']}, {g['bytes'] / 2**30:.0f} GiB)" for g in gpus)
    if not torch.cuda.is_available():
        raise TargetError(f"{told}: torch does not see it; install a build of torch for CUDA {version} (pytorch.org)")
    return f"{told}, driver for CUDA {version}", ""


def _triton() -> tuple[str, str]:
    trial = importlib.import_module("edadm_compile.kernels.trial")
    cubin = trial.compile_one("sm_80")
    return f"a kernel for sm_80: {len(cubin.data)} bytes of machine code, {cubin.registers} registers", ""


def _processor() -> Check:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
    found = [name for name in FLAGS if name in flags]
    told = ", ".join(found) if found else "no flags for 8-bit products known"
    return Check("processor", "note", f"{os.cpu_count()} cores, {platform.machine()}: {told}")


def _space() -> list[Check]:
    """Free space where files go: the current folder, and the temporary one."""
    checks = []
    for name, folder in (("space here", Path.cwd()), ("temporary space", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        writable = "" if os.access(folder, os.W_OK) else ", not writable"
        remedy = f"free some space in {folder}" if free < _SPACE else ""
        checks.append(Check(name, "note", f"{free / 2**30:.1f} GiB free in {folder}{writable}", False, remedy))
    return checks
