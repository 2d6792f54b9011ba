"""What several verbs share: errors as sentences, and options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edadm_compile.errors import EdadmError

debug_option = click.option("--debug", is_flag=True, help="Show a traceback instead of one sentence.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
FILE = click.Path(path_type=Path)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print package errors as one sentence and exit with their code; Ctrl-C exits with 130."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        debug = kwargs.pop("debug", False)
        try:
            return function(*args, **kwargs)
        except EdadmError as error:
            if debug:
                raise
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted: nothing was written", err=True)
            sys.exit(130)

    wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
    return wrapper


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how to load a model; shared by every verb that takes one."""
    for option in (
        click.option(
            "--trust-pickle", is_flag=True, help="Open a pickled module. It can run any code: only for files you made."
        ),
        click.option(
            "--factory", metavar="PKG.MODULE:CALLABLE", help="Code that builds the module for a state-dict file."
        ),
        click.option(
            "--cond",
            "conditions",
            type=FILE,
            metavar="FILE.safetensors",
            help="Condition tensors [N, ...] by forward parameter name.",
        ),
        click.option(
            "--original-config",
            type=FILE,
            metavar="FILE.yaml",
            help="Training configuration of a checkpoint in its authors' layout.",
        ),
        click.option(
            "--pipeline",
            type=FILE,
            metavar="FOLDER",
            help="diffusers pipeline with the text encoders (default: MODEL's).",
        ),
        click.option("--prompts", type=FILE, metavar="FILE.txt", help="Prompts, one a line, in place of --cond."),
        click.option("--steps", type=int, help="Sampler steps (default: the checkpoint's, else 50)."),
        click.option(
            "--scheduler", type=FILE, metavar="FILE.json", help="diffusers scheduler_config.json of the sampler."
        ),
        click.option("--shape", metavar="C,H,W", help="Input shape when it cannot be inferred."),
    ):
        function = option(function)
    return function


def sampler_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how a sampler calls the model, beside scheduler and steps."""
    for option in (
        click.option(
            "--uncond",
            metavar="FILE.safetensors|zeros",
            help="Conditions of the unconditional branch, one row each, or zeros.",
        ),
        click.option("--null-label", metavar="K|last", help="Class label of the unconditional branch."),
        click.option("--guidance", type=float, metavar="SCALE", help="Scale of classifier-free guidance (1: none)."),
        click.option("--eta", type=float, help="Noise that DDIM adds, 0 (default) to 1."),
    ):
        function = option(function)
    return function


def device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which GPU code goes into a file."""
    for option in (
        click.option(
            "--store",
            type=click.Choice(["float16", "bfloat16", "float32"]),
            help="Type of values between integer kernels.",
        ),
        click.option("--batch", metavar="N,N", help="Batch sizes to make GPU code for (default 1,8)."),
        click.option(
            "--targets",
            metavar="sm_NN,...",
            help="GPU architectures: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120; all; none. Default: the GPU present, "
            "else sm_80,sm_89,sm_90.",
        ),
    ):
        function = option(function)
    return function
