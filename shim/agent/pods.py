"""The pods of this node, found in containerd's own records of what CRI has made: no call to the
API server's pods."""

from __future__ import annotations

from shim.gritctl import messages as m
from shim.gritctl import saving, stored, targets
from shim.gritctl.containerd import TASKS, Containerd, ContainerdError
from shim.gritctl.interrupts import Interrupts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.gritctl.progress import Display

_UID = "io.kubernetes.pod.uid"


class Pods:
    def __init__(self, address: str, namespace: str = "k8s.io") -> None:
        self._address, self._namespace = address, namespace

    def uid(self, pod: str, seconds: float | None = None) -> str | None:
        """The uid of the pod `<namespace>/<name>` if it has a container that runs here; "" if CRI
        has told none. Raises ContainerdError if several have that name, or it cannot be known, or
        containerd is asked something that it does not answer in `seconds`."""
        with self._connected(seconds) as connection:
            if not connection.containers(targets.labelled(pod)):
                return None  # most pods are other nodes': not all that is here for each of them
            try:
                found, _ = targets.find(connection, pod)
            except ContainerdError as error:
                if error.code in ("NOT_FOUND", "FAILED_PRECONDITION"):
                    return None
                raise
        uids = {one.container.labels.get(_UID, "") for one in found}
        if len(uids) > 1:
            raise ContainerdError(
                "FAILED_PRECONDITION",
                f"containers of several pods {pod} run: uids {', '.join(sorted(uids))}",
            )
        return uids.pop()

    def go_on(self, pod: str) -> None:
        """Resumes what an agent that was killed had paused. Raises ContainerdError."""
        with self._connected() as connection:
            found, _ = targets.find(connection, pod)
            for one in found:
                if one.task.status == m.PAUSED:
                    connection.do(TASKS, "Resume", m.TaskRef(container_id=one.id))

    def save(self, pod: str, directory: str, display: Display, interrupts: Interrupts) -> None:
        """As `gritctl checkpoint`, with its exceptions: the pod runs on, whatever happens."""
        with self._connected() as connection:
            found, whole = targets.find(connection, pod)
            saving.Saving(
                connection, found, directory, display, interrupts, pod=whole, end=False
            ).run()

    def saved_bytes(self, directory: str) -> int:
        """The size of a checkpoint; raises CheckpointDirError or stored.NotACheckpoint."""
        return sum(one.bytes() for one in stored.open_all(directory))

    def _connected(self, seconds: float | None = None) -> Containerd:
        return Containerd(self._address, self._namespace, seconds)
