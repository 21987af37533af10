"""`gritctl completion`: the script that makes a shell complete gritctl's words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion", short_help="make a shell complete gritctl's words")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> int:
    """Print a script with which SHELL completes subcommands, options, directories and the names
    of containers.

    \b
    Examples:
      gritctl completion bash > /etc/bash_completion.d/gritctl
      gritctl completion zsh > /usr/local/share/zsh/site-functions/_gritctl
      gritctl completion fish > /etc/fish/completions/gritctl.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = ctx.find_root().command
    print(kind(root, {}, "gritctl", "_GRITCTL_COMPLETE").source())
    return 0
