"""Verb ``verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import FILE, debug_option, guarded, json_option, source_options


@click.command()
@click.argument("artifact", type=FILE)
@click.option("--reference", type=FILE, required=True, metavar="MODEL", help="The float model that was compiled.")
@click.option("-n", "count", type=click.IntRange(1, 4096), default=8, show_default=True, help="Trajectories.")
@click.option("--seed", type=int, default=1, show_default=True)
@source_options
@json_option
@debug_option
@guarded
def verify(artifact: Path, as_json: bool, **options: Any) -> None:
    """Check ARTIFACT: integer execution against simulated quantization, layer by layer and end to end.

    Exits with 7 when the numeric contract is broken.
    """
    from edadm_compile.driver import verify as driver

    result = driver.run(artifact, **options)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        driver.print_result(result)
    driver.check(result)
