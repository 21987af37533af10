"""The daemon's log lines, in logfmt as containerd writes its own, down the log fifo that
containerd drains into its journal. Writing must never block or fail a task: while
containerd is down the fifo fills, and a line is lost rather than a pod held up.
"""

from __future__ import annotations

import os
import time

_fd = 2


def open_fifo(path: str) -> None:
    """Sends all further lines, and whatever else is written to standard output or error,
    down the fifo at `path` (the bundle's `log`, held open by containerd)."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # no reader now: keep /dev/null
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def info(message: str, **fields: object) -> None:
    _write("info", message, fields)


def warning(message: str, **fields: object) -> None:
    _write("warning", message, fields)


def error(message: str, **fields: object) -> None:
    _write("error", message, fields)


def _write(level: str, message: str, fields: dict[str, object]) -> None:
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    words = [f'time="{moment}"', f"level={level}", f"msg={_quoted(message)}", "runtime=grit"]
    words += [f"{key}={_quoted(str(value))}" for key, value in fields.items()]
    try:
        os.write(_fd, (" ".join(words) + "\n").encode(errors="replace"))
    except OSError:
        pass  # a full or readerless fifo costs the line, nothing else


def _quoted(text: str) -> str:
    if text and not any(c in ' "=\\\n' or ord(c) < 32 for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
