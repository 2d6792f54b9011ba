"""Command line: parse, call the library, print. No logic of its own."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edadm_compile.errors import EdadmError
from edadm_compile.methods import LOSSES, METHODS, SELECTIONS

_VERSION = "0.1.0"


class DefaultCompile(click.Group):
    """A group whose default verb is ``compile``: ``edadm-compile model.pt ...`` works as it reads."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``compile`` in front unless a verb or a group option comes first."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["compile", *args]
        return super().parse_args(ctx, args)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print package errors as one sentence and exit with their code; Ctrl-C exits with 130."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        debug = kwargs.pop("debug", False)
        try:
            return function(*args, **kwargs)
        except EdadmError as error:
            if debug:
                raise
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted: nothing was written", err=True)
            sys.exit(130)

    wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
    return wrapper


_debug = click.option("--debug", is_flag=True, help="Show a traceback instead of one sentence.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
_file = click.Path(path_type=Path)


def _bits_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    from edadm_compile.config import PRESETS

    for name in reversed(PRESETS):
        function = click.option(
            f"--{name}",
            "preset",
            flag_value=name,
            default=None,
            help=f"{name[1]}-bit weights, {name[3]}-bit activations.",
        )(function)
    return function


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how to load a model; shared by every verb that takes one."""
    for option in (
        click.option(
            "--trust-pickle", is_flag=True, help="Open a pickled module. It can run any code: only for files you made."
        ),
        click.option(
            "--factory", metavar="PKG.MODULE:CALLABLE", help="Code that builds the module for a state-dict file."
        ),
        click.option(
            "--cond",
            "conditions",
            type=_file,
            metavar="FILE.safetensors",
            help="Condition tensors [N, ...] by forward parameter name.",
        ),
        click.option("--steps", type=int, help="Sampler steps (default: the checkpoint's, else 50)."),
        click.option(
            "--scheduler", type=_file, metavar="FILE.json", help="diffusers scheduler_config.json of the sampler."
        ),
        click.option("--shape", metavar="C,H,W", help="Input shape when it cannot be inferred."),
    ):
        function = option(function)
    return function


def sampler_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how a sampler calls the model, beside scheduler and steps."""
    for option in (
        click.option(
            "--uncond",
            metavar="FILE.safetensors|zeros",
            help="Conditions of the unconditional branch, one row each, or zeros.",
        ),
        click.option("--null-label", metavar="K|last", help="Class label of the unconditional branch."),
        click.option("--guidance", type=float, metavar="SCALE", help="Scale of classifier-free guidance (1: none)."),
        click.option("--eta", type=float, help="Noise that DDIM adds, 0 (default) to 1."),
    ):
        function = option(function)
    return function


def device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which GPU code goes into a file."""
    for option in (
        click.option(
            "--store",
            type=click.Choice(["float16", "bfloat16", "float32"]),
            help="Type of values between integer kernels.",
        ),
        click.option("--batch", metavar="N,N", help="Batch sizes to make GPU code for (default 1,8)."),
        click.option(
            "--targets",
            metavar="sm_NN,...",
            help="GPU architectures: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120; all; none. Default: the GPU present, "
            "else sm_80,sm_89,sm_90.",
        ),
    ):
        function = option(function)
    return function


@click.group(cls=DefaultCompile, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_VERSION, prog_name="edadm-compile")
def main() -> None:
    """Compile trained diffusion UNets to integer programs, quantized with EDA-DM.

    The default verb is compile: edadm-compile model.pt --w4a8 -o unet.qmod
    """
    # Deprecations inside torch and diffusers are not the user's to act on.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


@main.command()
@click.argument("model", type=_file)
@click.option("-o", "--output", type=_file, help="File to write (default: MODEL with suffix .qmod).")
@_bits_flags
@click.option("--weights-bits", type=int, help="Weight width, 2 to 8.")
@click.option("--acts-bits", type=int, help="Activation width, 2 to 8 or 16.")
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    help="EDA-DM with our additions (default), a published method, or round to nearest.",
)
@click.option("--uniform", is_flag=True, default=None, help="Strict widths: no promoted layers, 8-bit stem input.")
@click.option(
    "--budget-bits",
    type=float,
    metavar="BITS",
    help="Choose 8-bit layers by measured error: at most so many stored bits per weight on average.",
)
@click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="The same: fewest stored bits with at least so much predicted noise SQNR.",
)
@click.option(
    "--attention", type=click.Choice(["float", "int8"]), help="Attention products in float (default) or int8."
)
@click.option(
    "--deploy",
    type=click.Choice(["onnxruntime"]),
    help="Engine to optimise for: output scales join the reconstruction.",
)
@click.option("--iters", type=int, help="Reconstruction steps per block (0: round to nearest).")
@click.option("--calib-samples", type=int, help="Calibration samples.")
@click.option(
    "--selection",
    type=click.Choice(SELECTIONS),
    help="How calibration samples are spread over the timesteps (default: the method's).",
)
@click.option(
    "--loss",
    type=click.Choice(list(LOSSES)),
    help="What reconstruction minimises: errors of block outputs, of the layers inside, or both (default: the method's).",
)
@click.option("--qdrop", type=click.FloatRange(0, 1), help="Share of activations left unquantized while training.")
@click.option("--split/--no-split", default=None, help="One scale for each source of a concatenation.")
@click.option("--seed", type=int, help="Seed of every random draw (default 0).")
@click.option("--device", default="cpu", show_default=True, help="Where to calibrate and reconstruct.")
@click.option(
    "--config", "config_file", type=_file, metavar="FILE.toml", help="Settings file; options on the command line win."
)
@device_options
@source_options
@sampler_options
@click.option("--dump-graphs", type=_file, metavar="DIR", help="Write the graph after each pass.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@_json
@_debug
@guarded
def compile(
    model: Path,
    output: Path | None,
    quiet: bool,
    as_json: bool,
    device: str,
    config_file: Path | None,
    dump_graphs: Path | None,
    targets: str | None,
    batch: str | None,
    store: str | None,
    **options: Any,
) -> None:
    """Compile MODEL to an integer program.

    MODEL is a checkpoint dictionary, a torch.export archive, a diffusers folder, or a state dict with --factory.
    """
    from edadm_compile.driver import compile as driver
    from edadm_compile.report import progress as bars
    from edadm_compile.report import tables

    request = driver.Request(
        model=model,
        output=output or model.with_suffix(".qmod"),
        device=device,
        config_file=config_file,
        dump=dump_graphs,
        options=options,
        targets=targets,
        batch=batch,
        store=store,
    )
    with bars.reporter(quiet or as_json) as progress:
        summary = driver.run(request, progress)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    elif not quiet:
        tables.print_summary(summary)


@main.command()
@click.argument("artifact", type=_file)
@click.option("--launches", metavar="sm_NN:BATCH", help="Show one launch plan instead: kernels, tiles, registers.")
@_json
@_debug
@guarded
def inspect(artifact: Path, launches: str | None, as_json: bool) -> None:
    """Show what is in ARTIFACT: every layer, what executes and why, sizes, provenance."""
    from edadm_compile.driver import device_code
    from edadm_compile.report import tables
    from edadm_compile.runtime.artifact import read

    if launches is not None:
        rows = device_code.launches_of(read(artifact), launches)
        if as_json:
            click.echo(json.dumps(rows, indent=2))
        else:
            tables.print_launches(rows, f"{artifact} on {launches}")
        return
    report = tables.inspect_report(read(artifact), artifact.stat().st_size)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        tables.print_inspect(report)


@main.command()
@click.argument("artifact", type=_file)
@click.option("-o", "--output", type=_file, help="File to write (default: replace ARTIFACT).")
@device_options
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@_json
@_debug
@guarded
def target(
    artifact: Path,
    output: Path | None,
    targets: str | None,
    batch: str | None,
    store: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make GPU code for ARTIFACT, in place of what it holds; nothing is quantized again."""
    from edadm_compile.driver import device_code as driver
    from edadm_compile.report import progress as bars
    from edadm_compile.report import tables

    wanted = driver.options_of(targets, batch, store)
    with bars.reporter(quiet or as_json) as progress:
        result = driver.retarget(artifact, output or artifact, wanted, progress)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    elif not quiet:
        tables.print_device(result["device"])


@main.command()
@click.argument("artifact", type=_file)
@click.option("-o", "--output", type=_file, help="File to write (default: ARTIFACT with suffix .onnx).")
@click.option(
    "--onnx-target",
    type=click.Choice(["cpu", "arm", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Consumer: ONNX Runtime on x86, ONNX Runtime on ARM, or TensorRT.",
)
@click.option("--int4", is_flag=True, help="Store weights of up to 4 bits as INT4, two per byte.")
@click.option(
    "--layout",
    type=click.Choice(["file", "diffusers"]),
    default="file",
    show_default=True,
    help="One file, or a folder with unet/model.onnx and unet/config.json.",
)
@click.option("--reference", type=_file, metavar="MODEL", help="The float model: its predictions are compared too.")
@click.option("--check/--no-check", default=True, show_default=True, help="Run the graph in ONNX Runtime first.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@source_options
@_json
@_debug
@guarded
def export(artifact: Path, output: Path | None, quiet: bool, as_json: bool, **options: Any) -> None:
    """Write ARTIFACT as a QDQ ONNX graph that ONNX Runtime executes in integers, and show that it does."""
    from edadm_compile.driver import export as driver
    from edadm_compile.report import export_tables as tables
    from edadm_compile.report import progress as bars

    suffix = "" if options["layout"] == "diffusers" else ".onnx"
    with bars.reporter(quiet or as_json) as progress:
        result = driver.run(artifact, output or artifact.with_suffix(suffix), progress=progress, **options)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    elif not quiet:
        tables.print_export(result)


@main.command()
@click.argument("artifact", type=_file)
@click.option("-n", "count", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Images.")
@click.option("-o", "--output", type=_file, default=Path("grid.png"), show_default=True, help="PNG to write.")
@click.option(
    "--reference", type=_file, metavar="MODEL", help="Float model: sampled from the same noise, rows side by side."
)
@click.option("--label", type=int, help="Class label for all images (default: labels in turn).")
@click.option("--engine", type=click.Choice(["onnxruntime", "reference"]), help="CPU engine (default: ONNX Runtime).")
@click.option("--seed", type=int, default=0, show_default=True)
@source_options
@sampler_options
@_json
@_debug
@guarded
def sample(artifact: Path, as_json: bool, **options: Any) -> None:
    """Generate images with ARTIFACT, beside the float model's when one is given."""
    from edadm_compile.driver import sample as driver

    result = driver.run(artifact, as_json=as_json, **options)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        driver.print_result(result)


@main.command()
@click.argument("artifact", type=_file)
@click.option("--reference", type=_file, required=True, metavar="MODEL", help="The float model that was compiled.")
@click.option("-n", "count", type=click.IntRange(1, 4096), default=8, show_default=True, help="Trajectories.")
@click.option("--seed", type=int, default=1, show_default=True)
@source_options
@_json
@_debug
@guarded
def verify(artifact: Path, as_json: bool, **options: Any) -> None:
    """Check ARTIFACT: integer execution against simulated quantization, layer by layer and end to end.

    Exits with 7 when the numeric contract is broken.
    """
    from edadm_compile.driver import verify as driver

    result = driver.run(artifact, **options)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        driver.print_result(result)
    driver.check(result)


@main.command()
@click.argument("artifact", type=_file)
@click.option("--reference", type=_file, required=True, metavar="MODEL", help="The float model that was compiled.")
@click.option("--data", type=_file, metavar="DIR|FILE.npz", help="Real images: png and jpg files, or an array.")
@click.option(
    "--features", type=_file, metavar="FILE.pt2", help="Feature extractor (default: features.pt2 beside MODEL)."
)
@click.option("-n", "count", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Images.")
@click.option("--batch", type=click.IntRange(1, 4096), default=32, show_default=True, help="Images at a time.")
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime", "reference", "cuda"]),
    help="What runs ARTIFACT (default: ONNX Runtime).",
)
@click.option("--seed", type=click.IntRange(0, 1_000_000), default=0, show_default=True)
@click.option("--fail-below", metavar="NAME=X,...", help="Least quality, such as sqnr=27,psnr=29,ssim=0.9.")
@click.option("--fail-above", metavar="NAME=X,...", help="Largest distance, such as frechet=2,kid=0.01.")
@click.option("--quiet", is_flag=True, help="No progress.")
@source_options
@_json
@_debug
@guarded
def evaluate(artifact: Path, reference: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure the quality of ARTIFACT against the float model, from the same noise.

    Exits with 7 when a limit of --fail-below or --fail-above is missed.
    """
    from edadm_compile.driver import evaluate as driver
    from edadm_compile.report import evaluate_tables as tables
    from edadm_compile.report import progress as bars

    wanted = driver.Options(**{name: options.pop(name) for name in driver.Options.__dataclass_fields__})
    with bars.reporter(quiet or as_json) as progress:
        result = driver.run(artifact, reference, wanted, progress, **options)
    if as_json:
        click.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        tables.print_evaluation(result)
    driver.check(result)


@main.command()
@click.argument("artifact", type=_file)
@click.option("--baseline", type=_file, metavar="MODEL", help="The float model, timed beside ARTIFACT.")
@click.option("--batch", metavar="N,N", help="Batch sizes (default: those of the file's plans; on the CPU 1).")
@click.option("--repeats", type=click.IntRange(2, 10_000), help="Rounds (default 30; on the CPU 10).")
@click.option("--kernels", is_flag=True, help="Also time every launch alone, against measured ceilings (GPU).")
@click.option("--device", help="cpu or cuda (default: the GPU where there is one).")
@click.option("--quiet", is_flag=True, help="No progress.")
@source_options
@_json
@_debug
@guarded
def bench(
    artifact: Path,
    baseline: Path | None,
    batch: str | None,
    repeats: int | None,
    kernels: bool,
    device: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Time ARTIFACT, beside the float model when one is given; nothing is timed before its result is right."""
    from edadm_compile.driver import bench as driver
    from edadm_compile.report import bench_tables
    from edadm_compile.report import progress as bars

    wanted = driver.Options(driver.parse_batches(batch), repeats, kernels)
    with bars.reporter(quiet or as_json) as progress:
        result = driver.run(artifact, baseline, wanted, device, progress, **options)
    if as_json:
        click.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        bench_tables.print_bench(result)


@main.command()
@click.argument("artifact", type=_file)
@click.option("-o", "--output", type=_file, help="File to write (default: replace ARTIFACT).")
@click.option("--batch", metavar="N,N", help="Batch sizes besides those of the file's plans.")
@click.option("--budget", type=click.FloatRange(1), metavar="SECONDS", help="Stop the search after this time.")
@click.option("--table", type=_file, metavar="FILE.json", help="Also write the tiles and times, even when interrupted.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@_json
@_debug
@guarded
def tune(
    artifact: Path,
    output: Path | None,
    batch: str | None,
    budget: float | None,
    table: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure tiles for the matrix kernels of ARTIFACT on the GPU present and write it with the fastest."""
    from edadm_compile.driver import bench as batches
    from edadm_compile.driver import tune as driver
    from edadm_compile.report import bench_tables
    from edadm_compile.report import progress as bars

    with bars.reporter(quiet or as_json) as progress:
        wanted = batches.parse_batches(batch)
        result = driver.run(artifact, output or artifact, wanted, budget, table, progress)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    elif not quiet:
        bench_tables.print_tune(result)
    if result["interrupted"]:
        click.echo(f"interrupted: {table or 'nothing'} was written", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
