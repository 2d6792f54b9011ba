"""Verb ``target``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edadm_compile.cli.options import FILE, debug_option, device_options, guarded, json_option


@click.command()
@click.argument("artifact", type=FILE)
@click.option("-o", "--output", type=FILE, help="File to write (default: replace ARTIFACT).")
@device_options
@click.option("--quiet", is_flag=True, help="No progress, no summary.")
@json_option
@debug_option
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
