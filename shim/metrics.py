"""Counters and histograms for Prometheus, in a file for node_exporter's textfile collector.

The node's shims come and go with their pods, so the counts live in one file that each adds to
under a lock: `<directory>/grit.prom`, replaced in one step. Nothing here may fail or hold up a
task: a lock that is not to be had within a second costs the count. No port is opened.
"""

from __future__ import annotations

import fcntl
import os
import time

from shim import log

FILE = "grit.prom"
BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds in seconds: from a lock of a small process to the copy of a full node."""

_HELP = (
    ("grit_operations_total", "counter", "Operations on containers, and how they ended."),
    ("grit_operation_seconds", "histogram", "How long whole operations took, in seconds."),
    ("grit_phase_seconds", "histogram", "How long the phases of operations took, in seconds."),
    ("grit_device_bytes_total", "counter", "Bytes of GPU memory copied to the host."),
    ("grit_image_bytes_total", "counter", "Bytes of whole checkpoints written."),
)
_WAIT_SECONDS = 1.0
_LARGEST = 1 << 20


def record(
    directory: str,
    operation: str,
    result: str,
    seconds: float,
    phases: dict[str, float],
    sizes: dict[str, int],
) -> None:
    """Adds one operation (`result` is "ok" or "failed") with the seconds of its phases and the
    bytes it moved (`sizes` by "device" and "image"). Never raises; what cannot be counted is
    logged."""
    try:
        lock = _lock(os.path.join(directory, f".{FILE}.lock"))
        try:
            path = os.path.join(directory, FILE)
            values = _read(path)
            _add(values, f'grit_operations_total{{operation="{operation}",result="{result}"}}', 1)
            _observe(values, "grit_operation_seconds", f'operation="{operation}"', seconds)
            for phase, took in phases.items():
                _observe(values, "grit_phase_seconds", f'phase="{phase}"', took)
            for what, count in sizes.items():
                _add(values, f"grit_{what}_bytes_total", count)
            _write(path, values)
        finally:
            os.close(lock)
    except (OSError, ValueError) as error:
        log.warning("an operation was not counted", at=directory, error=error)


def _lock(path: str) -> int:
    """Raises TimeoutError (an OSError) where others hold it for longer than they ever should."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    ends = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > ends:
                os.close(fd)
                raise TimeoutError(f"{path} is locked by others") from None
            time.sleep(0.01)
        except BaseException:
            os.close(fd)
            raise


def _read(path: str) -> dict[str, float]:
    """The values so far, by their names with labels. What is no such file is begun anew."""
    values: dict[str, float] = {}
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST)
    except FileNotFoundError:
        return values
    try:
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, number = line.rpartition(" ")
                values[name] = float(number)
    except ValueError:
        log.warning("was not what grit writes, and is begun anew", at=path)
        return {}
    return values


def _observe(values: dict[str, float], name: str, label: str, seconds: float) -> None:
    for bound in BUCKETS:
        _add(values, f'{name}_bucket{{{label},le="{bound:g}"}}', 1 if seconds <= bound else 0)
    _add(values, f'{name}_bucket{{{label},le="+Inf"}}', 1)
    _add(values, f"{name}_sum{{{label}}}", seconds)
    _add(values, f"{name}_count{{{label}}}", 1)


def _add(values: dict[str, float], name: str, amount: float) -> None:
    values[name] = values.get(name, 0.0) + amount


def _write(path: str, values: dict[str, float]) -> None:
    lines = []
    for family, kind, text in _HELP:
        series = [name for name in values if name.startswith(family)]
        if series:
            lines += [f"# HELP {family} {text}", f"# TYPE {family} {kind}"]
            lines += [f"{name} {values[name]:.15g}" for name in series]
    draft = f"{path}.{os.getpid()}"  # the collector reads *.prom and nothing else
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        os.rename(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
