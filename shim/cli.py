"""The command line of `containerd-shim-grit-v1`.

containerd calls a shim with flags in Go's style and at most one action (facts:
containerd 1.6 runtime/v2/shim/util.go, 2.1 pkg/shim/shim.go). This file reads those
flags and hands over; it must import nothing that `delete`, which runs at every task's
end, does not need.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SWITCHES = frozenset({"debug", "v", "info", "h", "help"})
_VALUES = frozenset({"namespace", "address", "publish-binary", "id", "bundle", "socket"})

USAGE = """\
usage: containerd-shim-grit-v1 [flags] [start|delete]

A containerd runtime shim that checkpoints and restores containers with GPUs. containerd
starts it; nobody needs to run it by hand. Flags: -namespace -address -publish-binary -id
-bundle -socket -debug -info -v"""


class UsageError(Exception):
    """A command line no containerd would send."""


class Invocation:
    """One parsed call: `flags` by name, the `action` ("start", "delete" or ""), and `argv`
    as it came, to be repeated to the stock shim word for word."""

    __slots__ = ("action", "argv", "flags")

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = list(argv)
        self.flags: dict[str, str] = {}
        self.action = ""
        words = iter(self.argv)
        for word in words:
            if not word.startswith("-"):
                self.action = word
                break
            name, equals, value = word.lstrip("-").partition("=")
            if name in _SWITCHES:
                self.flags[name] = value or "true"
            elif name in _VALUES:
                try:
                    self.flags[name] = value if equals else next(words)
                except StopIteration:
                    raise UsageError(f"flag -{name} needs a value") from None
            else:
                raise UsageError(f"flag provided but not defined: -{name}")

    def get(self, flag: str) -> str:
        """The flag's value, "" if it was not given."""
        return self.flags.get(flag, "")

    def on(self, switch: str) -> bool:
        return self.flags.get(switch, "false") not in ("false", "0")


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

            return start(call)
        if call.action == "delete":
            from shim.delete import run as delete

            return delete(call)
        raise UsageError(f"no such action: {call.action!r}; containerd uses start and delete")
    except Exception as error:  # the one place where a failure becomes containerd's message
        print(f"containerd-shim-grit-v1: {error}", file=sys.stderr)
        return 1
