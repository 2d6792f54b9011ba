"""Verb ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import FILE, guarded, output_options, print_json, source_options


@click.command()
@click.argument("artifact", type=FILE)
@click.option("-o", "--output", type=FILE, help="Page to write (default: ARTIFACT with suffix .html).")
@click.option(
    "--reference", type=FILE, metavar="MODEL", help="The float model: images, errors and ranges are measured beside it."
)
@click.option(
    "-n", "count", type=click.IntRange(1, 64), help="Pairs of images (default 16; 2 above 100 million parameters)."
)
@click.option("--seed", type=click.IntRange(0, 1_000_000), default=0, show_default=True, help="Seed of the noise.")
@click.option("--report-data", "data", type=FILE, metavar="DIR", help="Also write the data of each plot as JSON files.")
@source_options
@output_options("No progress, no summary.")
@guarded
def report(artifact: Path, output: Path | None, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> None:
    """Write a page about ARTIFACT: quality, calibration, blocks, ranges, layers, size, time, provenance."""
    from edadm_compile.driver import report as driver
    from edadm_compile.report import progress as bars
    from edadm_compile.report import report_lines
    from edadm_compile.report.tables import print_shape

    with bars.reporter(quiet, verbose) as progress:
        result = driver.run(artifact, output or artifact.with_suffix(".html"), progress=progress, **options)
    if as_json:
        print_json(result)
    elif not quiet:
        print_shape(result)
        report_lines.print_report(result)
