"""Check an artifact against the numeric contract and against the model it came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from edadm_compile.calibration import guidance, sampler
from edadm_compile.config import QuantConfig
from edadm_compile.driver import shapes
from edadm_compile.driver.options import load_options
from edadm_compile.errors import ArtifactError, ContractError, InputError
from edadm_compile.evaluate import contract
from edadm_compile.evaluate.compare import compare_noise
from edadm_compile.frontend import Source, load_source
from edadm_compile.ir.analysis import is_layer, layer_weight
from edadm_compile.ir.program import Program
from edadm_compile.passes.base import Context, Progress, Silent, run_passes
from edadm_compile.passes.insert_quant import layer_name
from edadm_compile.pipeline import capture, float_passes
from edadm_compile.report.tables import console
from edadm_compile.runtime.artifact import Artifact, read
from edadm_compile.runtime.running import running

#: Layer by layer the match is exact to rounding. End to end a code that sits on a tie may flip, and each flip moves
#: later codes: the two runs then carry different rounding noise of the same size. What must agree is its size (dB).
END_TO_END_LOSS_DB = 0.5


def run(
    artifact: Path, reference: Path, count: int, seed: int, progress: Progress | None = None, **options: Any
) -> dict[str, Any]:
    """Verify a file.

    Args:
        progress: receives stages.
        count: trajectories for the end-to-end comparison; layers are checked on their states.

    Returns:
        ``layers`` (one report per integer layer), ``weights`` (codes against the reference), ``end_to_end`` (dB), and
        ``broken`` (sentences; empty when the contract holds).

    Raises:
        EdadmError: unreadable files, or a reference with other inputs.
    """
    progress = progress or Silent()
    whole = read(artifact)
    loaded, options = shapes.choose(whole, options)
    progress.stage("float model", None)
    source = load_source(reference, load_options(options, loaded.lowered.sampler))
    same_inputs(source, loaded)
    with running(f"{artifact} cannot be compared with its reference"):
        result = compare(loaded, reference_of(source, loaded, count, seed), seed, progress)
    about = shapes.told(whole, loaded)
    return {"artifact": str(artifact), "reference": str(reference), **about, **result}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The float model on its own trajectories.

    Attributes:
        program: after the passes that the artifact's program went through.
        x, conditions: starts of the trajectories.
        states: inputs at three steps of them, as one batch.
        weights: float weights, output channels first, by layer name.
        sha256: of the file it came from.
    """

    program: Program
    x: Tensor
    conditions: list[Tensor]
    states: list[Tensor]
    weights: dict[str, tuple[Tensor, int]]
    sha256: str | None


def reference_of(source: Source, loaded: Artifact, count: int, seed: int) -> Reference:
    """Run the float model for the artifact's sampler.

    Raises:
        ArtifactError: the file does not say how it was compiled.
    """
    settings = loaded.manifest.get("config")
    if settings is None:
        raise ArtifactError("the file does not say with which settings it was compiled: its manifest has no 'config'")
    config = QuantConfig(attention=str(settings["attention"]), deploy=settings.get("deploy"))
    program = run_passes(
        capture(dataclasses.replace(source, sampler=loaded.lowered.sampler)), float_passes(), Context(config)
    )
    generator = torch.Generator().manual_seed(seed)
    x = sampler.draw_noise(program.signature, count, generator)
    null = program.sampler.null
    conditions = sampler.draw_conditions(loaded.lowered.signature, count, generator, source.conditions, null)
    states = _states(program, x, conditions)
    return Reference(program, x, conditions, states, _float_weights(program), source.origin.get("sha256"))


def compare(loaded: Artifact, reference: Reference, seed: int, progress: Progress | None = None) -> dict[str, Any]:
    """All comparisons of `run`."""
    progress = progress or Silent()
    progress.stage("layers", None)
    layers = contract.check_layers(loaded.qdq, loaded.lowered, reference.states)
    result: dict[str, Any] = {
        "layers": [dataclasses.asdict(r) for r in layers],
        "weights": contract.check_weights(loaded.qdq, reference.weights),
    }
    progress.stage("end to end", None)
    result["end_to_end"] = _end_to_end(reference.program, loaded, reference.x, reference.conditions, seed)
    result["same_model"] = bool(reference.sha256 == loaded.manifest.get("source", {}).get("sha256"))
    result["broken"] = _broken(result)
    return result


