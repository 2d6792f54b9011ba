"""Verb ``tune``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edadm_compile.cli.options import FILE, guarded, output_options, print_json


@click.command()
@click.argument("artifact", type=FILE)
@click.option("-o", "--output", type=FILE, help="File to write (default: replace ARTIFACT).")
@click.option("--batch", metavar="N,N", help="Batch sizes besides those of the file's plans.")
@click.option("--budget", type=click.FloatRange(1), metavar="SECONDS", help="Stop the search after this time.")
@click.option("--table", type=FILE, metavar="FILE.json", help="Also write the tiles and times, even when interrupted.")
@click.option(
    "--prepare",
    metavar="ARCH",
    help="Only compile what will be tried on a GPU of ARCH into the cache of kernels; needs no GPU and writes no file.",
)
@output_options("No progress, no summary.")
@guarded
def tune(
    artifact: Path,
    output: Path | None,
    batch: str | None,
    budget: float | None,
    table: Path | None,
    prepare: str | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Measure tiles for the matrix kernels of ARTIFACT on the GPU present and write it with the fastest."""
    from edadm_compile.driver import bench as batches
    from edadm_compile.driver import tune as driver
    from edadm_compile.report import bench_tables
    from edadm_compile.report import progress as bars

    if prepare is not None and (output or budget or table):
        raise click.UsageError("--prepare writes no file and measures nothing: leave out -o, --budget and --table")
    with bars.reporter(quiet, verbose) as progress:
        wanted = batches.parse_batches(batch)
        if prepare is not None:
            result = driver.prepare(artifact, prepare, wanted, progress)
        else:
            result = driver.run(artifact, output or artifact, wanted, budget, table, progress)
    if as_json:
        print_json(result)
    elif not quiet:
        (bench_tables.print_tune if prepare is None else bench_tables.print_prepared)(result)
    if result.get("interrupted"):
        click.echo(f"interrupted: {table or 'nothing'} was written", err=True)
        sys.exit(130)
