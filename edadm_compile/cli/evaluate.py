"""Verb ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import FILE, OneOf, guarded, output_options, print_json, source_options


@click.command()
@click.argument("artifact", type=FILE)
@click.option("--reference", type=FILE, required=True, metavar="MODEL", help="The float model that was compiled.")
@click.option("--data", type=FILE, metavar="DIR|FILE.npz", help="Real images: png and jpg files, or an array.")
@click.option(
    "--features", type=FILE, metavar="FILE.pt2", help="Feature extractor (default: features.pt2 beside MODEL)."
)
@click.option("-n", "count", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Images.")
@click.option("--batch", type=click.IntRange(1, 4096), default=32, show_default=True, help="Images at a time.")
@click.option(
    "--engine",
    type=OneOf(["onnxruntime", "reference", "cuda"]),
    help="What runs ARTIFACT (default: ONNX Runtime).",
)
@click.option("--seed", type=click.IntRange(0, 1_000_000), default=0, show_default=True)
@click.option("--fail-below", metavar="NAME=X,...", help="Least quality, such as sqnr=27,psnr=29,ssim=0.9.")
@click.option("--fail-above", metavar="NAME=X,...", help="Largest distance, such as frechet=2,kid=0.01.")
@source_options
@output_options()
@guarded
def evaluate(artifact: Path, reference: Path, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> None:
    """Measure the quality of ARTIFACT against the float model, from the same noise.

    Exits with 7 when a limit of --fail-below or --fail-above is missed.
    """
    from edadm_compile.driver import evaluate as driver
    from edadm_compile.parallel.launch import processes
    from edadm_compile.report import evaluate_tables as tables
    from edadm_compile.report import progress as bars
    from edadm_compile.report.tables import print_shape

    wanted = driver.Options(**{name: options.pop(name) for name in driver.Options.__dataclass_fields__})
    with processes() as world:
        with bars.reporter(quiet or not world.leads, verbose) as progress:
            result = driver.run(artifact, reference, wanted, progress, world, **options)
        if as_json and world.leads:
            print_json(result)
        elif world.leads:
            print_shape(result)
            tables.print_evaluation(result)
        driver.check(result)
