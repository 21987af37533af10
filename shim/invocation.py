"""One call of the shim's binary by containerd: flags in Go's style and at most one action
(facts: containerd 1.6 runtime/v2/shim/util.go, 2.1 pkg/shim/shim.go)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SWITCHES = frozenset({"debug", "v", "info", "h", "help"})
_VALUES = frozenset(
    {"namespace", "address", "publish-binary", "id", "bundle", "socket", "debug-socket"}
)


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
