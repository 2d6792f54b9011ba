"""The truth table: for every layer what was asked, what executes, why, and what it weighs."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from edadm_compile.errors import InputError
from edadm_compile.ir.analysis import constant_target
from edadm_compile.ir.program import LayerInfo, Program, get_constant, layer_of
from edadm_compile.kernels.cubin import Bundle, Cubin
from edadm_compile.kernels.launch import Launch, LaunchPlan


def truth_table(program: Program, requested: str) -> list[dict[str, Any]]:
    """One row per layer of a lowered program, in execution order, then the folded ones.

    Args:
        requested: width asked for, such as "w4a8".

    Returns:
        rows with layer, kind, shape, role, requested, executed, note, bytes (as stored, with scales) and fp16_bytes.
    """
    rows = [
        _row(program, node, info, requested) for node in program.graph_module.graph.nodes if (info := layer_of(node))
    ]
    if program.time is not None:
        for name in program.time.folded:
            note = "depends on the timestep alone: folded into a table, exact, never runs in the sampler"
            rows.append({"layer": name, "kind": "linear", "shape": [], "role": "time", "requested": requested,
                         "executed": "table", "note": note, "bytes": 0, "fp16_bytes": 0})  # fmt: skip
    return rows


def _row(program: Program, node: fx.Node, info: LayerInfo, requested: str) -> dict[str, Any]:
    integer = info.executed != "float"
    weighted = bool(info.weight_shape)
    return {
        "layer": info.name,
        "kind": info.kind,
        "shape": list(info.weight_shape),
        "role": info.role,
        "requested": requested if weighted else ("w8a8" if integer else "float"),
        "executed": info.executed,
        "note": info.note,
        "bytes": _stored(program, node, integer) if weighted else 0,
        "fp16_bytes": 2 * math.prod(info.weight_shape) if weighted else 0,
    }


def _stored(program: Program, node: fx.Node, integer: bool) -> int:
    """Bytes of a layer's weight in the file: packed codes and one float32 scale per channel, or the float weight."""
    target = constant_target(node.args[1])
    assert target is not None
    weight = get_constant(program.graph_module, target)
    channels = weight.shape[0] if integer else 0
    return weight.numel() * weight.element_size() + 4 * channels


def describe(bundle: Bundle | None) -> dict[str, Any] | None:
    """What GPU code there is, as plain values."""
    if bundle is None:
        return None
    plans = [
        {
            "arch": arch, "batch": batch, "launches": len(plan.launches),
            "library_launches": sum(launch.kernel == "torch" for launch in plan.launches),
            "once_per_prompt": plan.conditioning, "arena_bytes": plan.arena,
        }
        for (arch, batch), plan in sorted(bundle.plans.items())
    ]  # fmt: skip
    code = sum(len(cubin.data) for cubin in bundle.cubins.values())
    return {"targets": list(bundle.archs), "kernels": len(bundle.cubins), "code_bytes": code, "plans": plans}


def launch_table(bundle: Bundle, arch: str, batch: int) -> list[dict[str, Any]]:
    """One row per launch of a plan: what runs, with which tile, and why torch runs it where it does.

    Raises:
        InputError: no plan for this architecture and batch.
    """
    plan = bundle.plans.get((arch, batch))
    if plan is None:
        held = ", ".join(f"{a}:{b}" for a, b in sorted(bundle.plans))
        raise InputError(f"--launches: got {arch}:{batch}, the file has {held or 'no plan'}")
    return [
        _launch_row(plan, launch, bundle.cubins.get(key), i)
        for i, (launch, key) in enumerate(zip(plan.launches, bundle.keys[arch, batch], strict=True))
    ]


def _launch_row(plan: LaunchPlan, launch: Launch, cubin: Cubin | None, index: int) -> dict[str, Any]:
    sizes = dict(launch.tile.sizes)
    width = f"w{launch.constants['BITS']}a8" if "BITS" in launch.constants else ""
    if launch.constants.get("SEGMENTS") == 2:
        width += " x2"
    name = launch.kernel if launch.kernel != "torch" else launch.call[0]
    written = [launch.operands[r].dtype for r in launch.writes if r in ("out", "out_q", "out_q_lo")]
    return {
        "layer": launch.layer,
        "kernel": name,
        "codes": width,
        "tile": " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in sizes.items() if k != "SPLIT_K"),
        "split_k": sizes.get("SPLIT_K", 1),
        "warps": launch.tile.num_warps if cubin is not None else None,
        "stages": launch.tile.num_stages if cubin is not None else None,
        "registers": cubin.registers if cubin is not None else None,
        "shared": cubin.shared if cubin is not None else None,
        "writes": [str(d).removeprefix("torch.") for d in written],
        "when": "once per prompt" if index < plan.conditioning else "every step",
        "why_float": launch.why_float,
    }


def program_rows(program: Program, requested: str) -> list[tuple[str, str]]:
    """What a lowered program runs and stores, as names and values for a small table."""
    rows = truth_table(program, requested)
    widths: dict[str, int] = {}
    for row in rows:
        widths[row["executed"]] = widths.get(row["executed"], 0) + 1
    found = totals(rows)
    ratio = "" if found["ratio_to_fp16"] is None else f", {100 * found['ratio_to_fp16']:.1f} % of fp16"
    return [
        ("layers", ", ".join(f"{count} {width}" for width, count in sorted(widths.items()))),
        ("weights of quantized layers", f"{found['bytes'] / 1e6:.3f} MB{ratio}"),
    ]


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the rows that execute in integers."""
    quantized = [r for r in rows if r["executed"] not in ("float", "table") and r["fp16_bytes"]]
    stored, fp16 = sum(r["bytes"] for r in quantized), sum(r["fp16_bytes"] for r in quantized)
    return {
        "quantized_layers": len(quantized),
        "float_layers": sum(r["executed"] == "float" for r in rows),
        "folded_layers": sum(r["executed"] == "table" for r in rows),
        "bytes": stored,
        "fp16_bytes": fp16,
        "ratio_to_fp16": round(stored / fp16, 4) if fp16 else None,
    }
