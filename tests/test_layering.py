"""Who may import whom (docs/architecture.md): a module imports its own row and rows above it only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "edadm_compile"
RANK = {
    "errors": 0, "quant": 1, "config": 2, "ir": 2, "kernels": 3, "calibration": 3, "lowering": 4, "passes": 4, "runtime": 4, "evaluate": 4,
    "report": 5, "frontend": 5, "pipeline": 6, "driver": 7, "cli": 8, "__main__": 9,
}  # fmt: skip
#: Third-party packages that only some parts may use; everything may use torch.
ALLOWED = {
    "diffusers": {"calibration", "frontend"}, "sklearn": {"calibration", "frontend"}, "safetensors": {"runtime", "frontend", "driver"},
    "click": {"cli"}, "rich": {"report", "driver", "cli"}, "PIL": {"driver", "report"}, "numpy": {"calibration", "evaluate", "report"},
    "torch": set(RANK) - {"errors", "config", "cli"},
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
            assert package in __import__("sys").stdlib_module_names, f"{path}: unknown dependency {package}"


def test_every_part_has_a_place():
    assert {_part(p) for p in FILES} <= set(RANK)
