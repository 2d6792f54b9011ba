"""Verb ``completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from edadm_compile.cli.options import OneOf

_PROGRAM, _VARIABLE = "edadm-compile", "_EDADM_COMPILE_COMPLETE"


@click.command(
    epilog="""\b
bash: edadm-compile completion bash > ~/.local/share/bash-completion/completions/edadm-compile
zsh:  edadm-compile completion zsh > DIR/_edadm-compile, DIR being one of $fpath
fish: edadm-compile completion fish > ~/.config/fish/completions/edadm-compile.fish
"""
)
@click.argument("shell", type=OneOf(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL: bash, zsh or fish."""
    from edadm_compile.cli import main

    found = get_completion_class(shell)
    assert found is not None  # click has all three
    click.echo(found(main, {}, _PROGRAM, _VARIABLE).source())
