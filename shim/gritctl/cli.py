"""The command line of `gritctl`: finds the subcommand, and turns whatever is raised there into one
line for the person who typed it and an exit status. Subcommands are imported when they are used.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from shim import __version__
from shim.gritctl.interrupts import Interrupted

FAILED = 1
USAGE = 2
"""click's own, for a command line that cannot be."""
NO = 3
"""The question was answered, and the answer is no: damaged, a checkpoint cannot work."""
NOT_HERE = 4
"""The checkpoint is whole, but cannot be restored on this node."""
INTERRUPTED = 130

COMMANDS = {
    "checkpoint": "checkpoint:command",
    "restore": "restore:command",
    "migrate": "migrate:command",
    "receive": "receive:command",
    "suspend": "suspend:suspend",
    "resume": "suspend:resume",
    "doctor": "doctor:command",
    "ls": "ls:command",
    "show": "show:command",
    "verify": "verify:command",
    "diff": "diff:command",
    "compare": "compare:command",
    "rm": "rm:command",
    "prune": "prune:command",
    "completion": "completion:command",
}
"""Each subcommand: the module of this package and its function, in the order help shows them."""


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name].partition(":")
        found = importlib.import_module(f"shim.gritctl.{module}")
        command: click.Command = getattr(found, function)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1) if args else []
            if not close or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean {close[0]!r}?", ctx) from None


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", prog_name="gritctl")
def gritctl() -> None:
    """Checkpoints of containers, GPU memory included: take them, look at them, restore them.

    \b
    gritctl checkpoint job --to /var/lib/checkpoints/job   save the container job
    gritctl ls                                             what checkpoints there are
    gritctl show /var/lib/checkpoints/job                  what is in one
    gritctl verify /var/lib/checkpoints/job                whether it is whole
    gritctl restore /var/lib/checkpoints/job --name job2   and bring it back

    `gritctl COMMAND --help` explains each by example.

    \b
    Exit status: 0 done, 1 failed, 2 wrong command line, 3 damaged, or the answer
    is no, 4 whole but not restorable on this node, 130 interrupted and undone.
    """


def main() -> int:
    """Runs one command; returns the exit status."""
    try:
        done = gritctl.main(prog_name="gritctl", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("gritctl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `gritctl ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except Interrupted as error:
        print(f"gritctl: {error}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("GRITCTL_DEBUG"):
            raise
        print(f"gritctl: {_told(error)}", file=sys.stderr)
        return FAILED
    return done if isinstance(done, int) else 0


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if type(error).__module__.startswith("shim.") and str(error):
        return str(error)
    return (
        f"{type(error).__name__}: {error}. This is a mistake in gritctl; "
        "GRITCTL_DEBUG=1 shows where"
    )


if __name__ == "__main__":
    sys.exit(main())
