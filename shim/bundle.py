"""containerd's bundle: the one module that knows which file in it means what.

A bundle is `/run/containerd/io.containerd.runtime.v2.task/<namespace>/<id>`, made by
containerd before it calls the shim, and the shim's working directory. Sources: containerd
1.6 runtime/v2/{bundle,binary,shim}.go, 2.1 core/runtime/v2/{bundle,shim_manager}.go.
"""

from __future__ import annotations

import os

from shim import lean_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RESTORE_CONFIG = "grit-criu.conf"  # CRIU's configuration of a restore, named by an annotation
BASE_CONFIG = "grit-criu.base"  # the path of the one that the annotation named before, or nothing

RESTORE_ANNOTATION = "grit.dev/checkpoint"  # where a container is to be restored from

_GROUPING = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")


def read_spec(bundle: str) -> dict[str, Any]:
    """The container's OCI runtime specification, `config.json`.

    Raises OSError if it cannot be read, ValueError if it is not a JSON object or its annotations
    are not one.
    """
    path = os.path.join(bundle, "config.json")
    with open(path, encoding="utf-8") as file:
        try:
            spec = lean_json.loads(file.read())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise ValueError(f"{path} is not a JSON object")
    if not isinstance(spec.get("annotations") or {}, dict):
        raise ValueError(f"{path}: annotations is not a JSON object")
    return spec


def write_spec(bundle: str, spec: dict[str, Any]) -> None:
    """Replaces `config.json` in one step, keeping its mode."""
    import json

    path = os.path.join(bundle, "config.json")
    replace(path, json.dumps(spec), mode=os.stat(path).st_mode & 0o777)


def annotations_of(spec: dict[str, Any]) -> dict[str, str]:
    """The annotations of a specification; an absent or null map is an empty one."""
    return dict(spec.get("annotations") or {})


def grouping(spec: dict[str, Any], container_id: str) -> str:
    """What containers must share to share a shim (2.1 cmd/containerd-shim-runc-v2/manager):
    the first of two annotations that is set, else nothing but the container's own id."""
    notes = annotations_of(spec)
    return next((notes[key] for key in _GROUPING if notes.get(key)), container_id)


def write_address(bundle: str, answer: str) -> None:
    """Leaves the shim's address for containerd 1.6 and 1.7 to find after a restart
    (`loadShim` reads `<bundle>/address`); harmless under 2.x."""
    replace(os.path.join(bundle, "address"), answer, mode=0o600)


def read_address(bundle: str) -> str:
    """The address of the shim that serves this bundle, "" if none is recorded.

    1.x has it in `address`; 2.x in `bootstrap.json`, also for a container that joined its
    sandbox's shim without a `start` (2.1 shim_manager.go).
    """
    for name in ("bootstrap.json", "address"):
        try:
            with open(os.path.join(bundle, name), encoding="utf-8") as file:
                answer = file.read().strip()
        except (OSError, UnicodeDecodeError):
            continue
        if answer:
            return address_in(answer)
    return ""


def address_in(answer: str) -> str:
    """The address in a shim's `start` answer: JSON since protocol version 2, plain before."""
    if not answer.startswith("{"):
        return answer
    try:
        return str(lean_json.loads(answer).get("address", ""))
    except (ValueError, AttributeError):
        return ""


def criu_config_before(bundle: str, named: str | None) -> str | None:
    """The CRIU configuration file that a container's annotation named at first, where `named` is
    what it names now: of a restored container our own, whose lines are for that restore alone."""
    if named != os.path.join(bundle, RESTORE_CONFIG):
        return named
    try:
        with open(os.path.join(bundle, BASE_CONFIG), encoding="utf-8") as file:
            return file.read() or None
    except FileNotFoundError:
        return None


def init_pid(bundle: str) -> int:
    """The pid of the container's first process, 0 before its start: `init.pid`, which runc
    writes for the stock shim (2.1 cmd/containerd-shim-runc-v2/process/init.go)."""
    try:
        with open(os.path.join(bundle, "init.pid"), encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def work_directory(bundle: str) -> str:
    """The task's directory on disk, for what should outlive the tmpfs of the bundle."""
    return os.path.join(bundle, "work")


def replace(path: str, text: str, *, mode: int) -> None:
    """Writes a file so that a reader sees the old content or the new, never half of it."""
    temporary = f"{path}.{os.getpid()}.grit"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
