"""Verb ``doctor``."""

from __future__ import annotations

from typing import Any

import click

from edadm_compile.cli.options import guarded, output_options, print_json

_COLOURS = {"works": "green", "missing": "yellow", "fails": "red", "note": "cyan"}


@click.command()
@output_options("Only what is missing or fails.")
@guarded
def doctor(quiet: bool, verbose: bool, as_json: bool) -> None:
    """Say what works on this machine, by trying it, and what to install for the rest.

    Exits with 0 when models can be compiled and run here, on whatever engine.
    """
    from edadm_compile.driver import doctor as driver

    result = driver.run()
    if as_json:
        print_json(result)
    else:
        for row in result["checks"]:
            if not quiet or row["state"] in ("missing", "fails"):
                _print(row)
    if verbose and not as_json:
        click.echo(f"the package is in {result['package']}")
    driver.check(result)


def _print(row: dict[str, Any]) -> None:
    """A line, and below it what to do."""
    state = click.style(f"{row['state']:<8}", fg=_COLOURS[row["state"]])
    click.echo(f"{state} {row['name']:<20} {row['found']}")
    if row["remedy"]:
        click.echo(f"{'':<30}→ {row['remedy']}")
