"""Puts a checkpoint's `rootfs-diff.tar` onto a container's mounted root file system.

The unpacking is done by a process of its own (`oci_layer`), which goes into the root file system
for good; the shim itself must never open a path of an archive or of a container.
"""

from __future__ import annotations


class DiffError(Exception):
    """The diff was not applied, or not all of it: the container must not be started."""


def apply(
    tar: str,
    rootfs: str,
    *,
    limits: tuple[int, int] = (0, 0),
    python: str | None = None,
    timeout: float = 600.0,
) -> list[str]:
    """Unpacks the layer `tar` (plain, gzip or zstd) onto the directory `rootfs`; at most so many
    bytes and so many files as the `limits` say, 0 for what is free.

    Returns a line for each thing left out, such as attributes the file system does not have, or
    device nodes. Raises DiffError naming the entry and the reason, also if it takes longer than
    `timeout` seconds. `python` is the interpreter to run, this process's own by default.
    """
    import os
    import subprocess
    import sys

    failed = f"cannot apply {tar} to {rootfs}"
    half = "the root file system is left half changed: do not start the container"
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "oci_layer.py")
    paths = [os.path.abspath(tar), os.path.abspath(rootfs)]
    command = [python or sys.executable, "-I", program, *paths, *map(str, limits)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            encoding="utf-8",
            errors="backslashreplace",
            env={"LC_ALL": "C.UTF-8"},
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DiffError(f"{failed}: not done after {timeout:g} s; {half}") from None
    except OSError as error:
        raise DiffError(f"{failed}: cannot run {command[0]}: {error.strerror}") from error
    if done.returncode < 0:
        raise DiffError(f"{failed}: killed by signal {-done.returncode}; {half}")
    if done.returncode != 0:
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        raise DiffError(f"{failed}: {reason}; {half}")
    return done.stdout.splitlines()
