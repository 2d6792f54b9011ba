"""Verb ``target``."""

from __future__ import annotations

from pathlib import Path

import click

from edadm_compile.cli.options import FILE, device_options, guarded, output_options, print_json


@click.command()
@click.argument("artifact", type=FILE)
@click.option("-o", "--output", type=FILE, help="File to write (default: replace ARTIFACT).")
@device_options
@output_options("No progress, no summary.")
@guarded
def target(
    artifact: Path,
    output: Path | None,
    targets: str | None,
    batch: str | None,
    store: str | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Make GPU code for ARTIFACT, in place of what it holds; nothing is quantized again."""
    from edadm_compile.driver import device_code as driver
    from edadm_compile.report import progress as bars
    from edadm_compile.report import tables

    wanted = driver.options_of(targets, batch, store)
    with bars.reporter(quiet, verbose) as progress:
        result = driver.retarget(artifact, output or artifact, wanted, progress, store)
    if as_json:
        print_json(result)
    elif not quiet:
        tables.print_device(result["device"])
