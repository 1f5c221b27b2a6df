"""`kleinctl completion`"""

from __future__ import annotations

import os
from pathlib import Path

import click

from kleinctl.cli import output
from kleinctl.problem import OK

LINES = {
    "bash": 'eval "$(_KLEINCTL_COMPLETE=bash_source kleinctl)"',
    "zsh": 'eval "$(_KLEINCTL_COMPLETE=zsh_source kleinctl)"',
    "fish": "_KLEINCTL_COMPLETE=fish_source kleinctl | source",
}
FILES = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}


@click.command("completion", short_help="Print the line that completes commands in your shell.")
@click.argument("shell", type=click.Choice(sorted(LINES)), required=False)
def command(shell: str | None) -> int:
    """Print the line that completes commands in your shell."""
    shell = shell or Path(os.environ.get("SHELL", "bash")).name
    shell = shell if shell in LINES else "bash"
    output.answer(LINES[shell])
    output.remark(f"add it to {FILES[shell]}")
    return OK
