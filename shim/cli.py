"""The command line of `containerd-shim-grit-v1`.

It hands one invocation over to `start`, `delete` or the inner shim, and turns whatever is
raised there into a line for containerd's log. It must import nothing that `delete`, which
runs at every task's end, does not need.
"""

from __future__ import annotations

import sys

from shim.invocation import Invocation, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """\
usage: containerd-shim-grit-v1 [flags] [start|delete]

A containerd runtime shim that checkpoints and restores containers with GPUs. containerd
starts it; nobody needs to run it by hand. Flags: -namespace -address -publish-binary -id
-bundle -socket -debug -info -v"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one invocation; returns the exit status.

    Standard output belongs to the answer containerd reads (for `start`, standard error
    too: containerd 1.6 binary.go joins both), so nothing else may ever be printed.
    """
    try:
        call = Invocation(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"containerd-shim-grit-v1: {error}\n{USAGE}", file=sys.stderr)
        return 2
    if call.on("v"):
        from shim import __version__

        print(f"containerd-shim-grit-v1:\n  Version:  {__version__}")
        return 0
    if call.on("h") or call.on("help"):
        print(USAGE)
        return 0
    try:
        if call.on("info"):
            from shim.inner import exec_info

            return exec_info(call.argv)
        if not call.get("namespace"):
            raise UsageError("shim namespace cannot be empty")
        if call.action == "start":
            from shim.start import run as start

            start(call)
        if call.action == "delete":
            from shim.delete import run as delete

            return delete(call)
        raise UsageError(f"no such action: {call.action!r}; containerd uses start and delete")
    except Exception as error:  # the one place where a failure becomes containerd's message
        print(f"containerd-shim-grit-v1: {error}", file=sys.stderr)
        return 1
