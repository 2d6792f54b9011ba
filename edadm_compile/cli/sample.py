"""Verb ``sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import FILE, OneOf, guarded, output_options, print_json, sampler_options, source_options


@click.command()
@click.argument("artifact", type=FILE)
@click.option("-n", "count", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Images.")
@click.option("-o", "--output", type=FILE, default=Path("grid.png"), show_default=True, help="PNG to write.")
@click.option(
    "--reference", type=FILE, metavar="MODEL", help="Float model: sampled from the same noise, rows side by side."
)
@click.option("--label", type=int, help="Class label for all images (default: labels in turn).")
@click.option("--decode", is_flag=True, help="Latents to images with the autoencoder of --pipeline or --reference.")
@click.option("--vae", type=FILE, metavar="FOLDER", help="The same with this diffusers autoencoder.")
@click.option("--engine", type=OneOf(["onnxruntime", "reference"]), help="CPU engine (default: ONNX Runtime).")
@click.option("--seed", type=int, default=0, show_default=True)
@source_options
@sampler_options
@output_options("No progress, no summary.")
@guarded
def sample(artifact: Path, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> None:
    """Generate images with ARTIFACT, beside the float model's when one is given."""
    from edadm_compile.driver import sample as driver
    from edadm_compile.parallel.launch import processes
    from edadm_compile.report import progress as bars
    from edadm_compile.report.tables import print_shape

    with processes() as world, bars.reporter(quiet or not world.leads, verbose) as progress:
        result = driver.run(artifact, progress=progress, world=world, **options)
    if not world.leads:
        return
    if as_json:
        print_json(result)
    elif not quiet:
        print_shape(result)
        driver.print_result(result)
