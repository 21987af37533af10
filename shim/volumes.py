"""What a pod's containers share and the pod takes with it: /dev/shm and its empty directories.

A container's memory maps files there, and no client saves them: with the memory alone a restore
would find them missing. So they go into the image directory, one tar for each, at the instant of
the dump, and are put back once for each new pod, by the first of its containers that is restored.
Volumes that outlive the pod are nobody's here.
"""

from __future__ import annotations

import os

from shim import cri, places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_EMPTY_DIRECTORY = "/volumes/kubernetes.io~empty-dir/"
"""In the path of each on its node (kubelet: pkg/volume/emptydir)."""


class VolumeError(Exception):
    """A volume was not saved, or not put back; the message says which."""


def of(spec: dict[str, Any]) -> dict[str, str]:
    """The pod's own volumes in a specification: destination -> directory on the node."""
    sandbox = cri.sandbox_id(spec.get("annotations") or {})
    found = {}
    for mount in spec.get("mounts") or []:
        source, destination = str(mount.get("source", "")), str(mount.get("destination", ""))
        shared_memory = destination == "/dev/shm" and sandbox and f"/{sandbox}/" in source
        if shared_memory or _EMPTY_DIRECTORY in source:
            found[destination] = source
    return found


def save(spec: dict[str, Any], images: str, timeout: float) -> None:
    """Packs each volume that is not empty into the directory `images`, within `timeout` seconds
    each. The container is frozen; what others write meanwhile is as it happens to be read. Sockets
    are left out, as in any tar: CRIU makes those anew. Raises VolumeError."""
    import subprocess

    for destination, source in of(spec).items():
        if not os.path.isdir(source) or not os.listdir(source):
            continue
        target = os.path.join(images, _name(destination))
        words = ["--create", "--sparse", "--numeric-owner", "--warning=none"]
        try:
            done = subprocess.run(
                ["tar", *words, f"--file={target}", f"--directory={source}", "."],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise VolumeError(
                f"the volume {destination} ({source}) was not saved: {error}"
            ) from error
        if done.returncode > 1:  # 1: a file changed while it was read
            reason = done.stderr.decode(errors="replace").strip()
            raise VolumeError(f"the volume {destination} ({source}) was not saved: {reason}")


def put_back(
    spec: dict[str, Any], images: str, filled: set[str], limits: tuple[int, int]
) -> list[str]:
    """Unpacks the saved volumes into those that the new container has at the same places, unless
    they are among those `filled` before; adds to these. `limits`, answer and errors are those of
    `rootfs_diff.apply`."""
    from shim import rootfs_diff

    left_out = []
    for destination, source in of(spec).items():
        tar = os.path.join(images, _name(destination))
        if os.path.exists(tar) and source not in filled:
            left_out += rootfs_diff.apply(tar, source, limits=limits, python=places.python())
            filled.add(source)
    return left_out


def _name(destination: str) -> str:
    """A plain file's name that tells the destination: checkpoints are flat."""
    from urllib.parse import quote

    return f"volume-{quote(destination, safe='')}.tar"
