"""Verb ``completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from edadm_compile.cli.options import OneOf, guarded, output_options, print_json

_PROGRAM, _VARIABLE = "edadm-compile", "_EDADM_COMPILE_COMPLETE"


@click.command(
    epilog="""\b
bash: edadm-compile completion bash > ~/.local/share/bash-completion/completions/edadm-compile
zsh:  edadm-compile completion zsh > DIR/_edadm-compile, DIR being one of $fpath
fish: edadm-compile completion fish > ~/.config/fish/completions/edadm-compile.fish
"""
)
@click.argument("shell", type=OneOf(["bash", "zsh", "fish"]))
@output_options("Nothing but the script, as without it.")
@guarded
def completion(shell: str, quiet: bool, verbose: bool, as_json: bool) -> None:
    """Print the completion script of SHELL: bash, zsh or fish."""
    from edadm_compile.cli import main

    found = get_completion_class(shell)
    assert found is not None  # click has all three
    script = found(main, {}, _PROGRAM, _VARIABLE).source()
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)
