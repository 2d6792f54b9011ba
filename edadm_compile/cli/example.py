"""Verb ``example``."""

from __future__ import annotations

from pathlib import Path

import click

from edadm_compile.cli.options import FILE, guarded, output_options, print_json


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("folder", type=FILE, required=False)
@output_options("Only errors.")
@guarded
def example(name: str, folder: Path | None, quiet: bool, verbose: bool, as_json: bool) -> None:
    """Write the example NAME (digits) into FOLDER (default: NAME).

    It is a trained model to try the other verbs on, with the scripts that made and judge it.
    """
    from edadm_compile.driver.example import write_example

    written = write_example(name, folder or Path(name))
    if as_json:
        print_json({"files": [str(path) for path in written]})
    if as_json or quiet:
        return
    for path in written:
        click.echo(path)
    model = next((path for path in written if path.name == "model.pt"), None)
    if model is not None:
        click.echo(f"next: edadm-compile {model} --w4a8 --targets none -o unet.qmod", err=True)
