"""Verb ``example``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edadm_compile.cli.options import FILE, debug_option, guarded, json_option


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("folder", type=FILE, required=False)
@json_option
@debug_option
@guarded
def example(name: str, folder: Path | None, as_json: bool) -> None:
    """Write the example NAME (digits) into FOLDER (default: NAME).

    It is a trained model to try the other verbs on, with the scripts that made and judge it.
    """
    from edadm_compile.driver.example import write_example

    written = write_example(name, folder or Path(name))
    if as_json:
        click.echo(json.dumps({"files": [str(path) for path in written]}, indent=2))
        return
    for path in written:
        click.echo(path)
    model = next((path for path in written if path.name == "model.pt"), None)
    if model is not None:
        click.echo(f"next: edadm-compile {model} --w4a8 --targets none -o unet.qmod", err=True)
