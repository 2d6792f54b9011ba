"""Verb ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import FILE, guarded, output_options, print_json, source_options


@click.command()
@click.argument("artifact", type=FILE)
@click.option("--baseline", type=FILE, metavar="MODEL", help="The float model, timed beside ARTIFACT.")
@click.option("--batch", metavar="N,N", help="Batch sizes (default: those of the file's plans; on the CPU 1).")
@click.option("--repeats", type=click.IntRange(2, 10_000), help="Rounds (default 30; on the CPU 10).")
@click.option("--kernels", is_flag=True, help="Also time every launch alone, against measured ceilings (GPU).")
@click.option("--device", help="cpu or cuda (default: the GPU where there is one).")
@source_options
@output_options()
@guarded
def bench(
    artifact: Path,
    baseline: Path | None,
    batch: str | None,
    repeats: int | None,
    kernels: bool,
    device: str | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Time ARTIFACT, beside the float model when one is given; nothing is timed before its result is right."""
    from edadm_compile.driver import bench as driver
    from edadm_compile.report import bench_tables
    from edadm_compile.report import progress as bars
    from edadm_compile.report.tables import print_shape

    wanted = driver.Options(driver.parse_batches(batch), repeats, kernels)
    with bars.reporter(quiet, verbose) as progress:
        result = driver.run(artifact, baseline, wanted, device, progress, **options)
    if as_json:
        print_json(result)
    else:
        print_shape(result)
        bench_tables.print_bench(result)
