"""The inner shim: the stock `containerd-shim-runc-v2` that does everything but checkpoints.

This file finds it, starts it beside us without a clash over address, log or group, and
hands it the invocations that are its own business (`-info`, `delete`). It never speaks
ttrpc; the daemon does that.
"""

from __future__ import annotations

import os
import sys

from shim import places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "containerd-shim-runc-v2"

_LAUNCHER_BYTES = 4096  # more than our command has; two programs that agree in them are one


class InnerError(Exception):
    """The stock shim is missing or refused to start."""


def find(publish_binary: str = "") -> str:
    """The stock shim's path: beside containerd's own binary first, since 1.x and 2.x shims
    speak different protocol versions and must match the running containerd; then PATH.

    Raises InnerError naming every place looked at.
    """
    folders = [os.path.dirname(publish_binary)] if os.path.isabs(publish_binary) else []
    folders += [folder for folder in os.environ.get("PATH", "").split(":") if folder]
    for folder in folders:
        candidate = os.path.join(folder, NAME)
        if os.access(candidate, os.X_OK) and not _is_grit(candidate):
            return candidate
    raise InnerError(
        f"{NAME} not found in {':'.join(folders) or 'an empty PATH'}: grit runs containers "
        "through containerd's stock shim; install it (Debian: package containerd)"
    )


def _is_grit(binary: str) -> bool:
    """Whether it is ourselves, as a link or a copy: grit may go by the stock shim's name, first
    in PATH, and would start itself for ever."""
    try:
        with open(binary, "rb") as file, open(sys.argv[0], "rb") as ours:
            return file.read(_LAUNCHER_BYTES) == ours.read(_LAUNCHER_BYTES)
    except OSError:
        return False


def begin_start(binary: str, argv: Sequence[str], group: str, options: bytes) -> tuple[int, int]:
    """Runs the stock shim's own `start` with the group directory as its working directory;
    returns its pid and the descriptor from which `answer` reads what it prints.

    In a directory of its own it writes its own `address`, and its sockets carry the name of
    the group annotation found in that directory's config.json (facts 1.8, recipe A).
    """
    home = os.getcwd()
    reader, writer = os.pipe()
    stdin = _memory_file(options)
    environment = dict(os.environ)
    environment["PATH"] = f"{environment.get('PATH', '')}:{places.commands()}".lstrip(":")
    try:
        os.chdir(group)
        pid = os.posix_spawn(
            binary,
            [binary, *argv],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stdin, 0),
                (os.POSIX_SPAWN_DUP2, writer, 1),
                (os.POSIX_SPAWN_DUP2, writer, 2),
            ],
            setpgroup=0,
        )
    finally:
        os.chdir(home)
        os.close(stdin)
        os.close(writer)
    return pid, reader


def answer(pid: int, reader: int) -> str:
    """What `begin_start` began, at its end: the answer word for word, a plain address or JSON.
    Raises InnerError with what was printed if it fails."""
    from shim import bundle

    with open(reader, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read().strip()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0 or not bundle.address_in(said).startswith("unix://"):
        raise InnerError(f"{NAME} start failed with status {status}: {said or 'no output'}")
    return said


def exec_info(argv: Sequence[str]) -> int:
    """Becomes `containerd-shim-runc-v2 -info` (containerd 2.x asks for the runtime's features
    this way), with the options on standard input in the form the stock shim can decode."""
    from shim import options

    stdin = _memory_file(options.for_inner(_read_stdin()))
    os.dup2(stdin, 0)
    return _exec(find(), argv)


def exec_delete(argv: Sequence[str], publish_binary: str) -> int:
    """Becomes the stock `delete`: same arguments, directory and environment, so that its
    answer and containerd's 5 s kill are its own."""
    return _exec(find(publish_binary), argv)


def _exec(binary: str, argv: Sequence[str]) -> int:
    sys.stdout.flush()
    os.execv(binary, [binary, *argv])
    return 127  # never reached; keeps the callers' types honest


def _read_stdin() -> bytes:
    with open(0, "rb", closefd=False) as stdin:
        return stdin.read()


def read_options() -> bytes:
    """What containerd put on standard input of `start`: a protobuf Any, or nothing."""
    try:
        return _read_stdin()
    except OSError:
        return b""


def _memory_file(content: bytes) -> int:
    fd = os.memfd_create("options")
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
