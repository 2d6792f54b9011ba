"""Verb ``sample``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import FILE, debug_option, guarded, json_option, sampler_options, source_options


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
@click.option("--engine", type=click.Choice(["onnxruntime", "reference"]), help="CPU engine (default: ONNX Runtime).")
@click.option("--seed", type=int, default=0, show_default=True)
@source_options
@sampler_options
@json_option
@debug_option
@guarded
def sample(artifact: Path, as_json: bool, **options: Any) -> None:
    """Generate images with ARTIFACT, beside the float model's when one is given."""
    from edadm_compile.driver import sample as driver

    result = driver.run(artifact, as_json=as_json, **options)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        driver.print_result(result)
