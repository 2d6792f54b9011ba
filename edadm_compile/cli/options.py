"""What several verbs share: errors as sentences, and options."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from edadm_compile.cli import failures
from edadm_compile.errors import Stopped, did_you_mean

debug_option = click.option("--debug", is_flag=True, help="Show a traceback instead of one sentence.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
FILE = click.Path(path_type=Path)


class OneOf(click.Choice[str]):
    """A choice whose error says what was got, what is allowed, and what was probably meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As `click.Choice`."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            allowed = [str(choice) for choice in self.choices]
            near = did_you_mean(str(value), allowed)
            self.fail(f"got {value!r}, allowed {', '.join(allowed)}{near}", param, ctx)


def output_options(quiet: str = "No progress.") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How a verb talks: ``--quiet``, ``--verbose``, ``--json``, ``--debug``; the same on every verb.

    Args:
        quiet: help of ``--quiet``; verbs that write a file have a summary to leave out as well.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            debug_option,
            json_option,
            click.option("-v", "--verbose", is_flag=True, help="More detail: versions, times and memory of stages."),
            click.option("-q", "--quiet", is_flag=True, help=quiet),
        ):
            function = option(function)
        return function

    return add


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print errors as one sentence and exit with their code (`edadm_compile.cli.failures`)."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        debug = kwargs.pop("debug", False)
        if kwargs.get("quiet") and kwargs.get("verbose"):
            raise click.UsageError("--quiet and --verbose exclude each other", click.get_current_context(silent=True))
        try:
            return function(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            failures.end(error, debug)

    wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
    return wrapper


def print_json(value: Any) -> None:
    """One JSON document on standard output; what is infinite or not a number is null, which JSON has."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def work_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say where unfinished work is kept, and how much memory it may take."""
    for option in (
        click.option(
            "--threads",
            type=int,
            metavar="N",
            help="Threads that compute (default: all cores). The last bits of the result depend on it.",
        ),
        click.option(
            "--memory",
            metavar="SIZE",
            help="Most memory for cached activations, such as 4GB; the rest goes to files in the working folder.",
        ),
        click.option("--restart", is_flag=True, help="Discard what an interrupted run left in the working folder."),
        click.option(
            "--workdir",
            type=FILE,
            metavar="DIR",
            help="Keep finished stages in DIR and start from them (default: OUTPUT.work, removed after success).",
        ),
    ):
        function = option(function)
    return function


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, with a sentence and its own exit code."""

    def stop(signum: int, frame: object) -> None:
        raise Stopped("", signum)

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers there only
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _one_shape(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> str | None:
    """The one value; of several, none would be left out unsaid."""
    if len(given) > 1:
        raise click.BadParameter(
            f"got {len(given)} shapes ({' and '.join(given)}), {ctx.info_name} takes one at a time; run it once for each",
            ctx,
            param,
        )
    return given[0] if given else None


_SHAPE = click.option(
    "--shape",
    metavar="C,H,W",
    multiple=True,
    callback=_one_shape,
    help="Input shape when it cannot be inferred; of a file with several, the one to take (default: the first).",
)
_SHAPES = click.option(
    "--shape",
    metavar="C,H,W",
    multiple=True,
    help="Input shape when it cannot be inferred. Repeated: further shapes that the file is for, quantized as the first.",
)


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say how to load a model; shared by every verb that takes one."""
    return _source_options(function, _SHAPE)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a model that is compiled, maybe for several shapes."""
    return _source_options(function, _SHAPES)


def _source_options(function: Callable[..., Any], shape: Callable[..., Any]) -> Callable[..., Any]:
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
        shape,
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
            type=OneOf(["float16", "bfloat16", "float32"]),
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
