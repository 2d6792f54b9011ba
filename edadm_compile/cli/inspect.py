"""Verb ``inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edadm_compile.cli.options import FILE, debug_option, guarded, json_option


@click.command()
@click.argument("artifact", type=FILE)
@click.option("--launches", metavar="sm_NN:BATCH", help="Show one launch plan instead: kernels, tiles, registers.")
@json_option
@debug_option
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
