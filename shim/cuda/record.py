"""The file by which the plugin engine tells our `cuda-checkpoint` what it must not ask the driver.

CRIU's CUDA plugin asks about processes while their cgroup is frozen (4.1: about the root task),
where the driver would never answer; the shim has locked them before and knows. JSON:

    {"processes": {"<pid>": {"restore_tid": 7, "state": "locked"}},
     "library": "<libcuda or "">", "nvidia_command": "<path or "">", "timeout": <seconds>}

`timeout` is how long one action may take. Replaced whole by rename, under a lock on the directory.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.cuda.suspension import Suspension

VARIABLE = "GRIT_CUDA_RECORD"  # the environment variable that holds the file's path


def write(path: str, suspension: Suspension, *, nvidia_command: str, timeout: float) -> None:
    """Writes the record of a suspension to `path`."""
    _replace(
        path,
        {
            "processes": {
                str(process.pid): {"restore_tid": process.restore_tid, "state": process.state}
                for process in suspension.processes
            },
            "library": suspension.library,
            "nvidia_command": nvidia_command,
            "timeout": timeout,
        },
    )


def read(path: str) -> Any:
    """The record. Raises OSError, ValueError."""
    import json

    with open(path, encoding="utf-8") as file:
        return json.load(file)


def find(record: Any, pid: int) -> Any:
    """The entry for a pid, or for a restore thread: CRIU asks the state of that. None: no CUDA."""
    processes = record["processes"]
    for key, entry in processes.items():
        if pid in (int(key), entry["restore_tid"]):
            return entry
    return None


def update(path: str, pid: int, state: str) -> None:
    """Notes the state that an action led to."""
    import fcntl

    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        record = read(path)
        find(record, pid)["state"] = state
        _replace(path, record)
    finally:
        os.close(directory)


def _replace(path: str, record: Any) -> None:
    import json

    draft = f"{path}.{os.getpid()}"
    with open(draft, "w", encoding="utf-8", opener=_private) as file:
        json.dump(record, file)
    os.replace(draft, path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
