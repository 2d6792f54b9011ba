"""Command line: parse, call the library, print. No logic of its own; one module for each verb."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from edadm_compile import __version__
from edadm_compile.cli.bench import bench
from edadm_compile.cli.compile import compile
from edadm_compile.cli.completion import completion
from edadm_compile.cli.doctor import doctor
from edadm_compile.cli.evaluate import evaluate
from edadm_compile.cli.example import example
from edadm_compile.cli.export import export
from edadm_compile.cli.failures import calm_warning, usage_as_sentence
from edadm_compile.cli.inspect import inspect
from edadm_compile.cli.report import report
from edadm_compile.cli.sample import sample
from edadm_compile.cli.target import target
from edadm_compile.cli.tune import tune
from edadm_compile.cli.verify import verify
from edadm_compile.errors import did_you_mean

NAME = "edadm-compile"
EPILOG = (
    "Exit codes: 0 done; 2 a file, option or setting that cannot be used; 3 the model cannot be captured; 4 an illegal "
    "graph (a bug); 5 unusable calibration values; 6 a .qmod file that cannot be read or written; 7 a check failed; "
    "8 no code or no tool for a device; 9 no ONNX form; 70 an internal error (a bug); 130 interrupted."
)


class DefaultCompile(click.Group):
    """A group whose default verb is ``compile``: ``edadm-compile model.pt ...`` works as it reads."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``compile`` in front unless a verb or a group option comes first."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            if not ctx.resilient_parsing:
                self._refuse_misspelt(ctx, args[0])
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def _refuse_misspelt(self, ctx: click.Context, first: str) -> None:
        """A word that is no file but close to a verb was meant as one."""
        near = did_you_mean(first, self.commands)
        if near and not Path(first).suffix and not Path(first).exists():
            raise click.UsageError(f"{first!r} is neither a verb nor a file{near}", ctx)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As `click.Group`, with errors as sentences."""
        with usage_as_sentence():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """As `click.Group`, with errors as sentences."""
        with usage_as_sentence():
            return super().invoke(ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs and group options, and what the default verb takes in their place: its options, and files.

        Files only where no verb fits: bash's script of click forgets all other proposals when it sees a file.
        """
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            own = {item.value for item in found}
            more = compile.shell_complete(click.Context(compile, parent=ctx), incomplete)
            return [*found, *(item for item in more if item.value not in own)]
        return found or [CompletionItem(incomplete, type="file")]


@click.group(NAME, cls=DefaultCompile, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(__version__, prog_name=NAME)
def main() -> None:
    """Compile trained diffusion UNets to integer programs, quantized with EDA-DM.

    The default verb is compile: edadm-compile model.pt --w4a8 -o unet.qmod
    """
    # Deprecations inside torch and diffusers are not the user's to act on.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.showwarning = calm_warning


for _verb in (
    compile,
    inspect,
    target,
    export,
    sample,
    verify,
    evaluate,
    report,
    bench,
    tune,
    doctor,
    example,
    completion,
):
    main.add_command(_verb)
