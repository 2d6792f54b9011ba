"""Verb ``compile``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edadm_compile.cli.options import (
    FILE,
    OneOf,
    device_options,
    guarded,
    model_options,
    output_options,
    print_json,
    sampler_options,
    stopping_on_sigterm,
    work_options,
)
from edadm_compile.config import PRESETS
from edadm_compile.methods import LOSSES, METHODS, SELECTIONS


def bits_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """One flag for each preset of widths, such as ``--w4a8``."""
    for name in reversed(PRESETS):
        function = click.option(
            f"--{name}",
            "preset",
            flag_value=name,
            default=None,
            help=f"{name[1]}-bit weights, {name[3]}-bit activations.",
        )(function)
    return function


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="File to write (default: MODEL with suffix .qmod).")
@bits_flags
@click.option("--weights-bits", type=int, help="Weight width, 2 to 8.")
@click.option("--acts-bits", type=int, help="Activation width, 2 to 8 or 16.")
@click.option(
    "--method",
    type=OneOf(list(METHODS)),
    help="EDA-DM with our additions (default), a published method, or round to nearest.",
)
@click.option("--uniform", is_flag=True, default=None, help="Strict widths: no promoted layers, 8-bit stem input.")
@click.option(
    "--budget-bits",
    type=float,
    metavar="BITS",
    help="Choose 8-bit layers by measured error: at most so many stored bits per weight on average.",
)
@click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="The same: fewest stored bits with at least so much predicted noise SQNR.",
)
@click.option("--attention", type=OneOf(["float", "int8"]), help="Attention products in float (default) or int8.")
@click.option(
    "--deploy",
    type=OneOf(["onnxruntime"]),
    help="Engine to optimise for: output scales join the reconstruction.",
)
@click.option("--iters", type=int, help="Reconstruction steps per block (0: round to nearest).")
@click.option("--calib-samples", type=int, help="Calibration samples.")
@click.option(
    "--selection",
    type=OneOf(SELECTIONS),
    help="How calibration samples are spread over the timesteps (default: the method's).",
)
@click.option(
    "--loss",
    type=OneOf(list(LOSSES)),
    help="What reconstruction minimises: errors of block outputs, of the layers inside, or both (default: the method's).",
)
@click.option("--qdrop", type=click.FloatRange(0, 1), help="Share of activations left unquantized while training.")
@click.option("--split/--no-split", default=None, help="One scale for each source of a concatenation.")
@click.option("--seed", type=int, help="Seed of every random draw (default 0).")
@click.option("--device", default="cpu", show_default=True, help="Where to calibrate and reconstruct.")
@click.option(
    "--config", "config_file", type=FILE, metavar="FILE.toml", help="Settings file; options on the command line win."
)
@device_options
@model_options
@sampler_options
@work_options
@click.option("--report", type=FILE, metavar="FILE.html", help="Also write a page about the result.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Capture, then print layers, blocks, expected time, peak memory and file size; compile nothing.",
)
@click.option("--dump-graphs", type=FILE, metavar="DIR", help="Write the graph after each pass.")
@output_options("No progress, no summary.")
@guarded
def compile(
    model: Path,
    output: Path | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    device: str,
    config_file: Path | None,
    dump_graphs: Path | None,
    targets: str | None,
    batch: str | None,
    store: str | None,
    report: Path | None,
    workdir: Path | None,
    restart: bool,
    threads: int | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Compile MODEL to an integer program.

    MODEL is a checkpoint dictionary, a torch.export archive, a diffusers folder, or a state dict with --factory.
    """
    from edadm_compile.driver import compile as driver
    from edadm_compile.driver import dry_run as plan
    from edadm_compile.parallel.launch import processes
    from edadm_compile.report import dry_run_tables, report_lines, tables
    from edadm_compile.report import progress as bars

    request = driver.Request(
        model=model,
        output=output or model.with_suffix(".qmod"),
        device=device,
        config_file=config_file,
        dump=dump_graphs,
        options=options,
        targets=targets,
        batch=batch,
        store=store,
        report=report,
        workdir=workdir,
        restart=restart,
        threads=threads,
        say=lambda sentence: None if quiet else click.echo(sentence, err=True),
    )
    with (
        stopping_on_sigterm(),
        processes() as world,
        bars.reporter(quiet or not world.leads, verbose) as progress,
    ):
        summary = (plan if dry_run else driver).run(request, progress, world)
    if not world.leads:
        return
    if as_json:
        print_json(summary)
    elif dry_run:
        dry_run_tables.print_dry_run(summary)
    elif not quiet:
        tables.print_summary(summary)
        if report is not None:
            report_lines.print_report(summary["report"])
