"""The pods of this node, found in containerd's own records of what CRI has made: no call to the
API server's pods."""

from __future__ import annotations

from dataclasses import dataclass

from shim import bundle, cri
from shim.gritctl import messages as m
from shim.gritctl import saving, stored, targets
from shim.gritctl.containerd import CONTAINERS, TASKS, Containerd, ContainerdError
from shim.gritctl.interrupts import Interrupts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.gritctl.progress import Display

_ANSWER_SECONDS = 5.0
_UID = "io.kubernetes.pod.uid"
_POD = "io.kubernetes.pod.name"
_NAMESPACE = "io.kubernetes.pod.namespace"


@dataclass(frozen=True)
class Starting:
    """A container that is about to be created, as CRI has told containerd of it and its pod."""

    name: str
    image: str
    arguments: list[str]
    pod: str
    namespace: str
    uid: str
    labels: dict[str, str]
    """The pod's."""


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

    def uids(self) -> set[str]:
        """The uids of all pods that containerd knows here, running or not. Raises
        ContainerdError."""
        with self._connected(_ANSWER_SECONDS) as connection:
            return {one.labels[_UID] for one in connection.containers() if _UID in one.labels}

    def running(self) -> set[str]:
        """The uids of the pods of which a container runs here. Raises ContainerdError."""
        with self._connected(_ANSWER_SECONDS) as connection:
            tasks = connection.call(TASKS, "List", m.Filters(), m.TaskList).tasks
            every = {one.id: one for one in connection.containers() if _UID in one.labels}
        begun = [every[task.id] for task in tasks if task.id in every]
        return {
            one.labels[_UID]
            for one in begun
            if not cri.is_sandbox(bundle.annotations_of(targets.spec_of(one)))
        }

    def starting(self, container: str) -> Starting | None:
        """None if there is no such container of a pod, any more. Raises ContainerdError."""
        with self._connected(_ANSWER_SECONDS) as connection:
            found = _container(connection, container)
            spec = targets.spec_of(found) if found else {}
            notes = bundle.annotations_of(spec)
            sandbox = _container(connection, cri.sandbox_id(notes))
        if found is None or sandbox is None:
            return None
        return Starting(
            name=cri.container_name(notes) or "",
            image=cri.image_name(notes),
            arguments=arguments_of(spec),
            pod=sandbox.labels.get(_POD, ""),
            namespace=sandbox.labels.get(_NAMESPACE, ""),
            uid=sandbox.labels.get(_UID, ""),
            labels=dict(sandbox.labels),
        )

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


def arguments_of(spec: dict[str, Any]) -> list[str]:
    """What a container of that specification runs, by its program's name."""
    process = spec.get("process")
    found = process.get("args") if isinstance(process, dict) else None
    return [str(word) for word in found] if isinstance(found, list) else []


def _container(connection: Containerd, identity: str) -> m.Container | None:
    try:
        return connection.call(CONTAINERS, "Get", m.Id(id=identity), m.OneContainer).container
    except ContainerdError as error:
        if error.code in ("NOT_FOUND", "INVALID_ARGUMENT"):
            return None
        raise
