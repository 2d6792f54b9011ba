"""Every model family at reduced width, the whole way on the CPU: compile, verify, export to ONNX Runtime, sample.

    python benchmarks/families/twins.py [FAMILY ...] [--preset w4a8] [--iters N] [--calib-samples N] [--steps N]

writes benchmarks/results/cpu-2core/twins.json. Families that are not named keep the results they have there. Weights are
random, so SQNR says that the integer program follows the float one, not how well a trained model of the family quantizes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

if __name__ == "__main__":  # run as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.families.architectures import ARCHITECTURES, Architecture, build, twin
from edadm_compile.config import PRESETS
from edadm_compile.driver import compile as compiling
from edadm_compile.driver import export, sample, verify
from edadm_compile.driver.machine import Cpu, describe_machine
from edadm_compile.errors import EdadmError
from edadm_compile.passes.base import Silent

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cpu-2core" / "twins.json"
#: Rows of each condition.
_ROWS = 16
#: Trajectories that `verify` and `sample` take.
_TRAJECTORIES = 2


def write_model(architecture: Architecture, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write a twin as a user would have it.

    Returns:
        path, and the options that go with it on the command line.
    """
    model: Any = build(architecture)
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = folder / "scheduler_config.json"
    scheduler.write_text(json.dumps(dict(architecture.scheduler)))
    options: dict[str, Any] = {}
    if architecture.conditions:
        options["conditions"] = folder / "conditions.safetensors"
        save_file(conditions(architecture), options["conditions"])
    if architecture.heads is not None:
        path = folder / "model.pt"
        torch.save(model.state_dict(), path)
        return path, {**options, "factory": "benchmarks.families.architectures:churches_twin"}
    model.save_pretrained(folder)
    return folder, options


def conditions(architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of every float condition; SDXL's sizes are those of an image eight times the latent."""
    generator = torch.Generator().manual_seed(seed)
    rows = {n: torch.randn((_ROWS, *shape), generator=generator) for n, shape in architecture.conditions.items()}
    if "time_ids" in rows:
        side = 8.0 * architecture.config["sample_size"]
        rows["time_ids"] = torch.tensor([side, side, 0, 0, side, side]).repeat(_ROWS, 1)
    return rows


def run(architecture: Architecture, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Take one twin the whole way.

    Args:
        settings: preset, iters, calib_samples and steps.

    Raises:
        EdadmError: of the first step that fails; a broken contract is one.
    """
    path, options = write_model(architecture, folder / "model")
    options["steps"] = settings["steps"]
    artifact = folder / "twin.qmod"
    request = compiling.Request(path, artifact, "cpu", None, None, {**options, **settings}, targets="none")
    seconds: dict[str, float] = {}
    compiled = _timed("compile", seconds, lambda: compiling.run(request, Silent()))
    checked = _timed("verify", seconds, lambda: verify.run(artifact, path, count=_TRAJECTORIES, seed=1, **options))
    verify.check(checked)
    graph = folder / "twin.onnx"
    exported = _timed("export", seconds, lambda: export.run(artifact, graph, reference=path, **options))
    drawn = _timed(
        "sample",
        seconds,
        lambda: sample.run(artifact, _TRAJECTORIES, folder / "grid.png", path, None, 0, **options),
    )
    check = exported["check"]
    return {
        "parameters": compiled["model"]["parameters"],
        "shape": list(architecture.shape),
        "blocks": compiled["blocks"],
        "layers": compiled["layers"],
        "float_layers": sorted(compiled["float_layers"]),
        "average_weight_bits": compiled["average_weight_bits"],
        "bytes": compiled["bytes"],
        "verify": {
            "integer_layers": len(checked["layers"]),
            "accumulators": sum(r["accumulators"] for r in checked["layers"]),
            "broken": checked["broken"],
            "sqnr_db": checked["end_to_end"],
        },
        "onnx": {
            "integer": {k: c["integer"] for k, c in check["counts"].items()},
            "float": {k: c["float"] for k, c in check["counts"].items()},
            "broken": check["broken"],
            "end_to_end": check["end_to_end"],
        },
        "sample": {"steps": drawn["steps"], "scheduler": drawn["scheduler"], "engine": drawn["engine"],
                   "psnr_db": drawn["psnr_db"]["median"]},
        "cpu_seconds": {k: round(v, 1) for k, v in seconds.items()},
    }  # fmt: skip


def _timed(name: str, seconds: dict[str, float], action: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = action()
    seconds[name] = time.process_time() - start
    return result


def _rounded(value: Any) -> Any:
    """Floats with three decimals."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def measure(names: Sequence[str], settings: dict[str, Any], output: Path) -> int:
    """Run families and write the result file after each; returns how many failed."""
    known = json.loads(output.read_text()) if output.exists() else {}
    rows = dict(known.get("rows", {}))
    failed = 0
    machine = describe_machine(Cpu())
    made = {"commit": machine.pop("commit"), "settings": settings}
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            try:
                rows[name] = {**made, **_rounded(run(twin(ARCHITECTURES[name]), Path(place), settings))}
            except EdadmError as error:
                traceback.print_exc()
                rows[name] = {**made, "failed": f"{type(error).__name__}: {error}"}
                failed += 1
        print(name, json.dumps(rows[name]), flush=True)
        ordered = {key: rows[key] for key in ARCHITECTURES if key in rows}
        record = {"machine": machine, "made_by": "benchmarks/families/twins.py", "rows": ordered}
        output.write_text(json.dumps(record, indent=2) + "\n")
    return failed


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *ARCHITECTURES], metavar="FAMILY")
    parser.add_argument("--preset", choices=PRESETS, default="w4a8")
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--calib-samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    given = vars(parser.parse_args())
    names, output = given.pop("families"), given.pop("output")
    sys.exit(1 if measure(names or list(ARCHITECTURES), given, output) else 0)


if __name__ == "__main__":
    main()
