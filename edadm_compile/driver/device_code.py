"""GPU code for a lowered program: plans, compiled kernels, and the verb that adds them to an existing file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edadm_compile.driver.options import parse_batches
from edadm_compile.driver.outputs import check_writable
from edadm_compile.driver.shapes import check_one_shape
from edadm_compile.errors import ConfigError, InputError
from edadm_compile.ir.program import Program
from edadm_compile.kernels import aot
from edadm_compile.kernels.cubin import Bundle
from edadm_compile.kernels.launch import LaunchPlan, Tile
from edadm_compile.kernels.request import triton_version
from edadm_compile.kernels.targets import parse_targets
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import fix_batch, make_plan
from edadm_compile.passes.base import Progress, Silent
from edadm_compile.passes.extremes import FLOAT16_MAX
from edadm_compile.report.truth import describe, launch_table
from edadm_compile.runtime.artifact import Artifact, read, write

STORES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: Batch sizes code is made for where nothing else is asked.
DEFAULT_BATCHES = (1, 8)


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Which GPU code to make.

    Attributes:
        targets: architectures; empty for none.
        batches: batch sizes.
        store: element type of intermediates that are not codes.
        tiles: measured tiles by architecture, over the built-in choice.
        library_attention: torch computes attention instead of the fused kernel.
        float_layers: layers left in the store type because that was measured faster.
    """

    targets: tuple[str, ...]
    batches: tuple[int, ...] = DEFAULT_BATCHES
    store: str = "float16"
    tiles: Mapping[str, Mapping[str, Tile]] = dataclasses.field(default_factory=dict)
    library_attention: bool = False
    float_layers: tuple[str, ...] = ()


def options_of(targets: str | None, batch: str | None, store: str | None) -> DeviceOptions:
    """From the command line.

    Raises:
        InputError: an unknown target or type, or a batch that is no list of positive integers.
    """
    batches = parse_batches(batch) or DEFAULT_BATCHES
    return DeviceOptions(parse_targets(targets), batches, store or "float16")


def fitted(options: DeviceOptions, asked: str | None, beyond: Mapping[str, Any] | None) -> DeviceOptions:
    """The same with a store type that holds the model's values.

    Args:
        asked: the store type that the user named, None for none.
        beyond: from `passes.extremes.beyond_float16`.

    Raises:
        ConfigError: float16 was asked for, and values are known to overflow it.
    """
    if beyond is None or not options.targets or options.store != "float16":
        return options
    if asked == "float16" and beyond["largest"] > FLOAT16_MAX:
        raise ConfigError(
            f"--store float16: values in {beyond['where']} exceed it (up to {beyond['largest']:.3g}, float16 ends at "
            f"{FLOAT16_MAX:g}); leave --store out, or give float32 or bfloat16"
        )
    return options if asked == "float16" else dataclasses.replace(options, store="float32")


def batches_for(program: Program, batches: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes a program accepts: its own where it was captured with a fixed one.

    Raises:
        InputError: larger than the captured model accepts.
    """
    signature = program.signature
    if signature.min_batch == signature.max_batch:
        return (signature.max_batch,)
    for batch in batches:
        if batch > signature.max_batch:
            raise InputError(f"--batch: got {batch}, the captured model accepts up to {signature.max_batch}")
    return tuple(batches)


def make_plans(program: Program, options: DeviceOptions) -> list[LaunchPlan]:
    """Launch plans for every architecture and batch size asked for."""
    batches = batches_for(program, options.batches)
    fixed = {batch: fix_batch(program, batch, options.float_layers) for batch in batches}
    return [
        make_plan(
            program,
            Target(
                arch,
                batch,
                STORES[options.store],
                tiles=options.tiles.get(arch, {}),
                library_attention=options.library_attention,
                float_layers=options.float_layers,
            ),
            fixed[batch],
        )
        for arch in options.targets
        for batch in batches
    ]


def build(program: Program, options: DeviceOptions, progress: Progress) -> Bundle | None:
    """Compile GPU code; None without targets.

    Raises:
        TargetError: Triton is missing, or a kernel that does not compile.
    """
    if not options.targets:
        return None
    plans = make_plans(program, options)
    progress.stage("kernels", len(aot.distinct(plans)))
    return aot.compile_bundle(plans, progress=progress.advance)


def check_has_form(artifact: Artifact) -> None:
    """Refuse files that were compiled for ONNX Runtime, or for several shapes.

    Raises:
        InputError: the file has several shapes, or the program rounds every convolution's output to 8 bits; no GPU kernel
            does, and torch would do it between the kernels, slower than the float model.
    """
    check_one_shape(artifact)
    deploy = artifact.manifest.get("config", {}).get("deploy")
    if deploy is not None:
        raise InputError(
            f"GPU code: the file was compiled with --deploy {deploy}, which has no GPU form; compile the model again "
            "without it"
        )


def retarget(
    path: Path, output: Path, options: DeviceOptions, progress: Progress | None = None, store: str | None = None
) -> dict[str, Any]:
    """Replace the GPU code of a compiled file; everything else stays as it is.

    Args:
        store: the store type that the user named; without one a file whose values exceed float16 gets float32.

    Raises:
        EdadmError: an unreadable file, or code that cannot be made. `output` is written whole or not at all.
    """
    check_writable(output)
    artifact = read(path, device_code=False)  # the old code is replaced unread
    if options.targets:
        check_has_form(artifact)
    options = fitted(options, store, artifact.manifest.get("beyond_float16"))
    bundle = build(artifact.lowered, options, progress or Silent())
    versions = {**artifact.manifest.get("versions", {}), **({"triton": triton_version()} if bundle else {})}
    changed = dataclasses.replace(artifact, device=bundle, manifest={**artifact.manifest, "versions": versions})
    size = write(changed, output)
    return {"output": str(output), "bytes": size, "device": describe(bundle)}


def launches_of(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    """Rows of the launch plan called "sm_90:8".

    Raises:
        InputError: a malformed name, or no such plan in the file.
    """
    arch, _, batch = name.partition(":")
    if artifact.device is None:
        raise InputError("--launches: the file has no GPU code; add it with: edadm-compile target FILE --targets ...")
    if not batch.isdecimal():
        raise InputError(f"--launches: got {name!r}, expected an architecture and a batch size such as sm_90:8")
    return launch_table(artifact.device, arch, int(batch))
