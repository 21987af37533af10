"""What containerd's CRI plugin says of a container, in annotations of its specification: the one
module that knows them (containerd 1.6 pkg/cri/annotations, 2.1 internal/cri/annotations).
"""

from __future__ import annotations

import os

from shim import bundle

_TYPE = "io.kubernetes.cri.container-type"
_NAME = "io.kubernetes.cri.container-name"
_IMAGE = "io.kubernetes.cri.image-name"
_SANDBOX = "io.kubernetes.cri.sandbox-id"
_NAMESPACE = "io.kubernetes.cri.sandbox-namespace"
_LOG_DIRECTORY = "io.kubernetes.cri.sandbox-log-directory"


def is_sandbox(notes: dict[str, str]) -> bool:
    """Whether this is the container that only holds a pod's namespaces. A pod's annotations reach
    it, too."""
    return notes.get(_TYPE, "container") != "container"


def container_name(notes: dict[str, str]) -> str | None:
    """The container's name in its pod, None outside of CRI."""
    return notes.get(_NAME)


def sandbox_id(notes: dict[str, str]) -> str:
    """The id of the pod's sandbox, "" outside of CRI."""
    return notes.get(_SANDBOX, "")


def pod_namespace(notes: dict[str, str]) -> str:
    """The pod's namespace in Kubernetes, "" outside of CRI."""
    return notes.get(_NAMESPACE, "")


def image_name(notes: dict[str, str]) -> str:
    """The image's name, "" outside of CRI."""
    return notes.get(_IMAGE, "")


def checkpoint_directory(container_bundle: str, container_id: str) -> str | None:
    """Where CRI's CheckpointContainer looks for CRIU's log and statistics, None outside of CRI.

    It tells only a runtime named runc (2.1 internal/cri/server/container_checkpoint_linux.go), and
    looks in the directory above it before containerd 2.1.9.
    """
    root = os.path.realpath(bundle.work_directory(container_bundle))  # <root>/<plugin>/<ns>/<id>
    root = os.path.normpath(os.path.join(root, "../../.."))
    directory = os.path.join(root, "io.containerd.grpc.v1.cri/containers", container_id)
    return os.path.join(directory, "ctrd-checkpoint") if os.path.isdir(directory) else None


def log_file(container_bundle: str, notes: dict[str, str]) -> str | None:
    """The log that CRI has opened for a container about to be created, None if it has none.

    CRI tells the shim the pod's log directory only, with the sandbox, whose bundle lies beside the
    container's. In it the kubelet names logs `<container>/<attempt>.log`, and the newest attempt is
    the one being created.
    """
    name, sandbox = container_name(notes), sandbox_id(notes)
    if not name or not sandbox:
        return None
    try:
        spec = bundle.read_spec(os.path.join(os.path.dirname(container_bundle), sandbox))
        directory = bundle.annotations_of(spec).get(_LOG_DIRECTORY)
        if not directory:
            return None
        directory = os.path.join(directory, name)
        stems = [entry[:-4] for entry in os.listdir(directory) if entry.endswith(".log")]
    except (OSError, ValueError):
        return None
    attempts = [int(stem) for stem in stems if stem.isdigit()]
    return os.path.join(directory, f"{max(attempts)}.log") if attempts else None