def same_inputs(source: Source, loaded: Artifact, option: str = "--reference") -> None:
    """Refuse a float model that is called with other inputs than the artifact.

    Args:
        option: where it was given, for the message.

    Raises:
        InputError: naming both lists of inputs.
    """
    ours = [(s.name, s.shape) for s in loaded.lowered.signature.inputs]
    theirs = [(s.name, s.shape) for s in source.signature.inputs]
    if ours != theirs:
        raise InputError(
            f"{option} takes inputs {_named(theirs)}; the artifact was compiled from a model with {_named(ours)}: give that one"
        )


def _named(inputs: list[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {['B', *shape]}".replace("'", "") for name, shape in inputs)


def same_model(source: Source, loaded: Artifact) -> bool:
    """Whether the reference file is byte for byte the one that was compiled."""
    return bool(source.origin.get("sha256") == loaded.manifest.get("source", {}).get("sha256"))


def _states(program: Program, x: Tensor, conditions: list[Tensor]) -> list[Tensor]:
    """Inputs at the first, middle and last step of the float trajectories, as one batch."""
    steps = len(sampler.timesteps(program.sampler))
    wanted = {0, steps // 2, steps - 1}
    rows: list[list[Tensor]] = []
    inputs = guidance.both_branches(program.sampler, conditions)

    def hook(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
        if index in wanted:
            batch_t = torch.full((x_in.shape[0],), t, dtype=torch.float64).to(program.signature.inputs[1].dtype)
            rows.append([x_in.clone(), batch_t, *inputs])

    sampler.sample(program, program.sampler, x, conditions, generator=torch.Generator().manual_seed(0), hook=hook)
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def _float_weights(program: Program) -> dict[str, tuple[Tensor, int]]:
    """Float weights with output channels first, by layer name."""
    weights = {}
    for node in program.graph_module.graph.nodes:
        if is_layer(node):
            axis = 1 if "transpose" in str(node.target) else 0
            weights[layer_name(node)] = (layer_weight(program, node).transpose(0, axis), axis)
    return weights


def _end_to_end(program: Program, loaded: Artifact, x: Tensor, conditions: list[Tensor], seed: int) -> dict[str, float]:
    """Predictions along float trajectories: simulation and integers against float, and against each other (dB)."""
    simulated = compare_noise(program, loaded.qdq, program.sampler, x, conditions, seed)
    integer = compare_noise(program, loaded.lowered, program.sampler, x, conditions, seed)
    between = compare_noise(loaded.qdq, loaded.lowered, program.sampler, x, conditions, seed)
    return {
        "simulated_vs_float": simulated.sqnr,
        "integer_vs_float": integer.sqnr,
        "integer_vs_simulated": between.sqnr,
    }


def _broken(result: dict[str, Any]) -> list[str]:
    broken = [f"layer {r['layer']}: {r['failure']}" for r in result["layers"] if r["failure"]]
    broken += [f"weight of {name}: {failure}" for name, failure in result["weights"]["failures"].items()]
    ends = result["end_to_end"]
    lost = ends["simulated_vs_float"] - ends["integer_vs_float"]
    if not lost <= END_TO_END_LOSS_DB:
        broken.append(
            f"end to end: integers are {lost:.2f} dB further from the float model than the simulation, allowed {END_TO_END_LOSS_DB} dB"
        )
    return broken


def check(result: dict[str, Any]) -> None:
    """Raise when the contract is broken.

    Raises:
        ContractError: naming the first failures.
    """
    if result["broken"]:
        raise ContractError(f"contract broken in {len(result['broken'])} place(s): {'; '.join(result['broken'][:3])}")


def print_result(result: dict[str, Any]) -> None:
    """Print layer by layer and end to end."""
    out = console()
    table = Table(title="integer execution against simulated quantization", title_justify="left")
    for name in ("layer", "accumulators", "equal", "largest output error / bound"):
        table.add_column(name)
    for row in result["layers"]:
        equal = "exactly" if row["accumulators_equal"] else "NO"
        table.add_row(
            row["layer"],
            f"{row['accumulators']:,}",
            equal,
            f"{row['error_over_bound']:.3f}",
            style="red" if row["failure"] else "",
        )
    out.print(table)
    ends = result["end_to_end"]
    out.print(
        f"weights: {result['weights']['checked']} layers within one code of the reference, {len(result['weights']['failures'])} not"
    )
    out.print(
        f"noise SQNR against float: simulated {ends['simulated_vs_float']:.2f} dB, integer {ends['integer_vs_float']:.2f} dB; "
        f"integer against simulated {ends['integer_vs_simulated']:.1f} dB"
    )
    if not result["same_model"]:
        out.print("note: the reference file is not the one that was compiled (its checksum differs)")
    out.print("contract holds" if not result["broken"] else f"contract BROKEN: {len(result['broken'])} place(s)")
