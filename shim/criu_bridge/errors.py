"""What CRIU meant: its first error line out of a log, and plain words for the errors people meet.

It reads text and returns text. It must never decide what to do about an error: that is the
caller's.
"""

from __future__ import annotations

import os
import re


class CriuError(Exception):
    """A request to CRIU failed.

    `log_path`: CRIU's log, where it wrote one; `first_error`: the first error line in it;
    `died`: CRIU ended without an answer (killed, crashed, or killed by us on a deadline);
    `refrozen`: after it the freezer is what it was before (None where there is no freezer).
    """

    def __init__(
        self,
        message: str,
        *,
        log_path: str | None = None,
        first_error: str | None = None,
        errno: int = 0,
        died: bool = False,
        refrozen: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.log_path = log_path
        self.first_error = first_error
        self.errno = errno
        self.died = died
        self.refrozen = refrozen


# A CRIU log line is "(seconds.micros) [pid: ]Error (file.c:line): text"; the first lines of a
# process that could not read its options lack the time.
_ERROR = re.compile(
    r"^(?:\(\d+\.\d+\)\s+)?(?:pie: )?(?:\d+: )?(Error \([^)]*\): .*)$", re.MULTILINE
)

# Lines that CRIU calls errors and goes on after: it tries for more descriptors than a process
# without CAP_SYS_RESOURCE may have (util.c), once after boot for a tun device (kerndat.c), and its
# CUDA plugin asks about every process, most of which are none of its business (cuda_plugin.c).
_HARMLESS = re.compile(
    r"rlimit: Can't setup RLIMIT_NOFILE|tun: Unable to create tun"
    r"|cuda_plugin: Failed to launch cuda-checkpoint to retrieve restore tid: .*: no CUDA"
)

# The part of a log that is read: errors come at the end, yet the first of them may precede
# megabytes of clean-up lines.
LOG_LIMIT = 8 << 20


def read_log(path: str) -> str:
    """The log's text, "" where there is none; at most the last LOG_LIMIT bytes."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LOG_LIMIT:
                file.seek(size - LOG_LIMIT)
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def error_lines(log_text: str) -> list[str]:
    """Every error line of a log, without its time and pid, but for those known as harmless."""
    lines = [match.group(1).rstrip() for match in _ERROR.finditer(log_text)]
    return [line for line in lines if not _HARMLESS.search(line)]


def first_error(log_text: str) -> str | None:
    lines = error_lines(log_text)
    return lines[0] if lines else None


# In this order: the cause before its consequences. The patterns are wordings of CRIU 4.0 to 4.2,
# in the file named above each.
_EXPLANATIONS: tuple[tuple[str, str], ...] = (
    # any writer
    (
        r"No space left on device|Disk quota exceeded",
        "the file system of the image directory is full: free space or choose another directory",
    ),
    # plugins/cuda/cuda_plugin.c
    (
        r"PAUSE_DEVICES failed",
        (
            "the CUDA driver did not grant the lock in time: work was still in flight on the GPU, "
            "or the process was frozen and could not answer; raise the lock timeout"
        ),
    ),
    (
        r"cuda_plugin: ",
        "CRIU's CUDA plugin failed: cuda-checkpoint is missing, refused or failed",
    ),
    # criu/image.c
    (
        r"Missing required plugin",
        (
            "the images were made with a CRIU plugin that is not loaded here: point libdir (or "
            "CRIU_LIBS_DIR) at the directory that holds it"
        ),
    ),
    # criu/files.c; 195 is the character major registered for NVIDIA
    (
        r"/dev/nvidia|\(chr 195:\d+\)",
        (
            "a process still holds the GPU's device files: its CUDA state was not suspended before "
            "the dump (or it uses the GPU without CUDA, which cannot be checkpointed)"
        ),
    ),
    (
        r"io_uring",
        "a process uses io_uring, which CRIU cannot dump: switch it off in the application",
    ),
    (
        r"of that type \[20\d+\] \(chr \d+:\d+\)|Can't handle non-regular mapping",
        (
            "a process holds a device file that CRIU cannot dump (nvidia-uvm also looks like this: "
            "then its CUDA state was not suspended before the dump)"
        ),
    ),
    # criu/sk-inet.c
    (
        r"Connected TCP socket",
        "the container has open TCP connections: allow them with the option tcp_established",
    ),
    # criu/sockets.c, before 4.2: the kernel answers 16, SO_PASSCRED, for unix sockets only
    (
        r"Can't get 1:16 opt",
        "this CRIU cannot dump network sockets on kernels from 6.16: use CRIU 4.2 or later",
    ),
    (
        r"inet: In-flight connection",
        "a TCP connection is being set up just now: try again, or allow tcp_skip_in_flight",
    ),
    # criu/sk-unix.c
    (
        r"External socket (?:is used|found in image)",
        (
            "a unix socket has its other end outside the container (in another of its pod, say): "
            "the option ext_unix_sk allows it, but for stream sockets"
        ),
    ),
    (
        r"Can't dump half of stream unix connection",
        (
            "a unix stream socket is connected to a process outside the container, which no option "
            "allows: the application must close it first"
        ),
    ),
    # criu/file-lock.c
    (
        r"Some file locks are hold",
        "a process holds file locks: allow them with the option file_locks",
    ),
    # criu/files-reg.c
    (
        r"Can't dump ghost file .* increase limit",
        "a deleted file that is still open is larger than the ghost file limit: raise ghost_limit",
    ),
    # criu/mount.c
    (
        r"doesn't have a proper root mount|FS mnt .* unsupported id",
        (
            "a mount of the container comes from outside its root file system and was not declared "
            "as external"
        ),
    ),
    (
        r"No mapping for .* mountpoint",
        "the images expect an external mount that the container to be restored does not have",
    ),
    # criu/ipc_ns.c
    (
        r"Failed to create (?:shm|msg|sem) set",
        (
            "the pod has these SysV objects already: the images of each of its containers hold all "
            "of the pod's, so that only the first container can be restored, and only once in a pod"
        ),
    ),
    # criu/namespaces.c
    (
        r"Can't dump nested pid namespace",
        "a process is in a pid namespace of its own within the container, which CRIU cannot dump",
    ),
    # criu/tty.c, criu/pstree.c
    (
        r"Found dangling tty|is not a session leader",
        "a terminal or session lies outside the container: allow it with the option terminal",
    ),
    # criu/seize.c, criu/cr-dump.c
    (
        r"incompatible with the freezer cgroup|Unable to freeze cgroup|Timeout reached",
        "the processes could not all be stopped in time",
    ),
)


def explain(log_text: str) -> str | None:
    """Plain words for the first known error of a log (or of one error line), else None.

    Only error lines are looked at where there are any: a log also mentions /dev/nvidia0 or
    io_uring while nothing is wrong with them.
    """
    lines = error_lines(log_text) or [log_text]
    for pattern, words in _EXPLANATIONS:
        if any(re.search(pattern, line) for line in lines):
            return words
    return None
