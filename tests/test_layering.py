"""Who may import whom (docs/architecture.md): a module imports its own row and rows above it only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "edadm_compile"
RANK = {
    "errors": 0, "methods": 0, "notebook": 0, "callbacks": 1, "parallel": 1, "quant": 1, "texts": 1, "config": 2, "ir": 2, "kernels": 3, "calibration": 3, "export": 4, "lowering": 5, "passes": 5, "runtime": 5, "evaluate": 5,
    "report": 6, "frontend": 6, "pipeline": 7, "driver": 8, "cli": 9, "__main__": 10,
}  # fmt: skip
#: Third-party packages that only some parts may use; everything may use torch.
ALLOWED = {
    "diffusers": {"calibration", "frontend"}, "sklearn": {"calibration", "frontend"}, "safetensors": {"runtime", "frontend", "driver"},
    "click": {"cli"}, "jinja2": {"report"}, "markupsafe": {"report"}, "rich": {"report", "driver", "cli"}, "PIL": {"driver", "report"}, "numpy": {"calibration", "driver", "evaluate", "passes", "report", "runtime"}, "torchmetrics": {"evaluate"}, "torch_fidelity": {"evaluate"},
    "scipy": {"passes"}, "transformers": {"frontend"}, "yaml": {"frontend"},
    "triton": {"kernels"}, "cuda": {"runtime"}, "onnx": {"export"}, "onnx_ir": {"export", "runtime"}, "ml_dtypes": {"export"}, "onnxruntime": {"runtime"},
    "torch": set(RANK) - {"errors", "methods", "notebook", "callbacks", "config", "cli"},
}  # fmt: skip
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if node.module == "edadm_compile" else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_upwards_only(path):
    part = _part(path)
    for name in _imports(path):
        package, _, rest = name.partition(".")
        if package == "edadm_compile":
            other = rest.split(".")[0]
            if other in RANK:
                assert other == part or RANK[other] < RANK[part], f"{part} must not import {other}"
        elif package in ALLOWED:
            assert part in ALLOWED[package], f"{part} must not import {package}"
        else:
            assert package in sys.stdlib_module_names, f"{path}: unknown dependency {package}"


def test_every_part_has_a_place():
    assert {_part(p) for p in FILES} <= set(RANK)


def test_only_device_code_and_its_compiler_import_triton():
    users = {p.relative_to(ROOT) for p in FILES if any(name.split(".")[0] == "triton" for name in _imports(p))}
    assert users
    assert all(str(p).startswith(("kernels/triton/", "kernels/gluon/", "kernels/aot_worker")) for p in users), users


def test_a_runtime_needs_neither_triton_nor_a_compiler():
    """Everything that loads and runs a file imports in a process where Triton cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import edadm_compile.runtime.session, edadm_compile.runtime.engines.cuda\n"
        "from edadm_compile.kernels.registry import kernel, kernel_names\n"
        "[kernel(name) for name in kernel_names()]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
