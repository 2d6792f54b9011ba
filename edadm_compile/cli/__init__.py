"""Command line: parse, call the library, print. No logic of its own; one module for each verb."""

from __future__ import annotations

import warnings

import click

from edadm_compile.cli.bench import bench
from edadm_compile.cli.compile import compile
from edadm_compile.cli.evaluate import evaluate
from edadm_compile.cli.example import example
from edadm_compile.cli.export import export
from edadm_compile.cli.inspect import inspect
from edadm_compile.cli.sample import sample
from edadm_compile.cli.target import target
from edadm_compile.cli.tune import tune
from edadm_compile.cli.verify import verify

_VERSION = "0.1.0"


class DefaultCompile(click.Group):
    """A group whose default verb is ``compile``: ``edadm-compile model.pt ...`` works as it reads."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``compile`` in front unless a verb or a group option comes first."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["compile", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultCompile, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_VERSION, prog_name="edadm-compile")
def main() -> None:
    """Compile trained diffusion UNets to integer programs, quantized with EDA-DM.

    The default verb is compile: edadm-compile model.pt --w4a8 -o unet.qmod
    """
    # Deprecations inside torch and diffusers are not the user's to act on.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


for _verb in (compile, inspect, target, export, sample, verify, evaluate, bench, tune, example):
    main.add_command(_verb)
