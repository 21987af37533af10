"""Where things lie on a node: the run directory of a group of tasks, the interpreter with
our dependencies, the private directory of commands. Names only; nothing is created here.
"""

from __future__ import annotations

import os
import sys

try:
    from _sha2 import sha256  # type: ignore[import-not-found]  # hashlib loads OpenSSL: 4 ms
except ImportError:  # before Python 3.12
    from hashlib import sha256

RUN = "/run/containerd/grit"
"""Groups of tasks, one directory each; a tmpfs, so nothing outlives a reboot."""

SOCKETS = "/run/containerd/s"
"""Where every shim's socket lies; compiled into containerd (2.1 pkg/shim/util_unix.go)."""

INTENTS = "/run/containerd/grit-intents"
"""What the node's agent and the shims tell each other of Restores (shim/intents.py). The agent
makes it, root's alone; without an agent it is not there."""

ANNOUNCED = "/run/containerd/grit-announced"
"""Where clients say, before a Pause, which image directory its Checkpoint is going to name
(shim/announced.py)."""

FAILURES = "/var/log/containerd-shim-grit"
"""CRIU's logs of failed restores: the bundle that held them goes with the task."""


def socket_of(address: str) -> str:
    """The file behind an address of the form `unix:///run/containerd/s/<hash>`."""
    return address.removeprefix("unix://")


def debug_socket(containerd: str, namespace: str, grouping: str) -> str:
    """Where the stock shim of containerd 2.x listens for its profiler's user if it was given
    -debug (2.1 pkg/shim/util_unix.go)."""
    return hashed_socket(containerd, namespace, grouping, "debug")


def hashed_socket(*words: str) -> str:
    """The socket whose name is the hash of words joined as a path, as all shims name theirs."""
    return os.path.join(SOCKETS, sha256(os.path.join(*words).encode()).hexdigest())


def group_directory(address: str) -> str:
    """The run directory of the group served at `address`: found from the address alone, so
    that `delete` finds it with nothing but the bundle in hand."""
    return os.path.join(RUN, os.path.basename(socket_of(address)))


def environment_root() -> str:
    """The virtual environment this package was installed in (`make install` makes it), or
    the one that runs us from a checkout."""
    package = os.path.dirname(os.path.abspath(__file__))
    root = os.path.normpath(os.path.join(package, "../../../.."))
    return root if os.path.exists(os.path.join(root, "pyvenv.cfg")) else sys.prefix


def python() -> str:
    """The interpreter for helper processes, which may use our dependencies (cffi)."""
    candidate = os.path.join(environment_root(), "bin", "python")
    return candidate if os.access(candidate, os.X_OK) else sys.executable


def commands() -> str:
    """The private directory that holds our `cuda-checkpoint`."""
    return os.path.join(environment_root(), "libexec")
