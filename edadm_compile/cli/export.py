"""Verb ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import FILE, OneOf, guarded, output_options, print_json, source_options


@click.command()
@click.argument("artifact", type=FILE)
@click.option("-o", "--output", type=FILE, help="File to write (default: ARTIFACT with suffix .onnx).")
@click.option(
    "--onnx-target",
    type=OneOf(["cpu", "arm", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Consumer: ONNX Runtime on x86, ONNX Runtime on ARM, or TensorRT.",
)
@click.option("--int4", is_flag=True, help="Store weights of up to 4 bits as INT4, two per byte.")
@click.option(
    "--layout",
    type=OneOf(["file", "diffusers"]),
    default="file",
    show_default=True,
    help="One file, or a folder with unet/model.onnx and unet/config.json.",
)
@click.option("--reference", type=FILE, metavar="MODEL", help="The float model: its predictions are compared too.")
@click.option("--check/--no-check", default=True, show_default=True, help="Run the graph in ONNX Runtime first.")
@source_options
@output_options("No progress, no summary.")
@guarded
def export(artifact: Path, output: Path | None, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> None:
    """Write ARTIFACT as a QDQ ONNX graph that ONNX Runtime executes in integers, and show that it does."""
    from edadm_compile.driver import export as driver
    from edadm_compile.report import export_tables as tables
    from edadm_compile.report import progress as bars
    from edadm_compile.report.tables import print_shape

    suffix = "" if options["layout"] == "diffusers" else ".onnx"
    with bars.reporter(quiet, verbose) as progress:
        place = output or driver.default_output(artifact, artifact.with_suffix(suffix), options)
        result = driver.run(artifact, place, progress=progress, **options)
    if as_json:
        print_json(result)
    elif not quiet:
        print_shape(result)
        tables.print_export(result)
