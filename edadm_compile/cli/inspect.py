"""Verb ``inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from edadm_compile.cli.options import FILE, guarded, output_options, print_json


@click.command()
@click.argument("artifact", type=FILE)
@click.option("--launches", metavar="sm_NN:BATCH", help="Show one launch plan instead: kernels, tiles, registers.")
@output_options("No table: the exit code says whether the file can be read.")
@guarded
def inspect(artifact: Path, launches: str | None, quiet: bool, verbose: bool, as_json: bool) -> None:
    """Show what is in ARTIFACT: every layer, what executes and why, sizes, provenance."""
    from edadm_compile.driver import device_code
    from edadm_compile.report import tables
    from edadm_compile.runtime.artifact import read

    if launches is not None:
        rows = device_code.launches_of(read(artifact), launches)
        if as_json:
            print_json(rows)
        elif not quiet:
            tables.print_launches(rows, f"{artifact} on {launches}")
        return
    report = tables.inspect_report(read(artifact), artifact.stat().st_size)
    if as_json:
        print_json(report)
    elif not quiet:
        tables.print_inspect(report)
        if verbose:
            tables.print_settings(report)
