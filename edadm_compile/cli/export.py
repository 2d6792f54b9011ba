"""Verb ``export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import FILE, debug_option, guarded, json_option, source_options


@click.command()
@click.argument("artifact", type=FILE)
@click.option("-o", "--output", type=FILE, help="File to write (default: ARTIFACT with suffix .onnx).")
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
@click.option("--reference", type=FILE, metavar="MODEL", help="The float model: its predictions are compared too.")
@click.option("--check/--no-check", default=True, show_default=True, help="Run the graph in ONNX Runtime first.")
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@source_options
@json_option
@debug_option
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
