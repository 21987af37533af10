"""CRIU's surroundings: its environment, and its configuration file.

What the RPC has no field for (the plugin directory) and what `runc restore` passes no flag for
(TCP connections, file locks, external mounts) reaches CRIU only this way. A configuration file
overrides the RPC, in the order of its lines (criu/cr-service.c, criu/config.c).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Option = tuple[str, str | None]

# CRIU loads every *.so of its plugin directory; in this one there are none.
NO_PLUGINS = os.path.dirname(os.path.abspath(__file__))


def environment(
    *,
    plugins: str = NO_PLUGINS,
    commands: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """An environment for `Swrk`: ours, with CRIU's plugins from the directory `plugins`, the
    commands in the directory `commands` found first (`cuda-checkpoint`), and `extra`.

    A `libdir` in CRIU's own default configuration or in the file of a request wins over
    `plugins`.
    """
    env = dict(os.environ)
    env["CRIU_LIBS_DIR"] = plugins
    if commands is not None:
        env["PATH"] = os.pathsep.join([commands, env.get("PATH", os.defpath)])
    env.update(extra or {})
    return env


def file_text(options: Iterable[Option], base: str | None = None) -> str:
    """The text of a configuration file: what stands in the file `base` (it may be missing, as
    CRIU allows), then `options`: ("libdir", "/usr/lib/criu"), ("tcp-established", None).

    The names are those of CRIU's command line without the dashes. Raises ValueError for a
    value that the format cannot hold, OSError where `base` is there but cannot be read.
    """
    text = ""
    if base is not None:
        try:
            with open(base, encoding="utf-8", errors="surrogateescape") as file:
                text = file.read()
        except FileNotFoundError:
            pass
        if text and not text.endswith("\n"):
            text += "\n"
    return text + "".join(_line(name, value) for name, value in options)


def _line(name: str, value: str | None) -> str:
    if value is None:
        return f"{name}\n"
    # A "#" begins a comment even within quotes; a backslash only ever escapes a quote.
    if not value or any(c in value for c in '#\n"\\'):
        raise ValueError(f"CRIU's configuration file cannot hold {name} {value!r}")
    return f'{name} "{value}"\n' if any(c.isspace() for c in value) else f"{name} {value}\n"
