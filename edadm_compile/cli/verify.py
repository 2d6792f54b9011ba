"""Verb ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import FILE, guarded, output_options, print_json, source_options


@click.command()
@click.argument("artifact", type=FILE)
@click.option("--reference", type=FILE, required=True, metavar="MODEL", help="The float model that was compiled.")
@click.option("-n", "count", type=click.IntRange(1, 4096), default=8, show_default=True, help="Trajectories.")
@click.option("--seed", type=int, default=1, show_default=True)
@source_options
@output_options()
@guarded
def verify(artifact: Path, quiet: bool, verbose: bool, as_json: bool, **options: Any) -> None:
    """Check ARTIFACT: integer execution against simulated quantization, layer by layer and end to end.

    Exits with 7 when the numeric contract is broken.
    """
    from edadm_compile.driver import verify as driver
    from edadm_compile.report import progress as bars
    from edadm_compile.report.tables import print_shape

    with bars.reporter(quiet, verbose) as progress:
        result = driver.run(artifact, progress=progress, **options)
    if as_json:
        print_json(result)
    else:
        print_shape(result)
        driver.print_result(result)
    driver.check(result)
